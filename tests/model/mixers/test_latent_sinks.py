"""Sinks of latent attention: explicit sums in float64, counts, decoding, and an indexer beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moenas.evaluate.flops import count_flops
from moenas.model import LatentAttentionMixer
from moenas.model.architecture import Architecture
from moenas.model.mixers.token_indexer import TokenIndexer
from moenas.records import Plain

D_MODEL, HEADS, NOPE, ROPE = 16, 3, 8, 4
SIZES: Plain = {"kind": "latent_attention", "n_heads": HEADS, "q_rank": 6, "kv_rank": 5}
SIZES |= {"nope_dim": NOPE, "rope_dim": ROPE, "v_dim": 8, "sinks": True}
NO_POSITION: Plain = {"rope": {"partial_rotary_factor": 0}}


def architecture(**fields: object) -> Architecture:
    block = {"mixer": SIZES | fields, "ffn": {"kind": "dense", "d_ff": 16}}
    return Architecture.parse({"vocab_size": 40, "d_model": D_MODEL, "blocks": [block]})


def mixer_of(**fields: object) -> Any:
    mixer: Any = architecture(**fields).blocks[0].mixer
    assert isinstance(mixer, LatentAttentionMixer)
    built: Any = mixer.build(D_MODEL).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return built


def textbook(attention: Any, x: Tensor) -> Tensor:
    """Map (B, S, D) in float64 without positions: section 2.1 of DeepSeek-V2, with a sink a head."""
    x = x.double()

    def projected(module: Any, width: int) -> Tensor:
        down = (x @ module.down.weight.double().T)[..., : module.norm.weight.numel()]
        latent = down / (down.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        up = (latent * module.norm.weight.double()) @ module.up.weight.double().T
        return up.unflatten(-1, (HEADS, width)).transpose(1, 2)

    q = projected(attention.query, NOPE + ROPE)
    k, v = projected(attention.keys, NOPE + 8).split((NOPE, 8), dim=-1)
    shared = (x @ attention.keys.down.weight.double().T)[..., -ROPE:].unsqueeze(1)
    k = torch.cat((k, shared.expand(-1, HEADS, -1, -1)), dim=-1)
    weights = (q @ k.mT * (NOPE + ROPE) ** -0.5).exp().tril()
    sinks = attention.attend.sinks.double().exp().view(1, HEADS, 1, 1)
    y = (weights / (weights.sum(-1, keepdim=True) + sinks)) @ v
    return y.transpose(1, 2).flatten(-2) @ attention.out.weight.double().T


def test_a_sink_takes_its_share_of_the_weights_of_its_head() -> None:
    attention = mixer_of(**NO_POSITION)
    x = torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(2)).requires_grad_()
    leaves = [attention.attend.sinks, attention.keys.up.weight, x]
    y, wanted = attention(x), textbook(attention, x)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    oracle = torch.autograd.grad(wanted.square().sum(), leaves)
    for one, other in zip(gradients, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"v_dim": 16}, {"window": 5}, {"scale": 0.0}], ids=str)
def test_parameters_and_operations_of_sinks_are_foreseen(fields: Plain) -> None:
    with_sinks, without = architecture(**fields), architecture(**fields, sinks=False)
    assert with_sinks.cost(16).params - without.cost(16).params == HEADS
    model = with_sinks.build()
    assert sum(p.numel() for p in model.parameters()) == with_sinks.cost(16).params
    for length in (1, 16):
        counted = count_flops(model, torch.zeros(1, length, dtype=torch.int64))
        assert 2 * counted.macs == with_sinks.pass_flops(length)


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1]], ids=str)
@pytest.mark.parametrize("fields", [{}, {"window": 3}], ids=["all", "window"])
@torch.no_grad()
def test_a_cache_continues_where_it_stopped(steps: list[int], fields: Plain) -> None:
    attention = mixer_of(**fields)
    x = torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(2))
    cache = attention.new_cache(2, 9)
    pieces = [attention(piece, cache) for piece in x.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x), rtol=0, atol=1e-5)


def test_the_target_of_an_indexer_leaves_out_the_sinks() -> None:
    """Each head gives its sink a part; the sum of the heads over the tokens is divided by its sum."""
    attention = mixer_of(
        **NO_POSITION, indexer=TokenIndexer(n_heads=2, head_dim=8, top_k=4).plain()
    )
    q, k = (
        torch.randn(1, HEADS, 6, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    chosen = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    weights = (q.double() @ k.double().mT * 12**-0.5).exp().tril()
    shares = weights.sum(-1, keepdim=True) + attention.attend.sinks.double().exp().view(1, -1, 1, 1)
    summed = (weights / shares).sum(dim=1)
    target = attention.attend.mean_weights(q, k, 0, chosen)
    wanted = summed / summed.sum(-1, keepdim=True)
    torch.testing.assert_close(target.double(), wanted, rtol=1e-5, atol=1e-6)
