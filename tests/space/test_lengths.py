"""Layers, and learned positions against the tokens of a pass."""

from __future__ import annotations

import pytest

from moenas.errors import SpaceError
from moenas.model.architecture import Architecture
from moenas.space.space import Space

LAYER = "mixer: {kind: attention, head_dim: 8, rope: {partial_rotary_factor: 0}}"
LEARNED = """
architecture:
  vocab_size: 256
  d_model: 16
  positions: learned
  max_positions: {rows}
  blocks: [{{{layer}}}]
objectives: [{objectives}]
train: {{context: {context}, tokens: 100_000}}
measure: {{decode_context: {decode}, prefill_tokens: {prefill}}}
"""


def learned(objectives: str, rows: str = "256", context: int = 64, **others: int) -> str:
    sizes = {"decode": 64, "prefill": 64, **others}
    return LEARNED.format(layer=LAYER, objectives=objectives, rows=rows, context=context, **sizes)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (learned("val_loss", context=257), "257 tokens of a pass (train.context)"),
        (learned("decode_ms", decode=256), "257 tokens of a pass (measure.decode_context + 1)"),
        (learned("prefill_ms", prefill=300), "300 tokens of a pass (measure.prefill_tokens)"),
        (learned("flops_per_token", "{choice: [512, 256]}", 400), "(train.context)"),
    ],
)
def test_positions_that_are_too_few_are_refused_when_the_file_is_read(
    text: str, named: str
) -> None:
    with pytest.raises(SpaceError) as error:
        Space.parse(text, "s.yaml")
    assert str(error.value).startswith("s.yaml:6:")
    assert named in str(error.value)


def test_positions_that_reach_are_accepted() -> None:
    Space.parse(learned("val_loss, decode_ms, prefill_ms", context=256, decode=255, prefill=256))
    Space.parse(learned("val_loss", decode=9999, prefill=9999))
    Space.parse(learned("active_params", context=5000))


def nested(*repeats: int) -> str:
    group = f"{{repeat: {repeats[-1]}, {LAYER}}}"
    for repeat in repeats[-2::-1]:
        group = f"{{repeat: {repeat}, blocks: [{group}]}}"
    return f"architecture: {{vocab_size: 256, d_model: 16, blocks: [{group}]}}\nobjectives: [total_params]"


def test_layers_have_a_bound_however_they_are_written() -> None:
    assert Space.parse(nested(10, 1000)).size == 1
    for repeats in ((10, 1000, 2), (1000, 1000, 1000)):
        with pytest.raises(
            SpaceError, match=r"s.yaml:1:\d+: architecture.blocks: .* at most 10,000"
        ):
            Space.parse(nested(*repeats), "s.yaml")
    plain = {"vocab_size": 256, "d_model": 16, "blocks": []}
    layer = {"mixer": {"kind": "attention", "head_dim": 8}}
    plain["blocks"] = [{"repeat": 1000, "blocks": [{"repeat": 11, **layer}]}]
    with pytest.raises(SpaceError, match="11,000 layers"):
        Architecture.parse(plain)


def test_varied_layers_and_choices_of_groups_count_at_their_most() -> None:
    group = f"{{repeat: {{choice: [1, 900]}}, vary: true, {LAYER}}}"
    text = (
        "architecture: {{vocab_size: 256, d_model: 16, blocks: [{}]}}\nobjectives: [total_params]"
    )
    assert Space.parse(text.format(", ".join([group] * 11))).size == 2**11
    with pytest.raises(SpaceError, match="10,800 layers"):
        Space.parse(text.format(", ".join([group] * 12)))
