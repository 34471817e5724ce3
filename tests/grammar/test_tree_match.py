"""Architectures that a space drew are found in it again, by their values alone."""

from __future__ import annotations

from itertools import islice
from typing import cast

import pytest
from wide_space import wide

from moenas.errors import SpaceError
from moenas.grammar.sampling import RandomSuggest, drawn
from moenas.grammar.tree import read
from moenas.grammar.tree_match import Match, matches
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.resources import Node, parse_yaml
from moenas.search.points import HeldAnswers
from moenas.space.space import Space

HEAD = "vocab_size: 256\nd_model: 64\nblocks:\n"
LAYER = "mixer: {kind: attention, head_dim: 16}, ffn: {kind: dense, d_ff: "


def tree_of(architecture: Architecture):
    return read(Architecture, Node.wrap(architecture.plain()))


def written(blocks: str):
    return read(Architecture, parse_yaml(HEAD + blocks, "mine.yaml"))


def draws(space: Space, count: int) -> list[Architecture]:
    matches = []
    for seed in range(count):
        try:
            matches.append(cast(Architecture, drawn(space.tree, RandomSuggest(seed))))
        except SpaceError:
            continue
    return matches


def fingerprint(space: Space, match: Match) -> str:
    """The fingerprint of the point that the answers of a match give."""
    try:
        made = drawn(space.tree, HeldAnswers(match.answers, space.former_fields))
    except (SpaceError, LookupError):
        return ""
    return cast(Architecture, made).fingerprint


def is_found(space: Space, architecture: Architecture) -> bool:
    tried = islice(matches(space.tree, tree_of(architecture)), 200)
    return any(fingerprint(space, match) == architecture.fingerprint for match in tried)


def test_what_a_space_drew_is_its_own_point_without_a_mismatch() -> None:
    for space in (Space.load("tiny"), wide()):
        for one in draws(space, 60):
            first = next(matches(space.tree, tree_of(one)))
            assert first.mismatches == ()
            assert fingerprint(space, first) == one.fingerprint


def test_the_canonical_form_is_found_though_it_is_written_otherwise() -> None:
    tiny = Space.load("tiny")
    assert all(is_found(tiny, one.canonical()) for one in draws(tiny, 200))
    hard = [is_found(wide(), one.canonical()) for one in draws(wide(), 100)]
    assert sum(hard) >= 0.7 * len(hard)


PATTERNS = [
    "- {repeat: 2, blocks: [{LAYER 64}}, {LAYER 128}}]}",
    "- {LAYER 64}}\n- {LAYER 128}}\n- {LAYER 64}}\n- {LAYER 128}}",
]


@pytest.mark.parametrize("text", PATTERNS)
def test_a_pattern_is_found_however_its_layers_are_written(text: str) -> None:
    text = text.replace("LAYER", LAYER.strip())
    space = Space.parse(
        "architecture:\n  vocab_size: 256\n  d_model: 64\n  blocks:\n    - repeat: {int: [1, 3]}\n"
        f"      blocks: [{{{LAYER} {{int: [32, 128], step: 32}}}}}},"
        f" {{{LAYER} {{choice: [96, 128]}}}}}}]\nobjectives: [total_params]\n"
    )
    first = next(matches(space.tree, written(text)))
    assert first.mismatches == ()
    assert first.answers == {
        "blocks.0.repeat": 2,
        "blocks.0.blocks.0.ffn.d_ff": 64,
        "blocks.0.blocks.1.ffn.d_ff": 128,
    }


def test_layers_drawn_one_by_one_have_answers_of_their_own() -> None:
    space = Space.parse(
        "architecture:\n  vocab_size: 256\n  d_model: 64\n  blocks:\n"
        f"    - {{{LAYER} {{choice: [32, 64]}}}}, repeat: 2, vary: true}}\n"
        f"    - {{{LAYER} {{int: [64, 128], log: true}}}}, repeat: {{choice: [1, 2]}}}}\n"
        "objectives: [total_params]\n"
    )
    text = "".join(f"- {{{LAYER} {width}}}}}\n" for width in (64, 32, 96, 96))
    first = next(matches(space.tree, written(text)))
    assert first.mismatches == ()
    assert first.answers == {
        "blocks.0.0.ffn.d_ff": 64,
        "blocks.0.1.ffn.d_ff": 32,
        "blocks.1.repeat": 2,
        "blocks.1.ffn.d_ff/8": 12,
    }


SPACE = f"""\
architecture:
  vocab_size: 256
  d_model: {{choice: [64, 96]}}
  norm_eps: {{float: [1e-6, 1e-5]}}
  blocks:
    - repeat: {{int: [1, 3]}}
      {LAYER.removesuffix(", ffn: {kind: dense, d_ff: ")}
      ffn:
        choice:
          - {{kind: dense, d_ff: {{int: [32, 128], step: 32}}}}
          - {{kind: moe, n_experts: {{choice: [4, 8]}}, d_expert: 32, router: {{top_k: 2}}}}
objectives: [total_params]
"""
MINE = f"""\
vocab_size: 256
d_model: 64
blocks:
  - repeat: 2
    {LAYER.removesuffix(", ffn: {kind: dense, d_ff: ")}
    ffn: {{kind: moe, n_experts: 8, d_expert: 32, router: {{top_k: 2}}}}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "d_model: 64",
            "d_model: 128",
            "mine.yaml:2:10: architecture.d_model: 128 is not one of 64, 96 (s.yaml:3:12)",
        ),
        (
            "n_experts: 8",
            "n_experts: 16",
            "mine.yaml:6:33: architecture.blocks.0.ffn.moe.n_experts: 16 is not one of 4, 8"
            " (s.yaml:11:36)",
        ),
        (
            "d_expert: 32",
            "d_expert: 40",
            "mine.yaml:6:46: architecture.blocks.0.ffn.moe.d_expert: 40 is not 32, which the space"
            " fixes (s.yaml:11:64)",
        ),
        (
            "kind: moe, n_experts: 8, d_expert: 32, router: {top_k: 2}",
            "kind: dense, d_ff: 48",
            "mine.yaml:6:30: architecture.blocks.0.ffn.dense.d_ff: 48 is not a whole number from 32"
            " to 128 in steps of 32 (s.yaml:10:33)",
        ),
        (
            "kind: moe, n_experts: 8, d_expert: 32, router: {top_k: 2}",
            "kind: product_key, n_keys: 16, top_k: 2",
            "mine.yaml:6:10: architecture.blocks.0.ffn: product_key is not one of dense, moe"
            " (s.yaml:9:9)",
        ),
        (
            "repeat: 2",
            "repeat: 4",
            "mine.yaml:4:3: architecture.blocks: a list of 4 layers is not of 1 to 3 layers"
            " (s.yaml:6:5)",
        ),
        (
            "vocab_size: 256",
            "vocab_size: 256\nnorm_eps: 1e-4",
            "mine.yaml:2:11: architecture.norm_eps: 0.0001 is not a number from 1e-06 to 1e-05"
            " (s.yaml:4:13)",
        ),
    ],
)
def test_the_error_names_the_value_that_is_outside_of_the_space(
    old: str, new: str, message: str
) -> None:
    space = Space.parse(SPACE, "s.yaml")
    mine = read(Architecture, parse_yaml(MINE.replace(old, new), "mine.yaml"))
    assert str(next(matches(space.tree, mine)).error()) == message


def test_plain_data_is_located_at_the_hole() -> None:
    plain: Plain = parse_yaml(MINE.replace("64", "128"), "mine.yaml").plain
    first = next(matches(Space.parse(SPACE, "s.yaml").tree, read(Architecture, Node.wrap(plain))))
    text = "s.yaml:3:12: architecture.d_model: 128 is not one of 64, 96 (s.yaml:3:12)"
    assert str(first.error()) == text


def test_a_named_layer_has_one_answer_for_all_its_uses() -> None:
    space = Space.parse(
        f"layers:\n  local: {{{LAYER} {{choice: [32, 64]}}}}}}\narchitecture:\n  vocab_size: 256\n"
        "  d_model: 64\n  blocks: [local, local]\nobjectives: [total_params]\n",
        "s.yaml",
    )
    equal = next(matches(space.tree, written(f"- {{{LAYER} 64}}, repeat: 2}}")))
    assert (equal.answers, equal.mismatches) == ({"layers.local.ffn.d_ff": 64}, ())
    other = next(matches(space.tree, written(f"- {{{LAYER} 64}}}}\n- {{{LAYER} 32}}}}")))
    assert "32 is not 64, as in an earlier layer of the group" in str(other.error())
