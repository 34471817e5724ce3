"""Fields without effect are not drawn and not counted, and they change no architecture."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_space import wide

from moenas.errors import SpaceError
from moenas.grammar import sampling
from moenas.grammar import tree as grammar
from moenas.grammar.component import Component, fields, setting
from moenas.grammar.conditions import none_of, one_of
from moenas.grammar.counting import count
from moenas.grammar.enumeration import enumerate_points
from moenas.grammar.field_effects import deciding_fields, drawing_order, has_effect, word
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.resources import Node
from moenas.space.effects import without_effect
from moenas.space.space import Space


@dataclass(frozen=True, kw_only=True)
class Lamp(Component):
    """A toy whose fields depend on one another."""

    repeat: int = setting("lamps in a row", default=1, low=1)
    vary: bool = setting("draw each by itself", default=False)
    colour: Literal["red", "blue"] = setting(
        "colour", default="red", without_effect={"watts": one_of(0), "candle": one_of(None)}
    )
    watts: int = setting("power", default=0, low=0)
    candle: int | None = setting("length", default=None, low=1)
    shade: Literal["none", "paper", "glass"] = setting(
        "shade", default="none", without_effect=({"watts": one_of(0)}, {"bare": one_of(True)})
    )
    bare: bool = setting("without a shade", default=False)
    frosted: bool = setting("of glass", default=False, without_effect={"shade": none_of("glass")})


@dataclass(frozen=True, kw_only=True)
class Room(Component):
    """A toy whole."""

    lamps: tuple[Lamp, ...] = setting("lamps")


def effective(lamp: Plain) -> Plain:
    """The lamp by the rules above, written out by hand."""
    lamp = dict(lamp)
    if lamp["watts"] == 0 or lamp["bare"]:
        lamp["shade"] = "none"
    if lamp["shade"] != "glass":
        lamp["frosted"] = False
    if lamp["watts"] == 0 and lamp["candle"] is None:
        lamp["colour"] = "red"
    return lamp


OPTIONS: dict[str, list[Any]] = {
    "colour": ["red", "blue"],
    "watts": [0, 3, 6],
    "candle": [None, 2],
    "shade": ["none", "paper", "glass"],
    "bare": [False, True],
    "frosted": [False, True],
}


def open_lamps(draw: st.DrawFn) -> tuple[Plain, list[Plain]]:
    """A lamp with holes, and every combination of its values."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, min_size=1))
    opened: Plain = {}
    values: dict[str, list[Any]] = {}
    for name, options in OPTIONS.items():
        if name in names:
            chosen = draw(st.lists(st.sampled_from(options), unique=True, min_size=1))
            opened[name], values[name] = {"choice": chosen}, chosen
            if name == "watts" and draw(st.booleans()):
                opened[name], values[name] = {"int": [0, 6], "step": 3}, [0, 3, 6]
        else:
            one = draw(st.sampled_from(options))
            opened[name], values[name] = one, [one]
    combined = [dict(zip(values, x, strict=True)) for x in itertools.product(*values.values())]
    return opened, combined


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 2), st.booleans())
def test_the_size_is_the_number_of_lamps_that_differ(
    data: st.DataObject, repeat: int, vary: bool
) -> None:
    lamp, combined = data.draw(st.composite(open_lamps)())
    differ = {json.dumps(effective(x), sort_keys=True) for x in combined}
    tree = grammar.read(Room, Node.wrap({"lamps": [{**lamp, "repeat": repeat, "vary": vary}]}))
    wanted = len(differ) ** (repeat if vary else 1)
    assert count(tree) == wanted
    points = list(enumerate_points(tree))
    assert len(points) == wanted
    asked = {name for point in points for name in point}
    listed = {hole.name for hole in sampling.holes(tree)}
    assert listed == {name for name in asked if ".0.1." not in name or not vary}
    for point in points[:20]:
        known = json.dumps(sampling.draw(tree, _Known(point))["lamps"][0], sort_keys=True)
        drawn = sampling.drawn(tree, _Known(point))
        assert json.dumps(drawn.plain()["lamps"][0], sort_keys=True) == known


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_hole_is_drawn_beside_the_answers_that_it_is_listed_with(data: st.DataObject) -> None:
    lamp, _ = data.draw(st.composite(open_lamps)())
    tree = grammar.read(Room, Node.wrap({"lamps": [lamp]}))
    for hole in sampling.holes(tree):
        noted = _Asked(hole.given)
        sampling.draw(tree, noted)
        assert hole.name in noted.asked


class _Known(sampling.RandomSuggest):
    """Answers known names alone."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__(0, known)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        assert name in self.forced
        return super().suggest_categorical(name, choices)


class _Asked(sampling.RandomSuggest):
    """Notes the names that are asked for."""

    def __init__(self, forced: dict[str, Any]) -> None:
        super().__init__(0, forced)
        self.asked: set[str] = set()

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked.add(name)
        return super().suggest_categorical(name, choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        self.asked.add(name)
        return super().suggest_int(name, low, high, step=step, log=log)


def test_a_circle_of_conditions_is_an_error_of_the_class() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Circle(Component):
        one: int = setting("one", default=0, without_effect={"other": one_of(0)})
        other: int = setting("other", default=0, without_effect={"one": one_of(0)})

    @dataclass(frozen=True, kw_only=True)
    class Unknown(Component):
        one: int = setting("one", default=0, without_effect={"two": one_of(0)})

    for cls, name in ((Circle, "one"), (Unknown, "two")):
        with pytest.raises(ValueError, match=f"names '{name}'"):
            drawing_order(cls)


# --- the components of a model -----------------------------------------------------------------


def components(one: Component) -> Iterator[Component]:
    yield one
    for name in fields(type(one)):
        value = getattr(one, name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Component):
                yield from components(inner)


def every_class() -> set[type[Component]]:
    """The classes of the components of all architectures."""
    classes: set[type[Component]] = set()
    open_classes: list[type[Component]] = [Architecture]
    while open_classes:
        cls = open_classes.pop()
        if cls in classes:
            continue
        classes.add(cls)
        open_classes += cls.kinds.values() if cls.kind is None else ()
        families = (field.component for field in fields(cls).values())
        open_classes += [family for family in families if family is not None]
    return classes


def test_each_field_with_a_condition_has_a_default_and_names_known_values() -> None:
    conditional = 0
    for cls in every_class():
        drawing_order(cls)
        for name, sets in deciding_fields(cls).items():
            for value in (x for values in sets for x in values.listed):
                family = fields(cls)[name].component
                known = family is not None and value in family.kinds
                assert known or fields(cls)[name].error_for(value) is None, (cls, name, value)
        for field in fields(cls).values():
            conditional += bool(field.without_effect)
            assert not field.without_effect or not field.required, (cls, field.name)
    assert conditional > 30


def other_values(one: Component, name: str, rng: random.Random) -> Any:
    """Another value of a field, or its present one."""
    field = fields(type(one))[name]
    tried = [*field.choices, True, False, 0.5, 1.5, 8, 16, 264, 2, 3]
    rng.shuffle(tried)
    kinds = field.component.kinds.items() if field.component else ()
    complete = [x for x, cls in kinds if not any(f.required for f in fields(cls).values())]
    if "linear" in dict(kinds) and not complete:
        return {"kind": "linear", "factor": 2.0}
    fitting = (x for x in complete or tried if field.component or field.error_for(x) is None)
    return next(fitting, word(getattr(one, name)))


def with_others(one: Component, rng: random.Random, changed: list[str]) -> Plain:
    """The plain data of a component with other values in its fields without effect."""
    plain = one.plain()
    for name, field in fields(type(one)).items():
        value = getattr(one, name)
        if field.without_effect and not has_effect(
            type(one), name, lambda other: word(getattr(one, other))
        ):
            plain[name] = other_values(one, name, rng)
            changed.append(f"{type(one).__name__}.{name}")
        elif isinstance(value, Component):
            plain[name] = with_others(value, rng, changed)
        elif isinstance(value, tuple):
            plain[name] = [with_others(x, rng, changed) for x in value]
    return plain


class _Likely(sampling.RandomSuggest):
    """Draws some rare options half of the time."""

    LIKELY: ClassVar[dict[str, Any]] = {
        "score": ["uniform", "softmax"], "selection": ["hash", "expert_choice"], "ffn": ["moe"],
        "allow_acausal": [True], "mixer": ["mamba", "attention"], "coef": [0.0],
        "partial_rotary_factor": [0.0],
    }  # fmt: skip

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        likely = self.LIKELY.get(name.rpartition(".")[2], [])
        if likely and set(likely) <= set(choices) and self.random.random() < 0.5:
            return self.random.choice(likely)
        return super().suggest_categorical(name, choices)


def test_other_values_of_fields_without_effect_give_the_same_architecture() -> None:
    seen: set[str] = set()
    for seed in range(400):
        try:
            one = sampling.drawn(wide().tree, _Likely(seed))
        except SpaceError:
            continue
        assert isinstance(one, Architecture)
        changed: list[str] = []
        plain = with_others(one, random.Random(seed), changed)
        try:
            other = Architecture.parse(plain)
        except SpaceError:  # a value that the field takes alone, such as logits of no width
            continue
        assert other.fingerprint == one.fingerprint, changed
        seen.update(changed)
    conditional = {
        f"{cls.__name__}.{field.name}"
        for cls in every_class()
        for field in fields(cls).values()
        if field.without_effect and (cls.kind or not cls.kinds)
    }
    assert conditional == seen


ROUTER = """
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - mixer: {kind: attention, head_dim: 8, qk_norm: {choice: [none, head]},
        qk_norm_after_rope: {choice: [false, true]}}
      ffn:
        kind: moe
        n_experts: 8
        d_expert: 8
        router:
          score: softmax
          top_k: 3
          selection: {n_groups: {choice: [1, 4]}, top_groups: {choice: [2, 3]},
            group_score: {choice: [max, top2_sum]}, kind: top_k}
          logits: {kind: linear, hidden: {choice: [null, 8]},
            hidden_activation: {choice: [gelu, none]}}
          balance: {choice: [none, aux_loss]}
          loss_reduce: {choice: [sum, mean]}
objectives: [total_params]
"""


def test_a_space_of_such_fields_has_as_many_architectures_as_points() -> None:
    space = Space.parse(ROUTER)
    points = list(enumerate_points(space.tree))
    drawn = (sampling.drawn(space.tree, _Known(point)) for point in points)
    prints = {one.fingerprint for one in drawn if isinstance(one, Architecture)}
    # top_groups: 3 of 4, ranked by their best expert, leaves the choice of top_k: 3 as it is.
    assert space.size == len(points) == 3 * 5 * 3 * 3
    assert len(prints) == 3 * 4 * 3 * 3


def test_a_space_of_holes_without_effect_alone_is_one_point_and_check_says_so() -> None:
    space = Space.parse(DEAD, "f")
    assert space.size == 1
    assert list(space.holes) == []
    assert without_effect(space.tree) == [
        "f:6:61: architecture.blocks.0.ffn.d_shared: the hole has no effect beside the other"
        " fields, and is not drawn; leave it out"
    ]


DEAD = """architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - mixer: {kind: attention, head_dim: 8}
      ffn: {kind: moe, n_experts: 4, d_expert: 8, d_shared: {choice: [8, 16]}}
objectives: [total_params]
"""
