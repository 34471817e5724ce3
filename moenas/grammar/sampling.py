"""Draws from a space: its holes, random and enumerated points, and options that never fit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.component import Component, Scalar, fields, join
from moenas.grammar.counting import draws_each_layer
from moenas.grammar.tree import (
    Choice,
    Fixed,
    Listing,
    Range,
    Record,
    Tree,
    conflict,
    has_holes,
    make,
)
from moenas.records import Plain

TRIES = 1000
"""Random architectures tried before an option is called never valid."""
MANY = 10_000
"""Different components of one place that are kept."""
WHOLE, FIXED, OPEN = "whole", "fixed", "open"
"""Keys of what a record keeps: itself without holes, its fields without holes, those with."""
LOOKS = 64
"""Values of a range that are tried, spread evenly."""


class Suggest(Protocol):
    """Where drawn values come from. An Optuna `Trial` is one."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return a whole number from low to high."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return a number from low to high."""


class RandomSuggest:
    """Draws uniformly over options and values; `forced` answers some names beforehand."""

    def __init__(self, seed: int, forced: Mapping[str, Any] | None = None) -> None:
        self.random = random.Random(seed)
        self.forced = dict(forced or {})

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the forced or a random choice."""
        return self.forced[name] if name in self.forced else self.random.choice(list(choices))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return the forced or a random whole number."""
        if name in self.forced:
            return int(self.forced[name])
        if log:
            drawn = math.exp(self.random.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return min(high, max(low, round(drawn)))
        return self.random.randrange(low, high + 1, step)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return the forced or a random number."""
        if name in self.forced:
            return float(self.forced[name])
        if step is not None:
            return low + step * self.random.randint(0, round((high - low) / step))
        if log:
            return math.exp(self.random.uniform(math.log(low), math.log(high)))
        return self.random.uniform(low, high)


@dataclass(frozen=True)
class Hole:
    """A hole of a space under the name that the sampler sees."""

    name: str
    tree: Choice | Range
    given: dict[str, Any]
    """Answers to other holes that make this one exist."""


def holes(tree: Tree) -> Iterator[Hole]:
    """Yield every hole; a varied group of layers yields those of its first layer.

    A hole of a named layer is yielded where the layer is used first.
    """
    seen: set[str] = set()
    for hole in _holes(tree, "", {}):
        if hole.name not in seen:
            seen.add(hole.name)
            yield hole


def shared_holes(tree: Tree) -> dict[str, list[int]]:
    """Return the holes of named layers, by name, with their places among all holes written out."""
    found: dict[str, list[int]] = {}
    for i, hole in enumerate(_holes(tree, "", {})):
        if hole.tree.shared:
            found.setdefault(hole.name, []).append(i)
    return found


def _named(tree: Tree, path: str) -> str:
    """Return the name of a hole: its path, or the one that it has in a named layer."""
    return (tree.shared if isinstance(tree, Choice | Range) else "") or path


def _holes(tree: Tree, path: str, given: dict[str, Any]) -> Iterator[Hole]:
    path = _named(tree, path)
    if isinstance(tree, Range):
        yield Hole(path + tree.name, tree, given)
    elif isinstance(tree, Choice):
        yield Hole(path, tree, given)
        for label, option in zip(tree.labels, tree.options, strict=True):
            yield from _holes(option, join(path, label), {**given, path: label})
    elif isinstance(tree, Listing):
        for i, item in enumerate(tree.items, tree.first):
            yield from _holes(item, join(path, i), given)
    elif isinstance(tree, Record):
        varied = draws_each_layer(tree)
        for name, value in tree.fields.items():
            inner = join(path, 0) if varied and name != "repeat" else path
            yield from _holes(value, join(inner, name), given)


class _Once:
    """Asks for each name once: a named layer has the same values in all its uses."""

    def __init__(self, suggest: Suggest) -> None:
        self.suggest = suggest
        self.answers: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the choice of this name."""
        if name not in self.answers:
            self.answers[name] = self.suggest.suggest_categorical(name, choices)
        return self.answers[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return the whole number of this name."""
        if name not in self.answers:
            self.answers[name] = self.suggest.suggest_int(name, low, high, step=step, log=log)
        return int(self.answers[name])

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return the number of this name."""
        if name not in self.answers:
            self.answers[name] = self.suggest.suggest_float(name, low, high, step=step, log=log)
        return float(self.answers[name])


def draw(tree: Tree, suggest: Suggest) -> Any:
    """Fill every hole and return plain data; names are dotted paths, options included."""
    return _draw(tree, _Once(suggest), "")


def _draw(tree: Tree, suggest: Suggest, path: str) -> Any:
    if isinstance(tree, Fixed):
        return tree.value
    if isinstance(tree, Range):
        return _draw_range(tree, suggest, path)
    if isinstance(tree, Choice):
        option, inner = _draw_option(tree, suggest, path)
        return _draw(option, suggest, inner)
    if isinstance(tree, Listing):
        items = enumerate(tree.items, tree.first)
        return [x for i, item in items for x in _draw_item(item, suggest, join(path, i))]
    found: Plain = {} if tree.cls.kind is None else {"kind": tree.cls.kind}
    for name, value in tree.fields.items():
        found[name] = _draw(value, suggest, join(path, name))
    return found


def _draw_option(tree: Choice, suggest: Suggest, path: str) -> tuple[Tree, str]:
    """Draw one option of a choice; return it and the path of the holes in it."""
    path = _named(tree, path)
    label = suggest.suggest_categorical(path, tree.labels)
    at = [i for i, x in enumerate(tree.labels) if x == label and type(x) is type(label)]
    if not at:  # a fixed value that another program gave, such as 16.0 for 16
        raise ValueError(f"{path} = {label!r} is not one of {', '.join(map(repr, tree.labels))}")
    option = tree.options[at[0]]
    return option, path if isinstance(option, Fixed) else join(path, label)


def _draw_item(tree: Tree, suggest: Suggest, path: str) -> list[Any]:
    """Draw one item of a list; a varied group becomes as many items as it has layers."""
    while isinstance(tree, Choice):
        tree, path = _draw_option(tree, suggest, path)
    if draws_each_layer(tree):
        return _draw_layers(cast(Record, tree), suggest, path)
    return [_draw(tree, suggest, path)]


def _draw_layers(tree: Record, suggest: Suggest, path: str) -> list[Plain]:
    """Draw the number of layers of a varied group, then each layer by itself."""
    repeat = _draw(tree.fields["repeat"], suggest, join(path, "repeat"))
    layers = []
    for i in range(repeat):
        layer: Plain = {"repeat": 1, "vary": False}
        for name, value in tree.fields.items():
            if name not in layer:
                layer[name] = _draw(value, suggest, join(join(path, i), name))
        layers.append(layer)
    return layers


def _draw_range(tree: Range, suggest: Suggest, path: str) -> float:
    path = _named(tree, path) + tree.name
    if tree.log and tree.whole:
        unit = tree.unit
        low, high = int(tree.low) // unit, int(tree.high) // unit
        return unit * suggest.suggest_int(path, low, high, step=1, log=True)
    if tree.whole:
        step = int(tree.step or 1)
        return suggest.suggest_int(path, int(tree.low), int(tree.high), step=step, log=False)
    return suggest.suggest_float(path, tree.low, tree.high, step=tree.step, log=tree.log)


def drawn(tree: Tree, suggest: Suggest, *, whole: bool = True) -> Component:
    """Fill every hole and return the component: `parse(draw(tree))` without the detour.

    A part without holes is made once, and equal layers of a varied group are one object. Not
    `whole`: see `grammar.parse`.

    Raises:
        SpaceError: where the fields are written that do not go together.
    """
    component: Component = _fill(tree, _Once(suggest), "")
    if whole and (reason := component.invalid_together()) is not None:
        raise conflict(component, reason)
    return component


def _fill(tree: Tree, suggest: Suggest, path: str) -> Any:
    """Return the value of a tree; `path` names its holes."""
    if isinstance(tree, Fixed):
        return tree.value
    if isinstance(tree, Range):
        return _draw_range(tree, suggest, path)
    if isinstance(tree, Choice):
        option, inner = _draw_option(tree, suggest, path)
        return _fill(option, suggest, inner)
    if isinstance(tree, Listing):
        found: list[Any] = []
        for i, item in enumerate(tree.items, tree.first):
            _fill_item(item, suggest, join(path, i), found)
        return tuple(found)
    if not tree.has_holes and WHOLE in tree.drawn:
        return tree.drawn[WHOLE]
    component = _made(tree, suggest, path, {})
    if not tree.has_holes:
        tree.drawn[WHOLE] = component
    return component


def _made(tree: Record, suggest: Suggest, path: str, given: Plain) -> Component:
    """Return the component of a record; `given` answers some of its fields."""
    if FIXED not in tree.drawn:
        closed = {name: value for name, value in tree.fields.items() if not has_holes(value)}
        tree.drawn[FIXED] = {name: _fill(x, suggest, "") for name, x in closed.items()}
        known = fields(tree.cls)
        tree.drawn[OPEN] = [
            (name, value, known[name].convert if isinstance(value, Choice | Range) else None)
            for name, value in tree.fields.items()
            if name not in closed
        ]
    closed, values = tree.drawn[FIXED], dict(given)
    for name, value, convert in tree.drawn[OPEN]:
        if name not in given:
            found = _fill(value, suggest, join(path, name))
            values[name] = found if convert is None else convert(found)
    # Parts are made once, so two of the same fields are one object; True is not 1.
    answers = tuple(map(_answer, values.values()))
    component: Component | None = tree.drawn.get(answers)
    if component is None:
        component = make(tree, {**closed, **values})
        if len(tree.drawn) < MANY:
            tree.drawn[answers] = component
    return component


def _answer(value: Any) -> Any:
    """Return what two equal answers have in common; that kept holds the parts of its answers."""
    if isinstance(value, Component):
        return id(value)
    return tuple(map(id, value)) if isinstance(value, tuple) else (type(value), value)


def _fill_item(tree: Tree, suggest: Suggest, path: str, found: list[Any]) -> None:
    """Add one item of a list; a varied group becomes as many items as it has layers."""
    while isinstance(tree, Choice):
        tree, path = _draw_option(tree, suggest, path)
    if not draws_each_layer(tree):
        found.append(_fill(tree, suggest, path))
        return
    tree = cast(Record, tree)
    repeat = int(_fill(tree.fields["repeat"], suggest, join(path, "repeat")))
    given: Plain = {"repeat": 1, "vary": False}
    for i in range(repeat):
        found.append(_made(tree, suggest, join(path, i), given))


def check_options(tree: Tree) -> None:
    """Refuse a space with an option that no valid architecture can have.

    Looks at each item of a list, and one layer of a varied group, by itself. An option counts as
    never valid if none of TRIES random ones that have it is valid. Of a long range, LOOKS values
    are tried, both ends among them.

    Raises:
        SpaceError: at the place of the option, with the reason of the last try.
    """
    for narrow in _narrowed(tree):
        if has_holes(narrow):
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
            forced = {**hole.given, name: label}
            unit = hole.tree.unit if isinstance(hole.tree, Range) else 1
            shown = repr(label) if unit == 1 else f"{unit} * {label}"
            if (reason := _never_valid(tree, forced)) is not None:
                raise SpaceError(
                    f"{shown} can never be valid: {reason}",
                    location=marks[repr(label)][1],
                    path=name,
                )


def _same(a: Scalar, b: Scalar) -> bool:
    return a == b and type(a) is type(b)


class _Asked(RandomSuggest):
    """Draws at random and notes what was asked for, and the answers."""

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
