"""Reading components with holes: what is accepted, what is refused and where."""

from __future__ import annotations

import pytest
from toys import Axle, Cart, Disc, Spoked, Wheel

from moenas.errors import SpaceError
from moenas.grammar import tree as grammar
from moenas.grammar.nodes import Choice, Tree
from moenas.resources import Node, parse_yaml


def read(text: str, cls: type[grammar.Component] = Cart) -> Tree:
    return grammar.read(cls, parse_yaml(text, "f"))


def refusal(text: str, cls: type[grammar.Component] = Cart) -> str:
    with pytest.raises(SpaceError) as error:
        grammar.construct(read(text, cls))
    return str(error.value)


def test_a_component_reads_with_defaults_and_writes_back() -> None:
    cart = grammar.parse(Cart, {"axles": [{"wheel": {"kind": "disc"}}]})
    assert cart == Cart(axles=(Axle(wheel=Disc()),))
    assert grammar.parse(Cart, cart.plain()) == cart


def test_numbers_take_the_type_that_is_meant() -> None:
    tree = read("{width: 2e1, slack: 1, axles: [{wheel: {kind: disc}}]}")
    cart = grammar.construct(tree)
    assert isinstance(cart, Cart)
    assert (cart.width, type(cart.width)) == (20, int)
    assert (cart.slack, type(cart.slack)) == (1.0, float)


def test_a_preset_is_only_a_spelling() -> None:
    preset = grammar.construct(read("{kind: spoked, preset: light, spokes: 5}", Wheel))
    assert preset == Spoked(spokes=5, used=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{axles: [{wheel: {kind: disk}}]}", "f:1:25: axles.0.wheel.kind: no wheel of kind 'disk'. Did you mean 'disc'?"),
        ("{axles: [{wheel: {radius: 4}}]}", "f:1:18: axles.0.wheel: 'kind' is missing"),
        ("{axles: [{wheel: {kind: disc, radis: 4}}]}", "f:1:31: axles.0.wheel.radis: no field of 'disc'. Did you mean 'radius'?"),
        ("{axles: [{wheel: {kind: disc, radius: 5}}]}", "f:1:39: axles.0.wheel.radius: 5 is not a whole number that is a multiple of 4 from 1 to 64"),
        ("{axles: [{wheel: {kind: disc, radius: 4.5}}]}", "4.5 is not a whole number"),
        ("{axles: [{wheel: {kind: disc, radius: '4'}}]}", "'4' is not a whole number"),
        ("{axles: [{wheel: {kind: disc, radius: true}}]}", "True is not a whole number"),
        ("{axles: [{wheel: {kind: disc, radius: }}]}", "is empty; give a whole number"),
        ("{axles: [{wheel: {kind: disc, colour: green}}]}", "'green' is not one of red, blue"),
        ("{axles: [{wheel: {kind: spoked, used: 5}}]}", "f:1:18: axles.0.wheel: used (5) must be at most spokes (4)"),
        ("{axles: [{wheel: {kind: spoked, preset: lite}}]}", "no preset 'lite'. Did you mean 'light'?"),
        ("{slack: {float: [0.1, 0.2], step: 1e-320}, axles: [{wheel: {kind: disc}}]}", "slack.step: 9.99989e-321 gives more than 1e15 steps"),
        ("{axles: []}", "is not a list, each item a mapping of repeat, vary, wheel"),
        ("{axles: {wheel: {kind: disc}}}", "is not a list, each item a mapping of repeat, vary, wheel"),
        ("{axles: [{wheel: 3}]}", "axles.0.wheel: 3 is not a mapping with a kind, or one of the kinds disc, spoked"),
        ("{axles: [{wheel: {int: [1, 4]}}]}", "axles.0.wheel: a range is not allowed here; give a mapping with a kind"),
        ("{axles: [{int: [1, 4]}]}", "axles.0: a range is not allowed here; give a mapping of repeat"),
        ("{axles: [{wheels: disc}]}", "axles.0.wheels: no field of 'axles'. Did you mean 'wheel'?"),
        ("{axles: [{wheel: {choice: [{kind: disk}, {kind: disc}]}}]}", "no wheel of kind 'disk'. Did you mean 'disc'?"),
        ("{axles: [3]}", "f:1:10: axles.0: 3 is not a mapping of repeat, vary, wheel"),
        ("{width: 3}", "f:1:1: 'axles' is missing"),
        ("{width: [1], axles: [{wheel: {kind: disc}}]}", "[1] is not a whole number"),
        ("{width: {choice: []}, axles: [{wheel: {kind: disc}}]}", "'choice' needs a list of at least one option"),
        ("{width: {choice: 3}, axles: [{wheel: {kind: disc}}]}", "'choice' needs a list"),
        ("{width: {choice: [1, 1]}, axles: [{wheel: {kind: disc}}]}", "duplicate option 1"),
        ("{width: {choice: [1, 0]}, axles: [{wheel: {kind: disc}}]}", "f:1:22: width: 0 is not a whole number of at least 1"),
        ("{width: {choice: [1], steps: 2}, axles: [{wheel: {kind: disc}}]}", "not part of a 'choice' hole"),
        ("{width: {int: [1, 5], stp: 2}, axles: [{wheel: {kind: disc}}]}", "Did you mean 'step'?"),
        ("{width: {int: [5, 1]}, axles: [{wheel: {kind: disc}}]}", "low (5) is above high (1)"),
        ("{width: {int: [1, 4], step: 2}, axles: [{wheel: {kind: disc}}]}", "not a whole number of steps"),
        ("{width: {int: [1]}, axles: [{wheel: {kind: disc}}]}", "needs two numbers"),
        ("{width: {int: [1, 2.5]}, axles: [{wheel: {kind: disc}}]}", "2.5 is not a whole number"),
        ("{width: {float: [1, 2]}, axles: [{wheel: {kind: disc}}]}", "a 'float' range is not allowed here"),
        ("{name: {int: [1, 2]}, axles: [{wheel: {kind: disc}}]}", "a range is not allowed here"),
        ("{slack: {float: [0, 1], log: true}, axles: [{wheel: {kind: disc}}]}", "'log' needs a low end above 0"),
        ("{slack: {float: [0, 1], log: 3}, axles: [{wheel: {kind: disc}}]}", "3 is not true or false"),
        ("{slack: {float: [0.1, 1], log: true, step: 0.1}, axles: [{wheel: {kind: disc}}]}", "exclude each other"),
        ("{slack: {float: [0, 1], step: -1}, axles: [{wheel: {kind: disc}}]}", "not a number above 0"),
        ("{axles: [{wheel: {kind: disc, radius: {int: [4, 8], step: 2}}}]}", "2 is not a multiple of 4"),
        ("{axles: [{wheel: {kind: disc, radius: {choice: [4, 8]}}}]}", "unresolved hole"),
        ("{axles: [{vary: {choice: [true, false]}, wheel: {kind: disc}}]}", "axles.0.vary: a hole is not allowed here"),
        ("{slack: 1e400, axles: [{wheel: {kind: disc}}]}", "f:1:9: slack: inf is too large"),
        ("{width: 1000000000000000000, axles: [{wheel: {kind: disc}}]}", "is too large"),
        ("{slack: {float: [0, 1], step: 1e400}, axles: [{wheel: {kind: disc}}]}", "inf is not a number above 0"),
        (f"{{width: {{choice: {list(range(1, 1100))}}}, axles: [{{wheel: {{kind: disc}}}}]}}", "at most 1000 options"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_at_its_place(text: str, message: str) -> None:
    assert message in refusal(text)


def test_options_of_branches_that_are_not_drawn_are_checked_too() -> None:
    text = """
axles:
  - wheel:
      choice:
        - {kind: disc}
        - {kind: spoked, spokes: 0}
"""
    with pytest.raises(SpaceError, match=r"^f:6:34: axles\.0\.wheel\.spoked\.spokes: 0 is not"):
        read(text)


def test_equal_kinds_get_labels_of_their_own() -> None:
    tree = read(
        "{choice: [{kind: disc}, {kind: disc, radius: 4}, {preset: light, kind: spoked}]}", Wheel
    )
    assert isinstance(tree, Choice)
    assert tree.labels == ("disc", "disc-2", "spoked")


def test_a_tree_writes_back_as_the_text_that_reads_as_the_same_tree() -> None:
    text = """
width: {int: [2, 8], step: 2}
slack: {float: [0.1, 1.0], log: true}
axles:
  - repeat: {int: [1, 3]}
    vary: true
    wheel: {choice: [{kind: disc, radius: {choice: [4, 8]}}, {kind: spoked, preset: light}]}
"""
    written = grammar.unparse(read(text))
    assert grammar.unparse(grammar.read(Cart, Node.wrap(written))) == written
    assert written["axles"][0]["wheel"]["choice"][1]["spokes"] == 3
