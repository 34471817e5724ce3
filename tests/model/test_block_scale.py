"""The factor of a block: its place, its count, its gradient, and the merges that it prevents."""

from __future__ import annotations

import pytest
import torch

from moenas.errors import SpaceError
from moenas.model.architecture import Architecture
from moenas.records import Plain

MIXER: Plain = {"kind": "attention", "head_dim": 8}
DENSE: Plain = {"kind": "dense", "d_ff": 16}
MOE: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8, "router": {"top_k": 2}}


def architecture(*blocks: Plain, **fields: object) -> Architecture:
    return Architecture.parse({"vocab_size": 40, "d_model": 16, "blocks": list(blocks)} | fields)


BLOCKS: dict[str, Plain] = {
    "both": {"mixer": MIXER, "ffn": DENSE},
    "parallel": {"mixer": MIXER, "ffn": DENSE, "parallel": True},
    "mixer": {"mixer": MIXER},
    "summed": {"ffn": DENSE, "shortcut": MOE, "shortcut_input": "stream", "sum_norm": True},
}


@pytest.mark.parametrize("norm_position", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_stream_after_a_block_is_multiplied(name: str, norm_position: str) -> None:
    block, fields = BLOCKS[name], {"norm_position": norm_position}
    with_factor = architecture(block | {"block_scale": True}, **fields)
    plain = architecture(block, **fields)
    one, other = with_factor.build(seed=1), plain.build(seed=1)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    scaled, raw = one.blocks[0], other.blocks[0]
    assert torch.equal(scaled(x), raw(x)), "the factor is 1 at first"
    scaled.scale.data.fill_(0.25)
    y = scaled(x)
    torch.testing.assert_close(y, 0.25 * raw(x))
    y.sum().backward()
    torch.testing.assert_close(scaled.scale.grad, raw(x).sum().unsqueeze(0), rtol=1e-4, atol=1e-4)
    assert with_factor.cost(9).params == plain.cost(9).params + 1
    assert with_factor.cost(9).flops_per_token == plain.cost(9).flops_per_token
    assert with_factor.fingerprint != plain.fingerprint


def test_a_factor_between_two_half_blocks_keeps_them_apart() -> None:
    scaled = {"block_scale": True}
    whole = architecture({"mixer": MIXER, "ffn": DENSE, **scaled})
    late = architecture({"mixer": MIXER}, {"ffn": DENSE, **scaled})
    between = architecture({"mixer": MIXER, **scaled}, {"ffn": DENSE})
    assert late.fingerprint == whole.fingerprint
    assert between.fingerprint != whole.fingerprint
    assert len(between.canonical().layers) == 2


def test_a_pattern_has_no_factor() -> None:
    with pytest.raises(SpaceError, match="block_scale: a pattern has none"):
        architecture({"blocks": [{"mixer": MIXER}], "block_scale": True})
