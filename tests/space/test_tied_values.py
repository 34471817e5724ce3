"""Values tied by `same_as`: one hole, one value, and the fingerprint of the plain numbers."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from moenas import resources
from moenas.errors import SpaceError
from moenas.grammar.enumeration import enumerate_points
from moenas.grammar.nodes import Tree
from moenas.grammar.sampling import RandomSuggest, holes
from moenas.grammar.tree import read
from moenas.grammar.tree_match import matches
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.resources import Node
from moenas.search.points import HeldAnswers
from moenas.space.architecture_file import read_architecture
from moenas.space.space import Space, file_schema

TIED = """\
architecture:
  vocab_size: 256
  d_model: 64
  norm_eps: {float: [1.0e-6, 1.0e-2], log: true}
  blocks:
    - repeat: {int: [1, 2]}
      mixer: {kind: attention, head_dim: 16, n_kv_heads: {choice: [1, 2, 4]}}
      ffn: {kind: dense, d_ff: {int: [32, 96], step: 32}}
    - repeat: {same_as: blocks.0.repeat}
      mixer:
        kind: attention
        head_dim: {same_as: architecture.blocks.0.mixer.head_dim}
        n_kv_heads: {same_as: blocks.0.mixer.n_kv_heads}
        qk_norm: head
        inner_eps: {same_as: norm_eps}
      ffn:
        choice:
          - {kind: dense, d_ff: {same_as: blocks.0.ffn.d_ff}}
          - {kind: moe, n_experts: 4, d_expert: {same_as: blocks.0.ffn.d_ff}}
objectives: [active_params]
"""


def untied(text: str) -> str:
    """The same space with the holes written in place of the ties."""
    text = text.replace("{same_as: blocks.0.repeat}", "{int: [1, 2]}")
    text = text.replace("{same_as: architecture.blocks.0.mixer.head_dim}", "16")
    text = text.replace("{same_as: blocks.0.mixer.n_kv_heads}", "{choice: [1, 2, 4]}")
    text = text.replace("{same_as: norm_eps}", "{float: [1.0e-6, 1.0e-2], log: true}")
    return text.replace("{same_as: blocks.0.ffn.d_ff}", "{int: [32, 96], step: 32}")


def tree_of(plain: Plain) -> Tree:
    return read(Architecture, Node.wrap(plain))


def parse(text: str) -> Space:
    return Space.parse(text, "s.yaml")


def test_tied_values_are_those_that_are_drawn_elsewhere() -> None:
    space = parse(TIED)
    for seed in range(60):
        plain = space.draw(RandomSuggest(seed))
        first, second = plain["blocks"]
        assert second["repeat"] == first["repeat"]
        assert second["mixer"]["head_dim"] == 16
        assert second["mixer"]["n_kv_heads"] == first["mixer"]["n_kv_heads"]
        assert second["mixer"]["inner_eps"] == plain["norm_eps"]
        assert second["ffn"].get("d_ff", second["ffn"].get("d_expert")) == first["ffn"]["d_ff"]
        assert space.drawn(RandomSuggest(seed)) == space.architecture(plain)


def test_a_tied_value_is_no_hole_and_no_further_points() -> None:
    space = parse(TIED.replace("{float: [1.0e-6, 1.0e-2], log: true}", "1.0e-5"))
    assert [hole.name for hole in holes(space.tree)] == [
        "blocks.0.repeat",
        "blocks.0.mixer.n_kv_heads",
        "blocks.0.ffn.d_ff",
        "blocks.1.ffn",
    ]
    assert space.size == 2 * 3 * 3 * 2
    points = {json.dumps(point, sort_keys=True) for point in enumerate_points(space.tree)}
    assert len(points) == space.size


def test_the_fingerprint_is_that_of_the_plain_numbers() -> None:
    space = parse(TIED)
    plain = space.draw(RandomSuggest(1))
    written = Architecture.parse(json.loads(json.dumps(plain)))
    assert space.architecture(plain).fingerprint == written.fingerprint


def test_an_architecture_with_two_values_is_not_in_the_space() -> None:
    space, wide = parse(TIED), parse(untied(TIED))
    inside = space.draw(RandomSuggest(3))
    match = next(matches(space.tree, tree_of(inside)))
    assert match.mismatches == ()
    assert space.draw(HeldAnswers(match.answers, space.former_fields)) == inside
    inside["blocks"][1]["mixer"]["n_kv_heads"] = (
        4 if inside["blocks"][0]["mixer"]["n_kv_heads"] < 4 else 2
    )
    assert next(matches(wide.tree, tree_of(inside))).mismatches == ()
    (mismatch,) = next(matches(space.tree, tree_of(inside))).mismatches
    assert mismatch.hole_path == "blocks.0.mixer.n_kv_heads"
    assert space.plain() != wide.plain()


def test_a_fit_can_be_tied() -> None:
    text = TIED.replace("{int: [32, 96], step: 32}", "{fit: {active_params: 60e3, within: 0.2}}")
    space = parse(text)
    for seed in range(10):
        first, second = space.drawn(RandomSuggest(seed)).plain()["blocks"]
        width = second["ffn"].get("d_ff", second["ffn"].get("d_expert"))
        assert width == first["ffn"]["d_ff"]


def test_a_value_of_a_named_layer_can_be_tied() -> None:
    text = """\
layers:
  wide: {mixer: {kind: attention, head_dim: 16, n_heads: {choice: [2, 4]}}}
architecture:
  vocab_size: 256
  d_model: 64
  blocks:
    - wide
    - mixer: {kind: attention, head_dim: 16, n_heads: {same_as: blocks.0.mixer.n_heads}}
objectives: [active_params]
"""
    space = parse(text)
    assert [hole.name for hole in holes(space.tree)] == ["layers.wide.mixer.n_heads"]
    assert space.size == 2
    first, second = space.draw(RandomSuggest(0))["blocks"]
    assert first["mixer"]["n_heads"] == second["mixer"]["n_heads"]


def test_an_override_of_the_named_value_is_an_override_of_the_tied_one() -> None:
    space = Space.parse(TIED, "s.yaml", ["architecture.blocks.0.mixer.n_kv_heads=4"])
    assert space.draw(RandomSuggest(0))["blocks"][1]["mixer"]["n_kv_heads"] == 4


def test_an_architecture_file_can_tie_values(tmp_path: Path) -> None:
    text = TIED.replace("{choice: [1, 2, 4]}", "2").replace("{int: [1, 2]}", "2")
    text = text.replace("{float: [1.0e-6, 1.0e-2], log: true}", "1.0e-5")
    text = text.replace("{int: [32, 96], step: 32}", "64")
    head = text[: text.index("        choice:")]
    text = head + "        kind: dense\n        d_ff: {same_as: blocks.0.ffn.d_ff}\n"
    path = tmp_path / "one.yaml"
    path.write_text(text + "objectives: [active_params]\n")
    assert read_architecture(str(path)).architecture.layers[3].plain()["ffn"]["d_ff"] == 64


@pytest.mark.parametrize(
    ("former", "new", "message"),
    [
        (
            "same_as: blocks.0.mixer.n_kv_heads",
            "same_as: blocks.0.mixer.n_kv_head",
            "s.yaml:13:31: architecture.blocks.1.mixer.n_kv_heads.same_as:"
            " architecture.blocks.0.mixer has no 'n_kv_head' that is written."
            " Did you mean 'n_kv_heads'? There are kind, head_dim, n_kv_heads.",
        ),
        (
            "same_as: blocks.0.mixer.n_kv_heads",
            "same_as: blocks.0.mixer",
            "s.yaml:13:31: architecture.blocks.1.mixer.n_kv_heads.same_as:"
            " architecture.blocks.0.mixer is no single value; the section `layers` shares whole parts",
        ),
        (
            "same_as: blocks.0.mixer.n_kv_heads",
            "same_as: blocks.1.ffn.choice.0.d_ff",
            "s.yaml:13:31: architecture.blocks.1.mixer.n_kv_heads.same_as:"
            " architecture.blocks.1.ffn is a choice, so not every architecture has a value below it",
        ),
        (
            "same_as: blocks.0.mixer.n_kv_heads",
            "same_as: blocks.1.mixer.head_dim",
            "architecture.blocks.1.mixer.head_dim is tied itself; name the value that it is tied to",
        ),
        (
            "same_as: blocks.0.mixer.n_kv_heads",
            "same_as: 3",
            "s.yaml:13:31: architecture.blocks.1.mixer.n_kv_heads.same_as: 3 is not a path; write one"
            " such as blocks.0.mixer.n_kv_heads",
        ),
        (
            "{same_as: blocks.0.mixer.n_kv_heads}",
            "{same_as: blocks.0.mixer.n_kv_heads, step: 2}",
            "s.yaml:13:58: architecture.blocks.1.mixer.n_kv_heads.step: not allowed beside 'same_as'",
        ),
        (
            "{same_as: architecture.blocks.0.mixer.head_dim}",
            "{same_as: blocks.0.mixer.n_kv_heads}",
            "s.yaml:12:19: architecture.blocks.1.mixer.head_dim: 1 is not a whole number that is a multiple of 8",
        ),
        (
            "    - repeat: {int: [1, 2]}\n",
            "    - repeat: {int: [1, 2]}\n      vary: true\n",
            "architecture.blocks.0 has vary: true, so each of its layers has its own",
        ),
        (
            "n_kv_heads: {choice: [1, 2, 4]}",
            "n_kv_heads: {int: [8, 16]}",
            "s.yaml:12:19: blocks.0",
        ),
    ],
)
def test_mistakes_are_named_at_their_line(former: str, new: str, message: str) -> None:
    text = TIED.replace(former, new)
    if "{int: [8, 16]}" in new:  # a width has steps of 8, a number of heads has steps of 1
        text = text.replace("architecture.blocks.0.mixer.head_dim", "blocks.0.mixer.n_kv_heads")
        message = (
            "s.yaml:12:19: architecture.blocks.0.mixer.n_kv_heads: the field takes other steps than"
            " blocks.0.mixer.n_kv_heads, to which it is tied"
        )
    assert text != TIED
    with pytest.raises(SpaceError) as refused:
        parse(text)
    assert message in str(refused.value)


def test_the_schema_allows_ties() -> None:
    schema = file_schema()
    validate = jsonschema.Draft7Validator(schema).is_valid
    assert validate(resources.parse_yaml(TIED, "s.yaml").plain)
    wrong = TIED.replace("same_as: blocks.0.mixer.n_kv_heads", "same_as: 3")
    assert not validate(resources.parse_yaml(wrong, "s.yaml").plain)
