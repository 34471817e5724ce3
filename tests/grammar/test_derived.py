"""Derived defaults: their expressions, and what null stands for in a field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moenas.grammar.component import Component, fields, setting
from moenas.grammar.derived import derived_value
from moenas.model.mixers.attention import AttentionMixer
from moenas.model.mixers.mamba import MambaMixer
from moenas.model.moe.router import Router

WHOLE = st.integers(1, 10**6)


@dataclass(frozen=True, kw_only=True)
class Shelf(Component):
    """A toy with a chain of derived defaults."""

    width: int = setting("centimetres", low=1)
    boards: int | None = setting("boards of 20 centimetres", derived="ceil(width / 20)")
    screws: int | None = setting("at every second board", derived="boards / 2")
    heavy: bool | None = setting("needs a wall", derived="boards > 3")


@given(WHOLE, WHOLE)
def test_a_quotient_is_exact_or_has_no_value(a: int, b: int) -> None:
    value = derived_value("a / b", {"a": a, "b": b}.get)
    assert value == (a // b if a % b == 0 else None)
    assert derived_value("ceil(a / b)", {"a": a, "b": b}.get) == -(-a // b)
    assert derived_value("a > b", {"a": a, "b": b}.get) is (a > b)


def test_without_a_name_there_is_no_value() -> None:
    assert derived_value("a / b", {"a": 4}.get) is None
    assert derived_value("ceil(b / 16)", {"a": 4}.get) is None


@pytest.mark.parametrize("expression", ["a * 2", "a.b", "min(a, 2)", "0.5", "a < 2", "'a'"])
def test_another_expression_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="not allowed in a derived default"):
        derived_value(expression, {"a": 4}.get)


def test_null_stands_for_the_value_and_the_doc_says_so() -> None:
    assert fields(Shelf)["boards"].default is None
    assert fields(Shelf)["boards"].doc == "boards of 20 centimetres; null: ceil(width / 20)"
    assert (shelf := Shelf(width=61)).resolved("boards") == 4
    assert shelf.resolved("screws") == 2
    assert shelf.resolved("heavy") is True
    assert Shelf(width=61, boards=3).resolved("screws") is None
    assert Shelf(width=61, boards=3, screws=7).resolved("screws") == 7
    assert shelf.resolved("width") == 61


def test_parts_use_the_width_of_the_model() -> None:
    attention = AttentionMixer(head_dim=16)
    assert attention.heads_at(96) == (6, 6)
    assert AttentionMixer(head_dim=16, n_heads=4).heads_at(96) == (4, 4)
    assert attention.v_dim == 16
    ranks = [MambaMixer(d_inner=8).dt_rank_at(d_model) for d_model in (16, 24, 40)]
    assert ranks == [math.ceil(d_model / 16) for d_model in (16, 24, 40)]
    assert [Router(top_k=k).normalizes for k in (1, 2)] == [False, True]


def all_components() -> list[type[Component]]:
    waiting: list[Any] = [Component]
    for cls in waiting:
        waiting += [sub for sub in cls.__subclasses__() if sub not in waiting]
    return [cls for cls in waiting if cls.__module__.startswith("moenas.model.")]


def test_every_derived_default_of_moenas_names_fields_that_exist() -> None:
    checked = 0
    for cls in all_components():
        for field in fields(cls).values():
            if field.derived is not None:
                known = dict.fromkeys(fields(cls), 2) | {"d_model": 2}
                assert derived_value(field.derived, known.__getitem__) is not None
                checked += 1
    assert checked >= 7
