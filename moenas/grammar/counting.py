"""How many points a space has, and how many layers its architectures; nothing is enumerated."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TypeAlias, cast

from moenas.grammar.tree import Choice, Fixed, Listing, Range, Record, Tree

Answer: TypeAlias = "tuple[str, int]"
"""A hole of a named layer, and which of its options is drawn; -1 stands for any value."""
Ways: TypeAlias = "Counter[frozenset[Answer]]"
"""Answers to the holes of named layers -> how many points have exactly these among theirs."""


def draws_each_layer(tree: Tree) -> bool:
    """Whether the tree is a group of blocks that draws each of its layers by itself."""
    if not isinstance(tree, Record):
        return False
    vary = tree.fields.get("vary")
    return isinstance(vary, Fixed) and vary.value is True


def count(tree: Tree) -> int:
    """Return the exact number of points, without enumeration; a continuous range counts as 1.

    A record is the product of its fields, a choice the sum of its options, a varied group of n
    layers with c variants each is c ** n. A hole of a named layer is one hole in all its uses.
    """
    sizes: dict[str, int] = {}
    ways = _ways(tree, sizes)
    return sum(n * math.prod(sizes[name] for name, i in key if i < 0) for key, n in ways.items())


def _ways(tree: Tree, sizes: dict[str, int]) -> Ways:
    """Count the points of a tree by the answers to shared holes; `sizes` counts plain values."""
    if isinstance(tree, Fixed):
        return Counter({frozenset(): 1})
    if isinstance(tree, Range):
        return _plain_hole(tree.shared, tree.count or 1, sizes)
    if isinstance(tree, Choice):
        if all(isinstance(option, Fixed) for option in tree.options):
            return _plain_hole(tree.shared, len(tree.options), sizes)
        total: Ways = Counter()
        for i, option in enumerate(tree.options):
            here: Ways = Counter({frozenset([(tree.shared, i)] if tree.shared else []): 1})
            total += _product(here, _ways(option, sizes))
        return total
    if isinstance(tree, Listing):
        return _products([_ways(item, sizes) for item in tree.items])
    if draws_each_layer(tree):
        layer = _products([_ways(t, sizes) for name, t in tree.fields.items() if name != "repeat"])
        powers = {n: _products([layer] * n) for n in set(repeats(tree))}
        return sum((powers[n] for n in repeats(tree)), start=Counter())
    return _products([_ways(value, sizes) for value in tree.fields.values()])


def _plain_hole(shared: str, values: int, sizes: dict[str, int]) -> Ways:
    """Count a hole whose values have no holes of their own."""
    if not shared:
        return Counter({frozenset(): values})
    sizes[shared] = values
    return Counter({frozenset([(shared, -1)]): 1})


def _products(factors: list[Ways]) -> Ways:
    found: Ways = Counter({frozenset(): 1})
    for factor in factors:
        found = _product(found, factor)
    return found


def _product(left: Ways, right: Ways) -> Ways:
    """Join the points of two trees; those that answer one hole in two ways are none."""
    found: Ways = Counter()
    for a, n in left.items():
        for b, m in right.items():
            both = a | b
            if len({name for name, _ in both}) == len(both):
                found[both] += n * m
    return found


def repeats(tree: Record) -> list[int]:
    """Return every number of layers that a varied group can have."""
    repeat = tree.fields["repeat"]
    if isinstance(repeat, Fixed):
        return [cast(int, repeat.value)]
    if isinstance(repeat, Range):
        return list(range(int(repeat.low), int(repeat.high) + 1, int(repeat.step or 1)))
    options = cast(Choice, repeat).options
    return [n for option in options for n in repeats(replace(tree, fields={"repeat": option}))]


def most_layers(tree: Tree) -> int:
    """Return the most layers that an architecture or a group of blocks can have, written out."""
    if isinstance(tree, Choice):
        return max(map(most_layers, tree.options))
    if isinstance(tree, Listing):
        return sum(map(most_layers, tree.items))
    if not isinstance(tree, Record):
        return 0
    blocks = tree.fields.get("blocks")
    inner = 0 if blocks is None else most_layers(blocks)
    return (max(repeats(tree)) if "repeat" in tree.fields else 1) * (inner or 1)
