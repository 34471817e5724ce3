"""Temperatures of late positions: their factors in closed form, and decoding with a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moenas.model.architecture import Architecture
from moenas.model.mixers.temperature import PositionTemperature
from moenas.records import Plain

LATENT: Plain = {"kind": "latent_attention", "n_heads": 2, "kv_rank": 6, "nope_dim": 8}
LATENT |= {"rope_dim": 4, "v_dim": 8, "floor_scale": 3, "attn_scale": 0.5}
POWER: Plain = {"kind": "attention", "head_dim": 8, "floor_scale": 3, "attn_scale": 0.5}
POWER |= {"scale_growth": "power", "output_gate": "head", "gate_activation": "softplus"}


@pytest.mark.parametrize("offset", [0, 1])
def test_the_factor_of_a_position_is_that_of_the_formula(offset: int) -> None:
    logarithm = PositionTemperature(3, 0.5, offset)
    power = PositionTemperature(3, 0.5, offset, "power")
    for position in range(12):
        q = torch.ones(1, 1, 1, 1)
        steps = (position + offset) // 3
        assert logarithm(q, position).item() == pytest.approx(1 + 0.5 * math.log(1 + steps))
        wanted = (1 + (position + offset) / 3) ** 0.5
        assert power(q, position).item() == pytest.approx(wanted)


@pytest.mark.parametrize("mixer", [LATENT, LATENT | {"floor_offset": 0}, POWER])
@torch.no_grad()
def test_tokens_with_a_cache_have_the_logits_of_the_whole_text(mixer: dict[str, Any]) -> None:
    plain = {"vocab_size": 40, "d_model": 16, "blocks": [{"mixer": mixer}] * 2}
    model = Architecture.parse(plain).build(seed=1).eval()
    tokens = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(2, 11)
    steps = [model(part, cache) for part in (tokens[:, :4], *tokens[:, 4:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=1e-4, atol=1e-5)
