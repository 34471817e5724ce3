"""How many points a space has, and how many layers its architectures; nothing is enumerated."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TypeAlias, cast

from moenas.grammar.component import Component, fields
from moenas.grammar.conditions import Scalar, Values
from moenas.grammar.field_effects import deciding_fields, drawing_order, word
from moenas.grammar.nodes import Choice, Fit, Fixed, Listing, Range, Record, Tree

Answer: TypeAlias = "tuple[str, int]"
"""A hole of a named layer, and which of its options is drawn; below 0 it is a set of values."""
Sizes: TypeAlias = "dict[Answer, int]"
"""How many values such a set of a hole holds."""
Ways: TypeAlias = "Counter[frozenset[Answer]]"
"""Answers to the holes of named layers -> how many points have exactly these among theirs."""
Membership: TypeAlias = "tuple[bool, ...]"
"""For each of some sets of values, whether a value is in it."""


def draws_each_layer(tree: Tree) -> bool:
    """Whether the tree is a group of blocks that draws each of its layers by itself."""
    if not isinstance(tree, Record):
        return False
    vary = tree.fields.get("vary")
    return isinstance(vary, Fixed) and vary.value is True


def count(tree: Tree) -> int:
    """Return the exact number of points, without enumeration; a continuous range counts as 1.

    A record is the product of its fields, a choice the sum of its options. A varied group of n
    layers with c variants each is c ** n. A hole of a named layer is one hole in all its uses. A
    field without effect has one value.
    """
    sizes: Sizes = {}
    ways = _ways(tree, sizes)
    return sum(
        n * math.prod(sizes[answer] for answer in key if answer[1] < 0) for key, n in ways.items()
    )


def _ways(tree: Tree, sizes: Sizes) -> Ways:
    """Count the points of a tree by the answers to shared holes; `sizes` counts plain values."""
    return _ways_by_set(tree, [], sizes)[()]


def _ways_by_set(tree: Tree, sets: list[Values], sizes: Sizes) -> dict[Membership, Ways]:
    """Count the points of a tree as `_ways`, apart for each membership in some sets of values."""
    if isinstance(tree, Range):
        return _plain_hole(tree.shared, _range_by_set(tree, sets), sizes)
    if isinstance(tree, Choice):
        if all(isinstance(option, Fixed) for option in tree.options):
            options = Counter(_membership(cast(Fixed, x).value, sets) for x in tree.options)
            return _plain_hole(tree.shared, options, sizes)
        total: dict[Membership, Ways] = {}
        for i, option in enumerate(tree.options):
            here: Ways = Counter({frozenset([(tree.shared, i)] if tree.shared else []): 1})
            for member, ways in _ways_by_set(option, sets, sizes).items():
                total[member] = total.get(member, Counter()) + _product(here, ways)
        return total
    if isinstance(tree, Fit):
        return {_membership(tree.low, sets): Counter({frozenset(): 1})}
    if isinstance(tree, Fixed):
        return {_membership(tree.value, sets): Counter({frozenset(): 1})}
    if isinstance(tree, Listing):
        return {_membership("", sets): _products([_ways(item, sizes) for item in tree.items])}
    return {_membership(tree.cls.kind or "", sets): _record_ways(tree, sizes)}


def _membership(value: Scalar, sets: list[Values]) -> Membership:
    return tuple(value in values for values in sets)


def _range_by_set(tree: Range, sets: list[Values]) -> Counter[Membership]:
    """Count the values of a range by their membership: all but those that a set lists have one."""
    listed = {x for values in sets for x in values.listed if tree.holds(x)}
    counts = Counter(_membership(x, sets) for x in listed if tree.count is not None)
    counts[tuple(values.excluded for values in sets)] += (tree.count or 1) - counts.total()
    return +counts


def _record_ways(tree: Record, sizes: Sizes) -> Ways:
    """Count the points of a record: field by field, apart for what is known of deciding fields."""
    varied, deciding = draws_each_layer(tree), deciding_fields(tree.cls)
    states: dict[frozenset[tuple[str, Membership]], Ways] = {frozenset(): Counter({frozenset(): 1})}
    for name in drawing_order(tree.cls):
        if varied and name == "repeat":
            continue
        sets = deciding.get(name, [])
        default = word(fields(tree.cls)[name].default)
        drawn = _ways_by_set(tree.fields[name], sets, sizes)
        fixed = {_membership(default, sets): Counter({frozenset[Answer](): 1})}
        following: dict[frozenset[tuple[str, Membership]], Ways] = {}
        for state, before in states.items():
            effect = _has_effect(tree.cls, name, dict(state))
            for member, ways in (drawn if effect else fixed).items():
                after = state | {(name, member)} if sets else state
                total = following.setdefault(after, Counter())
                total.update(_product(before, ways))
        states = following
    layer: Ways = sum(states.values(), start=Counter())
    if not varied:
        return layer
    powers = {n: _products([layer] * n) for n in set(repeats(tree))}
    return sum((powers[n] for n in repeats(tree)), start=Counter())


def _has_effect(cls: type[Component], name: str, known: dict[str, Membership]) -> bool:
    """Return whether a field has an effect beside what is known of the fields that decide."""
    deciding = deciding_fields(cls)
    return not any(
        all(known[other][deciding[other].index(values)] for other, values in condition.items())
        for condition in fields(cls)[name].without_effect
    )


def _plain_hole(shared: str, values: Counter[Membership], sizes: Sizes) -> dict[Membership, Ways]:
    """Count a hole whose values have no holes of their own, by their membership."""
    if not shared:
        return {member: Counter({frozenset(): n}) for member, n in values.items()}
    ways: dict[Membership, Ways] = {}
    for i, (member, n) in enumerate(sorted(values.items()), start=1):
        sizes[shared, -i] = n
        ways[member] = Counter({frozenset([(shared, -i)]): 1})
    return ways


def _products(factors: list[Ways]) -> Ways:
    ways: Ways = Counter({frozenset(): 1})
    for factor in factors:
        ways = _product(ways, factor)
    return ways


def _product(left: Ways, right: Ways) -> Ways:
    """Join the points of two trees; those that answer one hole in two ways are none."""
    ways: Ways = Counter()
    for a, n in left.items():
        for b, m in right.items():
            both = a | b
            if len({name for name, _ in both}) == len(both):
                ways[both] += n * m
    return ways


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
