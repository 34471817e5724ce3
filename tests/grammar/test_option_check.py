"""Options that no valid architecture can have are refused where they are written."""

from __future__ import annotations

import pytest
from toys import Cart

from moenas.errors import SpaceError
from moenas.grammar import tree as grammar
from moenas.grammar.nodes import Tree
from moenas.grammar.option_check import check_options
from moenas.resources import parse_yaml


def read(text: str) -> Tree:
    return grammar.read(Cart, parse_yaml(text, "f"))


@pytest.mark.parametrize(
    ("wheel", "place", "reason"),
    [
        ("{choice: [{kind: disc}, {kind: spoked, spokes: 4, used: 8}]}", "f:1:41", "used (8)"),
        ("{kind: spoked, spokes: {choice: [2, 4]}, used: {choice: [1, 9]}}", "f:1:77", "used (9)"),
        ("{kind: spoked, spokes: {int: [1, 4]}, used: 2}", "f:1:40", "spokes (1)"),
    ],
)
def test_an_option_that_can_never_be_valid_is_refused(wheel: str, place: str, reason: str) -> None:
    tree = read(f"axles: [{{wheel: {wheel}}}]")
    with pytest.raises(SpaceError) as error:
        check_options(tree)
    assert str(error.value).startswith(f"{place}: ")
    assert reason in str(error.value)


def test_options_that_are_valid_only_together_are_accepted() -> None:
    tree = read(
        "axles: [{wheel: {kind: spoked, spokes: {choice: [2, 9]}, used: {choice: [1, 9]}}}]"
    )
    check_options(tree)


def test_every_layer_of_a_deep_varied_group_need_not_be_valid_at_once() -> None:
    spoked = "{kind: spoked, spokes: {choice: [2, 9]}, used: {choice: [1, 9]}}"
    tree = read(f"axles: [{{repeat: 40, vary: true, wheel: {spoked}}}]")
    check_options(tree)


def test_values_inside_a_range_are_checked_too() -> None:
    tree = read(
        "axles: [{wheel: {kind: disc}}, {wheel: {kind: spoked, spokes: 4, used: {int: [2, 6]}}}]"
    )
    with pytest.raises(SpaceError, match=r"axles\.1\.wheel\.used: 5 can never be valid"):
        check_options(tree)
