"""What a space is good for: its points are counted, its holes listed, architectures drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from moenas.errors import SpaceError
from moenas.grammar.component import Component, Scalar, fields
from moenas.grammar.tree import (
    Choice,
    Fixed,
    Listing,
    Range,
    Record,
    Tree,
    conflict,
    has_holes,
    join,
    make,
)
from moenas.records import Plain
from moenas.resources import SourceLocation

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


def draws_each_layer(tree: Tree) -> bool:
    """Whether the tree is a group of blocks that draws each of its layers by itself."""
    if not isinstance(tree, Record):
        return False
    vary = tree.fields.get("vary")
    return isinstance(vary, Fixed) and vary.value is True


def count(tree: Tree) -> int:
    """Return the exact number of points, without enumeration; a continuous range counts as 1.

    A record is the product of its fields, a choice the sum of its options, a varied group of n
    layers with c variants each is c ** n.
    """
    if isinstance(tree, Fixed):
        return 1
    if isinstance(tree, Range):
        return tree.count or 1
    if isinstance(tree, Choice):
        return sum(count(option) for option in tree.options)
    if isinstance(tree, Listing):
        return math.prod(count(item) for item in tree.items)
    if draws_each_layer(tree):
        layer = math.prod(count(t) for name, t in tree.fields.items() if name != "repeat")
        return sum(layer**n for n in _repeats(tree))
    return math.prod(count(t) for t in tree.fields.values())


def _repeats(tree: Record) -> list[int]:
    """Return every number of layers that a varied group can have."""
    repeat = tree.fields["repeat"]
    if isinstance(repeat, Fixed):
        return [cast(int, repeat.value)]
    if isinstance(repeat, Range):
        return list(range(int(repeat.low), int(repeat.high) + 1, int(repeat.step or 1)))
    options = cast(Choice, repeat).options
    return [n for option in options for n in _repeats(replace(tree, fields={"repeat": option}))]


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
    return (max(_repeats(tree)) if "repeat" in tree.fields else 1) * (inner or 1)


@dataclass(frozen=True)
class Hole:
    """A hole of a space under the name that the sampler sees."""

    name: str
    tree: Choice | Range
    given: dict[str, Any]
    """Answers to other holes that make this one exist."""


def holes(tree: Tree, path: str = "", given: dict[str, Any] | None = None) -> Iterator[Hole]:
    """Yield every hole; a varied group of layers yields those of its first layer."""
    given = given or {}
    if isinstance(tree, Range):
        yield Hole(path + tree.name, tree, given)
    elif isinstance(tree, Choice):
        yield Hole(path, tree, given)
        for label, option in zip(tree.labels, tree.options, strict=True):
            yield from holes(option, join(path, label), {**given, path: label})
    elif isinstance(tree, Listing):
        for i, item in enumerate(tree.items, tree.first):
            yield from holes(item, join(path, i), given)
    elif isinstance(tree, Record):
        varied = draws_each_layer(tree)
        for name, value in tree.fields.items():
            inner = join(path, 0) if varied and name != "repeat" else path
            yield from holes(value, join(inner, name), given)


def draw(tree: Tree, suggest: Suggest, path: str = "") -> Any:
    """Fill every hole and return plain data; names are dotted paths, options included."""
    if isinstance(tree, Fixed):
        return tree.value
    if isinstance(tree, Range):
        return _draw_range(tree, suggest, path)
    if isinstance(tree, Choice):
        option, inner = _draw_option(tree, suggest, path)
        return draw(option, suggest, inner)
    if isinstance(tree, Listing):
        items = enumerate(tree.items, tree.first)
        return [x for i, item in items for x in _draw_item(item, suggest, join(path, i))]
    found: Plain = {} if tree.cls.kind is None else {"kind": tree.cls.kind}
    for name, value in tree.fields.items():
        found[name] = draw(value, suggest, join(path, name))
    return found


def _draw_option(tree: Choice, suggest: Suggest, path: str) -> tuple[Tree, str]:
    """Draw one option of a choice; return it and the path of the holes in it."""
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
    return [draw(tree, suggest, path)]


def _draw_layers(tree: Record, suggest: Suggest, path: str) -> list[Plain]:
    """Draw the number of layers of a varied group, then each layer by itself."""
    repeat = draw(tree.fields["repeat"], suggest, join(path, "repeat"))
    layers = []
    for i in range(repeat):
        layer: Plain = {"repeat": 1, "vary": False}
        for name, value in tree.fields.items():
            if name not in layer:
                layer[name] = draw(value, suggest, join(join(path, i), name))
        layers.append(layer)
    return layers


def _draw_range(tree: Range, suggest: Suggest, path: str) -> float:
    path += tree.name
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
    component: Component = _fill(tree, suggest, "")
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


class _Walk:
    """Answers each question with the option at a given place, and the first where none is given."""

    def __init__(self, places: Sequence[int]) -> None:
        self.places = list(places)
        self.last: list[int] = []
        """The place of the last option of each question."""
        self.answers: dict[str, Any] = {}

    def _next(self, name: str, options: Sequence[Any]) -> Any:
        at = len(self.last)
        if at == len(self.places):
            self.places.append(0)
        self.last.append(len(options) - 1)
        self.answers[name] = options[self.places[at]]
        return self.answers[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the choice at the place."""
        return self._next(name, choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return the whole number at the place."""
        return int(self._next(name, range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return the number at the place."""
        assert step is not None, "continuous ranges are refused before"
        count = round((high - low) / step) + 1
        at = self._next(name, range(count))
        self.answers[name] = min(high, low + step * at)
        return float(self.answers[name])

    def advanced(self) -> list[int] | None:
        """Return the places of the next point: the last place that can move on does."""
        places = self.places
        while places and places[-1] == self.last[len(places) - 1]:
            places = places[:-1]
        return [*places[:-1], places[-1] + 1] if places else None


def enumerate_points(tree: Tree, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield each point of a finite space, at most `limit`: what `draw` asks for -> the answer.

    The order is fixed, the last hole moves first. Nothing is held but the current point.

    Raises:
        SpaceError: at once, naming a hole that is a continuous range.
    """
    for hole in holes(tree):
        if isinstance(hole.tree, Range) and hole.tree.count is None:
            raise SpaceError(
                f"{hole.tree.mark}: {hole.name}: a continuous range has no end of values;"
                " give it a step"
            )
    return _points(tree, limit)


def _points(tree: Tree, limit: int | None) -> Iterator[dict[str, Any]]:
    places: list[int] | None = []
    yielded = 0
    while places is not None and (limit is None or yielded < limit):
        walk = _Walk(places)
        draw(tree, walk)
        yield walk.answers
        yielded += 1
        places = walk.advanced()


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
            _check_option(tree, forced, f"{marks[repr(label)][1]}: {name}: {shown}")


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


def _check_option(tree: Tree, forced: dict[str, Any], place: str) -> None:
    reason = ""
    for seed in range(TRIES):
        try:
            drawn(tree, RandomSuggest(seed, forced), whole=False)
            return
        except SpaceError as error:
            reason = str(error)
    raise SpaceError(f"{place} can never be valid: {reason}")
