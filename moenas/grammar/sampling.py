"""Draws from a space: its holes and their values."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from moenas.grammar.component import Component, fields, join
from moenas.grammar.conditions import Scalar, Values
from moenas.grammar.counting import draws_each_layer
from moenas.grammar.field_effects import drawing_order, has_effect, word
from moenas.grammar.nodes import Choice, Fit, Fixed, Listing, Range, Record, Tree, has_holes
from moenas.grammar.tree import conflict, make
from moenas.records import Plain

MANY = 10_000
"""Different components of one place that are kept."""
WHOLE, FIXED, OPEN = "whole", "fixed", "open"
"""Keys of what a record keeps: itself without holes, its fields without holes, those with."""


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
    depends: bool = False
    """Its field has an effect beside some values of other fields alone."""


def holes(tree: Tree) -> Iterator[Hole]:
    """Yield every hole that can have an effect; in a varied group of layers only the first layer's.

    A hole of a named layer is yielded where the layer is used first.
    """
    seen: set[str] = set()
    for hole in _holes(tree, "", {}):
        if hole.name not in seen:
            seen.add(hole.name)
            yield hole


def holes_without_effect(tree: Tree) -> Iterator[Hole]:
    """Yield the holes that have no effect in any draw, so that no sampler sees them."""
    seen = {hole.name for hole in holes(tree)}
    for hole in _holes(tree, "", {}, every=True):
        if hole.name not in seen:
            seen.add(hole.name)
            yield hole


def shared_holes(tree: Tree) -> dict[str, list[int]]:
    """Return the holes of named layers, by name, with their places among all holes written out."""
    layers_by_hole: dict[str, list[int]] = {}
    for i, hole in enumerate(_holes(tree, "", {}, every=True)):
        if hole.tree.shared:
            layers_by_hole.setdefault(hole.name, []).append(i)
    return layers_by_hole


def depends_on_other_fields(tree: Tree) -> bool:
    """Whether a field with a hole has no effect in some draws."""
    if isinstance(tree, Record):
        return any(
            _can_lack_effect(tree, name) or depends_on_other_fields(value)
            for name, value in tree.fields.items()
            if has_holes(value)
        )
    if isinstance(tree, Choice | Listing):
        inner = tree.options if isinstance(tree, Choice) else tree.items
        return any(map(depends_on_other_fields, inner))
    return False


def _can_lack_effect(tree: Record, name: str) -> bool:
    """Whether a field of a record has no effect beside some values of the others."""
    known = fields(tree.cls)
    return any(
        all(
            _can_be_in(tree.fields[other], values)
            or (word(known[other].default) in values and _can_lack_effect(tree, other))
            for other, values in condition.items()
        )
        for condition in known[name].without_effect
    )


def _can_be_in(tree: Tree, values: Values) -> bool:
    """Whether a tree can have a value that is in a set."""
    if isinstance(tree, Choice):
        return any(_can_be_in(option, values) for option in tree.options)
    if isinstance(tree, Range):
        return values.excluded or any(map(tree.holds, values.listed))
    return not isinstance(tree, Fit) and tree_word(tree) in values


def _named(tree: Tree, path: str) -> str:
    """Return the name of a hole: its path, or the one that it has in a named layer."""
    return (tree.shared if isinstance(tree, Choice | Range) else "") or path


def _holes(tree: Tree, path: str, given: dict[str, Any], *, every: bool = False) -> Iterator[Hole]:
    """Yield the holes that can have an effect, or `every` hole, in the order of the fields."""
    path = _named(tree, path)
    if isinstance(tree, Range):
        yield Hole(path + tree.name, tree, given)
    elif isinstance(tree, Choice):
        yield Hole(path, tree, given)
        for label, option in zip(tree.labels, tree.options, strict=True):
            yield from _holes(option, join(path, label), {**given, path: label}, every=every)
    elif isinstance(tree, Listing):
        for i, item in enumerate(tree.items, tree.first):
            yield from _holes(item, join(path, i), given, every=every)
    elif isinstance(tree, Record):
        varied = draws_each_layer(tree)
        for name, value in tree.fields.items():
            inner = join(path, 0) if varied and name != "repeat" else path
            if not has_holes(value):
                continue
            needed = {} if every else answers_with_effect(tree, name, inner)
            if needed is None:
                continue
            for hole in _holes(value, join(inner, name), {**given, **needed}, every=every):
                yield replace(hole, depends=True) if needed and hole.tree is value else hole


def answers_with_effect(tree: Record, name: str, path: str) -> dict[str, Any] | None:
    """Return answers to holes of a record beside which a field has an effect; None if none exist.

    `path` names the holes of the record. They are the first such answers, not all.
    """
    chosen: dict[str, Any] = {}
    for condition in fields(tree.cls)[name].without_effect:
        alternatives = (
            _answers_outside(tree, other, values, path) for other, values in condition.items()
        )
        first = next((answers for answers in alternatives if answers is not None), None)
        if first is None:
            return None
        chosen |= first
    return chosen


def _answers_outside(tree: Record, name: str, values: Values, path: str) -> dict[str, Any] | None:
    """Return answers beside which a field has an effect and a value that is not in a set."""
    own = answers_with_effect(tree, name, path)
    if own is None:  # it counts as if it had its default
        return None if word(fields(tree.cls)[name].default) in values else {}
    inner = _value_outside(tree.fields[name], values, join(path, name))
    return None if inner is None else {**own, **inner}


def _value_outside(tree: Tree, values: Values, path: str) -> dict[str, Any] | None:
    """Return answers that give a tree a value that is not in a set; None if it has none."""
    if isinstance(tree, Choice):
        path = _named(tree, path)
        for label, option in zip(tree.labels, tree.options, strict=True):
            inner = path if isinstance(option, Fixed) else join(path, label)
            if (inner_answers := _value_outside(option, values, inner)) is not None:
                return {path: label, **inner_answers}
        return None
    if isinstance(tree, Range):
        ends = (tree.low, tree.low + (tree.step or 0), tree.high)
        outside = next((x for x in ends if x <= tree.high and x not in values), None)
        if outside is None:
            return None
        answer = int(outside) // tree.unit if tree.whole else outside
        return {_named(tree, path) + tree.name: answer}
    return None if tree_word(tree) in values else {}


def tree_word(tree: Tree) -> Scalar:
    """Return the word of a tree that is no hole: of a value itself, of a component its kind."""
    if isinstance(tree, Fixed):
        return tree.value
    return (tree.cls.kind or "") if isinstance(tree, Record) else ""


class Answers:
    """Asks for each name once: a named layer has the same values in all its uses."""

    def __init__(self, suggest: Suggest) -> None:
        self.suggest = suggest
        self.answers: dict[str, Any] = {}
        self.fitted: int | None = None
        """The width of the fit; None: the smallest that it allows."""
        self.has_fit = False
        """Whether a draw asked for the width of the fit."""

    @classmethod
    def of(cls, suggest: Suggest) -> Answers:
        """Return answers that are given already, or answers of another source."""
        return suggest if isinstance(suggest, cls) else cls(suggest)

    def width(self, fit: Fit) -> int:
        """Return the width of a fit."""
        self.has_fit = True
        return fit.low if self.fitted is None else self.fitted

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
    return _draw(tree, Answers.of(suggest), "")


def _draw(tree: Tree, suggest: Answers, path: str) -> Any:
    if isinstance(tree, Fixed):
        return tree.value
    if isinstance(tree, Fit):
        return suggest.width(tree)
    if isinstance(tree, Range):
        return _draw_range(tree, suggest, path)
    if isinstance(tree, Choice):
        option, inner = _draw_option(tree, suggest, path)
        return _draw(option, suggest, inner)
    if isinstance(tree, Listing):
        items = enumerate(tree.items, tree.first)
        return [x for i, item in items for x in _draw_item(item, suggest, join(path, i))]
    return _draw_fields(tree, suggest, path, {})


def _draw_fields(tree: Record, suggest: Answers, path: str, given: Plain) -> Plain:
    """Return a record as plain data; `given` answers some of its fields.

    A hole without effect is not asked for: its field has the default.
    """
    values = dict(given)

    def word_of(name: str) -> Scalar:
        return word(values[name])

    for name in drawing_order(tree.cls):
        value = tree.fields[name]
        if name in given:
            continue
        if has_holes(value) and not has_effect(tree.cls, name, word_of):
            default = fields(tree.cls)[name].default
            values[name] = default.plain() if isinstance(default, Component) else default
        else:
            values[name] = _draw(value, suggest, join(path, name))
    kind: Plain = {} if tree.cls.kind is None else {"kind": tree.cls.kind}
    return kind | {name: values[name] for name in tree.fields}


def _draw_option(tree: Choice, suggest: Answers, path: str) -> tuple[Tree, str]:
    """Draw one option of a choice; return it and the path of the holes in it."""
    path = _named(tree, path)
    label = suggest.suggest_categorical(path, tree.labels)
    at = [i for i, x in enumerate(tree.labels) if x == label and type(x) is type(label)]
    if not at:  # a fixed value that another program gave, such as 16.0 for 16
        raise ValueError(f"{path} = {label!r} is not one of {', '.join(map(repr, tree.labels))}")
    option = tree.options[at[0]]
    return option, path if isinstance(option, Fixed) else join(path, label)


def _draw_item(tree: Tree, suggest: Answers, path: str) -> list[Any]:
    """Draw one item of a list; a varied group becomes as many items as it has layers."""
    while isinstance(tree, Choice):
        tree, path = _draw_option(tree, suggest, path)
    if draws_each_layer(tree):
        return _draw_layers(cast(Record, tree), suggest, path)
    return [_draw(tree, suggest, path)]


def _draw_layers(tree: Record, suggest: Answers, path: str) -> list[Plain]:
    """Draw the number of layers of a varied group, then each layer by itself."""
    repeat = _draw(tree.fields["repeat"], suggest, join(path, "repeat"))
    given: Plain = {"repeat": 1, "vary": False}
    return [_draw_fields(tree, suggest, join(path, i), given) for i in range(repeat)]


def _draw_range(tree: Range, suggest: Answers, path: str) -> float:
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
        SpaceError: if fields do not go together; it names their place.
    """
    component: Component = _fill(tree, Answers.of(suggest), "")
    if whole and (reason := component.invalid_as_a_whole()) is not None:
        raise conflict(component, reason)
    return component


def _fill(tree: Tree, suggest: Answers, path: str) -> Any:
    """Return the value of a tree; `path` names its holes."""
    if isinstance(tree, Fixed):
        return tree.value
    if isinstance(tree, Fit):
        return suggest.width(tree)
    if isinstance(tree, Range):
        return _draw_range(tree, suggest, path)
    if isinstance(tree, Choice):
        option, inner = _draw_option(tree, suggest, path)
        return _fill(option, suggest, inner)
    if isinstance(tree, Listing):
        items: list[Any] = []
        for i, item in enumerate(tree.items, tree.first):
            _fill_item(item, suggest, join(path, i), items)
        return tuple(items)
    if not tree.has_holes and WHOLE in tree.drawn:
        return tree.drawn[WHOLE]
    component = _made(tree, suggest, path, {})
    if not tree.has_holes:
        tree.drawn[WHOLE] = component
    return component


def _made(tree: Record, suggest: Answers, path: str, given: Plain) -> Component:
    """Return the component of a record; `given` answers some of its fields."""
    if FIXED not in tree.drawn:
        closed = {name: value for name, value in tree.fields.items() if not has_holes(value)}
        tree.drawn[FIXED] = {name: _fill(x, suggest, "") for name, x in closed.items()}
        known = fields(tree.cls)
        tree.drawn[OPEN] = [
            (known[name], value, known[name].convert if isinstance(value, Choice | Range) else None)
            for name in drawing_order(tree.cls)
            if has_holes(value := tree.fields[name])
        ]
    closed, values = tree.drawn[FIXED], dict(given)

    def word_of(name: str) -> Scalar:
        return word(values[name] if name in values else closed[name])

    for field, value, convert in tree.drawn[OPEN]:
        name = field.name
        if name in given:
            continue
        if field.without_effect and not has_effect(tree.cls, name, word_of):
            values[name] = field.default
            continue
        filled = _fill(value, suggest, join(path, name))
        values[name] = filled if convert is None else convert(filled)
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


def _fill_item(tree: Tree, suggest: Answers, path: str, items: list[Any]) -> None:
    """Add one item of a list; a varied group becomes as many items as it has layers."""
    while isinstance(tree, Choice):
        tree, path = _draw_option(tree, suggest, path)
    if not draws_each_layer(tree):
        items.append(_fill(tree, suggest, path))
        return
    tree = cast(Record, tree)
    repeat = int(_fill(tree.fields["repeat"], suggest, join(path, "repeat")))
    given: Plain = {"repeat": 1, "vary": False}
    for i in range(repeat):
        items.append(_made(tree, suggest, join(path, i), given))
