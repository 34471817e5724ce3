"""The point of a space that gives an architecture: a tree of values against a tree with holes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.component import join
from moenas.grammar.conditions import Scalar
from moenas.grammar.counting import draws_each_layer, repeats
from moenas.grammar.field_effects import has_effect
from moenas.grammar.nodes import LAYERS, Choice, Fit, Fixed, Listing, Range, Record, Tree, has_holes
from moenas.grammar.sampling import holes, tree_word

OTHER_LENGTH = 10**6
"""Weight of a list of another number of layers, against 1 of another value."""
MAX_SHOWN = 5
"""Differences that an error lists."""
OF_A_GROUP = ("repeat", "vary", "blocks")
"""Fields of a group of blocks that say how its layers are written, not what they are."""


@dataclass(frozen=True)
class Mismatch:
    """A value that is not one of the space."""

    hole_path: str
    """Where the value is in the space, with the options around it."""
    value: str
    wanted: str
    at: SourceLocation
    """Where the value is written; without a file for plain data."""
    hole: SourceLocation
    """Where the space says what the value may be."""
    weight: int = 1

    @property
    def path(self) -> str:
        """The path of the value in a space file."""
        named = self.hole_path.startswith(f"{LAYERS}.")
        return self.hole_path if named else join("architecture", self.hole_path)

    def __str__(self) -> str:
        place = f" ({self.hole})" if self.hole.source else ""
        return f"{self.value} is not {self.wanted}{place}"


@dataclass(frozen=True)
class Match:
    """The answers to the holes of a space that come nearest to a tree of values."""

    answers: Mapping[str, Any] = field(default_factory=dict)
    """Hole -> value, as a sampler gives it."""
    mismatches: tuple[Mismatch, ...] = ()
    """Values that differ; a field without effect may differ, and the architecture be the same."""

    @property
    def weight(self) -> int:
        """How far the values are from the space."""
        return sum(mismatch.weight for mismatch in self.mismatches)

    def answering(self, name: str, value: Any) -> Match:
        """Return the match with one more answer."""
        return Match({**self.answers, name: value}, self.mismatches)

    def differing(self, mismatch: Mismatch) -> Match:
        """Return the match with one more mismatch."""
        return Match(self.answers, (*self.mismatches, mismatch))

    def error(self) -> SpaceError:
        """Return the error that names the values that are not of the space."""
        different = {(m.hole_path, m.value): m for m in reversed(self.mismatches)}
        first, *more = reversed(different.values())
        lines = [f"{m.at}: {m.path}: {m}" if m.at.source else f"{m.path}: {m}" for m in more]
        if len(lines) >= MAX_SHOWN:
            lines[MAX_SHOWN - 1 :] = [f"and {len(lines) - MAX_SHOWN + 1} more"]
        place = first.at if first.at.source else first.hole
        return SpaceError("\n  ".join([str(first), *lines]), location=place, path=first.path)


def matches(space: Tree, values: Tree) -> Iterator[Match]:
    """Yield answers to the holes of `space` that come near to `values`, a tree without holes.

    The first match has the fewest mismatches. The next ones draw another option of one choice in
    which there are mismatches. Layers are written out, so a pattern may be a list in the other
    tree. A field without effect may differ, so the caller compares fingerprints.
    """
    best = _match(space, values, "", Match())
    yield best
    places = {mismatch.hole_path for mismatch in best.mismatches}
    for hole in holes(space):
        if hole.name not in best.answers or not isinstance(hole.tree, Choice):
            continue
        if any(place == hole.name or place.startswith(f"{hole.name}.") for place in places):
            for label in hole.tree.labels:
                if not _same(label, best.answers[hole.name]):
                    yield _match(space, values, "", Match({hole.name: label}))


def _match(tree: Tree, value: Tree, path: str, known: Match) -> Match:
    """Match one value; `path` names the holes in it."""
    if isinstance(tree, Choice):
        return _match_choice(tree, value, path, known)
    if isinstance(tree, Range):
        return _match_range(tree, value, path, known)
    if isinstance(tree, Listing):
        if isinstance(value, Listing):
            return _match_listing(tree, value, path, known)
        return known.differing(_other_kind(tree, value, path))
    if isinstance(tree, Fit):
        if isinstance(value, Fixed) and tree.holds(value.value):
            return known
        wanted = f"a width from {tree.low} to {tree.high} in steps of {tree.step}"
        return known.differing(Mismatch(path, _text(value), wanted, value.mark, tree.mark))
    if isinstance(tree, Fixed):
        if isinstance(value, Fixed) and _same(tree.value, value.value):
            return known
        return known.differing(_other_value(tree, value, path))
    if not isinstance(value, Record) or value.cls is not tree.cls:
        return known.differing(_other_kind(tree, value, path))
    return _match_fields(tree, value, path, known, tuple(tree.fields))


def _match_fields(
    tree: Record, value: Record, path: str, known: Match, names: Iterable[str]
) -> Match:
    """Match fields of a record; a hole that has no effect in the architecture has no answer."""

    def word_of(name: str) -> Scalar:
        return tree_word(value.fields[name])

    for name in names:
        inner = tree.fields[name]
        if not has_holes(inner) or has_effect(tree.cls, name, word_of):
            known = _match(inner, value.fields[name], join(path, name), known)
    return known


def _match_choice(tree: Choice, value: Tree, path: str, known: Match) -> Match:
    """Match the nearest option, or the one that an earlier use of the hole has."""
    path = tree.shared or path
    given = known.answers.get(path, known)
    best: Match | None = None
    for label, option in zip(tree.labels, tree.options, strict=True):
        if given is not known and not _same(given, label):
            continue
        inner = path if isinstance(option, Fixed) else join(path, label)
        match = _match(option, value, inner, known.answering(path, label))
        if best is None or match.weight < best.weight:
            best = match
        if match.weight == known.weight:
            break
    assert best is not None
    new = best.mismatches[len(known.mismatches) :]
    own = (path, join(path, best.answers[path]))
    if new and new[0].hole_path in own:
        # No option is of the kind of the value: one line names them all.
        wanted = f"one of {', '.join(map(_word, tree.labels))}"
        if given is not known:
            wanted = f"{_word(given)}, as in an earlier layer of the group"
        whole = Mismatch(path, _text(value), wanted, value.mark, tree.mark, best.weight)
        return Match(best.answers, (*known.mismatches, whole))
    return best


def _match_range(tree: Range, value: Tree, path: str, known: Match) -> Match:
    """Match a number; one outside of the range counts as the nearest end."""
    path = tree.shared or path
    name = path + tree.name
    number = value.value if isinstance(value, Fixed) else None
    kind = "a whole number" if tree.whole else "a number"
    wanted = f"{kind} from {tree.low:g} to {tree.high:g}"
    wanted += f" in steps of {tree.step:g}" if tree.step not in (None, 1) else ""
    if isinstance(number, bool) or not isinstance(number, int | float):
        number, inside = tree.low, False
    else:
        inside = tree.holds(number)
    if name in known.answers:
        given = known.answers[name] * tree.unit
        inside = inside and number == given
        wanted = f"{given:g}, as in an earlier layer of the group"
    elif inside:
        known = known.answering(name, int(number) // tree.unit if tree.whole else float(number))
    else:
        low = int(tree.low) // tree.unit if tree.whole else float(tree.low)
        known = known.answering(name, low)
    if inside:
        return known
    return known.differing(Mismatch(path, _text(value), wanted, value.mark, tree.mark))


# --- layers ------------------------------------------------------------------------------------


def _match_listing(tree: Listing, value: Listing, path: str, known: Match) -> Match:
    """Match the layers of a list of groups, written out.

    Item after item, the best match is kept for each number of layers that it can end at.
    """
    layers = list(_layers(value))
    ends = {0: known}
    for i, item in enumerate(tree.items, tree.first):
        ends = _best(
            (end, match)
            for start, here in ends.items()
            for end, match in _match_item(item, layers, start, join(path, i), here)
        )
    if len(layers) in ends:
        return ends[len(layers)]
    counts = sorted(set(_lengths(tree)))
    wanted = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = f"a list of {len(layers)} layers"
    unequal = Mismatch(path, text, f"of {wanted} layers", value.mark, tree.mark, OTHER_LENGTH)
    return known.differing(unequal)


def _best(matches: Iterator[tuple[int, Match]]) -> dict[int, Match]:
    """Return the match of the least weight for each end."""
    best: dict[int, Match] = {}
    for end, one in matches:
        if end not in best or one.weight < best[end].weight:
            best[end] = one
    return best


def _match_item(
    item: Tree, layers: list[Record], start: int, path: str, known: Match
) -> Iterator[tuple[int, Match]]:
    """Yield where an item can end that begins at layer `start`, with the match up to there."""
    if isinstance(item, Choice):
        path = item.shared or path
        for label, option in zip(item.labels, item.options, strict=True):
            if path not in known.answers or _same(known.answers[path], label):
                here = known.answering(path, label)
                yield from _match_item(option, layers, start, join(path, label), here)
        return
    group = cast(Record, item)
    varied = draws_each_layer(group)
    allowed = set(repeats(group))
    ends = {start: known}
    for n in range(1, max(allowed) + 1):
        inner = join(path, n - 1) if varied else path
        ends = _best(
            (end, match)
            for at, here in ends.items()
            for end, match in _match_once(group, layers, at, inner, here)
        )
        if not ends:
            return
        if n in allowed:
            repeat = Fixed(n, group.mark)
            for end, match in ends.items():
                yield end, _match(group.fields["repeat"], repeat, join(path, "repeat"), match)


def _match_once(
    group: Record, layers: list[Record], start: int, path: str, known: Match
) -> Iterator[tuple[int, Match]]:
    """Yield where one repetition of a group can end, with the match up to there."""
    inner = group.fields["blocks"]
    if isinstance(inner, Listing):
        ends = {start: known}
        for i, item in enumerate(inner.items, inner.first):
            ends = _best(
                (end, match)
                for at, here in ends.items()
                for end, match in _match_item(item, layers, at, join(join(path, "blocks"), i), here)
            )
        yield from ends.items()
    elif start < len(layers):
        names = [name for name in group.fields if name not in OF_A_GROUP]
        yield start + 1, _match_fields(group, layers[start], path, known, names)


def _layers(value: Listing) -> Iterator[Record]:
    """Yield the layers of a list of groups without holes, patterns and repeats written out."""
    for item in value.items:
        group = cast(Record, item)
        inner = group.fields["blocks"]
        for _ in range(cast(int, cast(Fixed, group.fields["repeat"]).value)):
            if isinstance(inner, Listing):
                yield from _layers(inner)
            else:
                yield group


def _lengths(tree: Tree) -> Iterator[int]:
    """Yield numbers of layers that a list or a group can have, the least and the most of them."""
    if isinstance(tree, Choice):
        for option in tree.options:
            yield from _lengths(option)
    elif isinstance(tree, Listing):
        several = [sorted(_lengths(item)) for item in tree.items]
        yield sum(lengths[0] for lengths in several)
        yield sum(lengths[-1] for lengths in several)
    elif isinstance(tree, Record):
        inner = tree.fields["blocks"]
        once = sorted(_lengths(inner)) if isinstance(inner, Listing) else [1]
        counts = repeats(tree)
        yield min(counts) * once[0]
        yield max(counts) * once[-1]


# --- words -------------------------------------------------------------------------------------


def _same(one: Any, other: Any) -> bool:
    """Whether two scalars are one value; 1.0 is 1, and True is not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _other_value(tree: Fixed, value: Tree, path: str) -> Mismatch:
    wanted = f"{_word(tree.value)}, which the space fixes"
    return Mismatch(path, _text(value), wanted, value.mark, tree.mark, _size(value))


def _other_kind(tree: Tree, value: Tree, path: str) -> Mismatch:
    wanted = f"{_text(tree)}, which the space fixes"
    weight = max(_size(tree), _size(value))
    return Mismatch(path, _text(value), wanted, value.mark, tree.mark, weight)


def _size(tree: Tree) -> int:
    """Return how many values a tree holds, components included; of a hole, 1."""
    if isinstance(tree, Record):
        return 1 + sum(map(_size, tree.fields.values()))
    return 1 + sum(map(_size, tree.items)) if isinstance(tree, Listing) else 1


def _word(value: Scalar) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _text(tree: Tree) -> str:
    """Return a value, or the kind of a component, as YAML writes it."""
    if isinstance(tree, Fixed):
        return _word(tree.value)
    if isinstance(tree, Record):
        return tree.cls.kind or "a mapping"
    return "a list"
