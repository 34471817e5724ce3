"""A field that has no effect is named with its place; the oracle is the cost and the function."""

from __future__ import annotations

import pytest

from moenas.space.effects import without_effect
from moenas.space.space import Space

TEXT = """\
architecture:
  vocab_size: 256
  d_model: 64
  max_positions: 512
  blocks:
    - repeat: 2
      mixer: {kind: attention, head_dim: 16, n_heads: 4, attn_scale: 0.2}
      ffn:
        kind: moe
        n_experts: 4
        d_expert: 32
        shared_gate: true
        router: {preset: mixtral, top_k: 2}
objectives: [active_params]
"""


def test_a_field_without_effect_is_named_with_its_place() -> None:
    effects = without_effect(Space.parse(TEXT, "s.yaml").tree)
    assert [line.partition(": has no effect")[0] for line in effects] == [
        "s.yaml:4:18: architecture.max_positions",
        "s.yaml:7:70: architecture.blocks.0.mixer.attn_scale",
        "s.yaml:12:22: architecture.blocks.0.ffn.shared_gate",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_positions: 512", "max_positions: 512\n  positions: learned"),
        ("attn_scale: 0.2", "attn_scale: 0.2, floor_scale: 64, rope: {partial_rotary_factor: 0}"),
        ("shared_gate: true", "shared_gate: true\n        n_shared_experts: 1"),
    ],
)
def test_a_field_that_counts_is_not_named(old: str, new: str) -> None:
    before = without_effect(Space.parse(TEXT, "s.yaml").tree)
    after = without_effect(Space.parse(TEXT.replace(old, new), "s.yaml").tree)
    assert len(after) == len(before) - 1


def test_a_field_that_spells_its_default_out_is_not_named() -> None:
    """n_heads 4 is what d_model 64 and head_dim 16 give; another number is another model."""
    assert not any("n_heads" in line for line in without_effect(Space.parse(TEXT, "s.yaml").tree))


def test_a_space_with_holes_is_not_looked_at() -> None:
    space = Space.parse(TEXT.replace("d_model: 64", "d_model: {choice: [64, 128]}"), "s.yaml")
    assert without_effect(space.tree) == []


@pytest.mark.parametrize("name", ["zoo/hunyuan_large", "zoo/switch_base_8", "zoo/trinity_mini"])
def test_the_zoo_has_no_field_without_effect(name: str) -> None:
    assert without_effect(Space.load(name).tree) == []
