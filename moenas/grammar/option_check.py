"""Options of a space that no valid architecture can have, found by draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.conditions import Scalar
from moenas.grammar.counting import draws_each_layer
from moenas.grammar.nodes import Choice, Fixed, Listing, Range, Record, Tree
from moenas.grammar.sampling import RandomSuggest, drawn, holes

TRIES = 1000
"""Random architectures tried before an option is called never valid."""
LOOKS = 64
"""Values of a range that are tried, spread evenly."""


def check_options(tree: Tree) -> None:
    """Refuse a space with an option that no valid architecture can have.

    Looks at each item of a list, and one layer of a varied group, by itself. An option counts as
    never valid if none of TRIES random ones that have it is valid. Of a long range, LOOKS values
    are tried, both ends among them.

    Raises:
        SpaceError: at the place of the option, with the reason of the last try.
    """
    for narrow in _narrowed(tree):
        # A hole may have no effect beside the fixed values, and then there is nothing to try.
        if any(True for _ in holes(narrow)):
            _check_narrow(narrow)
        else:
            drawn(narrow, RandomSuggest(0), whole=False)


def _check_narrow(tree: Tree) -> None:
    """Try the options of all holes side by side, then those that were in nothing valid alone."""
    known = {hole.name: (hole, _options(hole.tree)) for hole in holes(tree)}
    left = {name: [label for label, _ in options] for name, (_, options) in known.items()}
    for seed in range(max(map(len, left.values()))):
        noted = _Asked(seed, {name: labels[0] for name, labels in left.items() if labels})
        for name, label in noted.forced.items():
            left[name].remove(label)
            left[name].append(label)
        try:
            drawn(tree, noted, whole=False)
        except SpaceError:
            continue
        for name, label in noted.asked.items():
            left[name] = [x for x in left[name] if not _same(x, label)]
    if all(len(left[name]) == len(options) for name, (_, options) in known.items()):
        _require_one(tree)
    for name, labels in left.items():
        hole, options = known[name]
        marks = dict(zip(map(repr, (label for label, _ in options)), options, strict=True))
        for label in labels:
            if hole.depends and _plain(hole.tree, label):
                continue  # without effect it is valid, as it was in studies that drew it then
            forced = {**hole.given, name: label}
            unit = hole.tree.unit if isinstance(hole.tree, Range) else 1
            shown = repr(label) if unit == 1 else f"{unit} * {label}"
            if (reason := _never_valid(tree, forced)) is not None:
                raise SpaceError(
                    f"{shown} can never be valid: {reason}",
                    location=marks[repr(label)][1],
                    path=name,
                )


def _plain(tree: Choice | Range, label: Scalar) -> bool:
    """Whether an option of a hole is a value, not a component."""
    return isinstance(tree, Range) or isinstance(tree.options[tree.labels.index(label)], Fixed)


def _same(a: Scalar, b: Scalar) -> bool:
    return a == b and type(a) is type(b)


class _Asked(RandomSuggest):
    """Draws at random, and notes the holes that were asked for and the answers."""

    def __init__(self, seed: int, forced: Mapping[str, Any]) -> None:
        super().__init__(seed, forced)
        self.asked: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the forced or a random choice."""
        self.asked[name] = super().suggest_categorical(name, choices)
        return self.asked[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return the forced or a random whole number."""
        self.asked[name] = super().suggest_int(name, low, high, step=step, log=log)
        return int(self.asked[name])

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return the forced or a random number."""
        self.asked[name] = super().suggest_float(name, low, high, step=step, log=log)
        return float(self.asked[name])


def _narrowed(tree: Tree) -> list[Tree]:
    """Return copies of a tree whose lists have one item each, so that every item has a copy."""
    if isinstance(tree, Listing):
        items = enumerate(tree.items, tree.first)
        return [Listing((n,), tree.mark, i) for i, item in items for n in _narrowed(item)]
    if isinstance(tree, Choice):
        several = [_narrowed(option) for option in tree.options]
        firsts = tuple(narrow[0] for narrow in several)
        return [
            replace(tree, options=(*firsts[:i], narrow, *firsts[i + 1 :]))
            for i, narrows in enumerate(several)
            for narrow in (narrows if i == 0 else narrows[1:])
        ]
    if not isinstance(tree, Record):
        return [tree]
    several_fields = {name: _narrowed(value) for name, value in tree.fields.items()}
    if draws_each_layer(tree):
        several_fields["repeat"] = [Fixed(1, tree.fields["repeat"].mark)]
    first = {name: narrows[0] for name, narrows in several_fields.items()}
    others = [(name, n) for name, narrows in several_fields.items() for n in narrows[1:]]
    copies: list[Tree] = [replace(tree, fields=first)]
    return copies + [replace(tree, fields={**first, name: narrow}) for name, narrow in others]


def _options(tree: Choice | Range) -> list[tuple[Scalar, SourceLocation]]:
    if isinstance(tree, Choice):
        return [(x, o.mark) for x, o in zip(tree.labels, tree.options, strict=True)]
    if tree.count is None or tree.step is None:
        return [(tree.low, tree.mark), (tree.high, tree.mark)]
    looks = min(tree.count, LOOKS)
    steps = {i * (tree.count - 1) // max(1, looks - 1) for i in range(looks)}
    values = [tree.low + i * tree.step for i in sorted(steps)]
    return [(x // tree.unit if tree.unit > 1 else x, tree.mark) for x in values]


def _require_one(tree: Tree) -> None:
    """Raise the first reason if no random architecture is valid: then no one hole is at fault."""
    reasons: list[SpaceError] = []
    for seed in range(TRIES):
        try:
            drawn(tree, RandomSuggest(seed), whole=False)
            return
        except SpaceError as error:
            reasons.append(error)
    raise reasons[0]


def _never_valid(tree: Tree, forced: dict[str, Any]) -> str | None:
    """Return why none of TRIES random architectures with these answers is valid; None if one is."""
    reason = ""
    for seed in range(TRIES):
        try:
            drawn(tree, RandomSuggest(seed, forced), whole=False)
            return None
        except SpaceError as error:
            reason = str(error)
    return reason
