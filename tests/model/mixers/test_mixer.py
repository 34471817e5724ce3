"""Attention against the textbook: explicit sums in float64, one query after another."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moenas.evaluate.flops import count_flops
from moenas.grammar import tree
from moenas.model import Attention, AttentionMixer, LatentAttentionMixer, Mixer, Rope, Rotary
from moenas.model.architecture import Architecture
from moenas.model.mixers.qkv import QKV
from moenas.records import Plain

D_MODEL = 32


def build(seed: int = 0, **fields: object) -> Attention:
    attention = AttentionMixer(**{"head_dim": 8, **fields}).build(D_MODEL)
    assert isinstance(attention, Attention)
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return attention


def turned(vector: list[float], position: int, theta: float) -> list[float]:
    """RoFormer with complex numbers: pair i is the number vector[i] + j vector[i + C/2]."""
    half = len(vector) // 2
    pairs = [complex(vector[i], vector[i + half]) for i in range(half)]
    out = [z * cmath.exp(1j * position * theta ** (-i / half)) for i, z in enumerate(pairs)]
    return [z.real for z in out] + [z.imag for z in out]


def normed(vector: list[float], weight: Tensor | None) -> list[float]:
    if weight is None:
        return vector
    rms = math.sqrt(sum(v * v for v in vector) / len(vector) + 1e-6)
    return [v / rms * w for v, w in zip(vector, weight.tolist(), strict=True)]


def projected(qkv: Any, x: Tensor) -> Tensor:
    """All queries, all keys and all values of (S, D), in float64."""
    if isinstance(qkv, QKV):
        return x @ qkv.weight.double().T
    down = x @ qkv.query.down.weight.double().T
    latent = down / (down.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    latent = latent * qkv.query.norm.weight.double()
    queries = latent @ qkv.query.up.weight.double().T
    return torch.cat((queries, x @ qkv.keys.weight.double().T), dim=-1)


def textbook(attention: Attention, x: Tensor) -> Tensor:
    """One sequence (S, D), in float64, without any batching."""
    width, theta = attention.qkv.widths[0], attention.rotary.theta
    heads, kv_heads = attention.qkv.counts
    rows = projected(attention.qkv, x.double()).view(len(x), -1, width).tolist()
    q_weight = None if attention.norm is None else attention.norm.q.weight
    k_weight = None if attention.norm is None else attention.norm.k.weight
    out = torch.zeros(len(x), heads * width, dtype=torch.float64)
    for now in range(len(x)):
        for head in range(heads):
            query = turned(normed(rows[now][head], q_weight), now, theta)
            shared = heads + head // (heads // kv_heads)
            scores = []
            for then in range(now + 1):
                key = turned(normed(rows[then][shared], k_weight), then, theta)
                dot = sum(a * b for a, b in zip(query, key, strict=True))
                scores.append(math.exp(dot / math.sqrt(width)))
            for then, score in enumerate(scores):
                value = torch.tensor(rows[then][shared + kv_heads], dtype=torch.float64)
                out[now, head * width : (head + 1) * width] += score / sum(scores) * value
    return out @ attention.out.weight.double().T


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "rope": Rope(theta=50.0)},
        {"n_heads": 3, "n_kv_heads": 1, "head_dim": 16},
        {"n_kv_heads": 2, "qk_norm": "head"},
        {"n_kv_heads": 1, "q_rank": 5},
    ],
    ids=["multi-head", "grouped", "multi-query", "own width", "normed", "low rank"],
)
def test_attention_is_the_textbook_formula(fields: dict[str, object], training: bool) -> None:
    attention = build(**fields)
    x = torch.randn(2, 7, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(training):
        y = attention(x)
    for sequence, output in zip(x, y, strict=True):
        torch.testing.assert_close(
            output.double(), textbook(attention, sequence), rtol=1e-5, atol=1e-5
        )


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    rotary = Rotary(16, 100.0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = [(rotary(q, start + 5) * rotary(k, start)).sum().item() for start in (0, 3, 90)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1], [9]], ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_a_cache_continues_where_it_stopped(steps: list[int], n_kv_heads: int) -> None:
    attention = build(n_kv_heads=n_kv_heads)
    x = torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(2))
    cache = attention.new_cache(2, 9)
    pieces = [attention(piece, cache) for piece in x.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x), rtol=0, atol=1e-5)
    assert cache.length == 9


@pytest.mark.parametrize(
    "part",
    [
        AttentionMixer(head_dim=8),
        LatentAttentionMixer(n_heads=2, kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8),
    ],
    ids=["attention", "latent"],
)
def test_a_cache_refuses_what_it_has_no_room_for(part: Any) -> None:
    module = part.build(D_MODEL).eval()
    for parameter in module.parameters():
        parameter.data.fill_(0.1)
    cache = module.new_cache(2, 4)
    module(torch.ones(2, 3, D_MODEL), cache)
    with pytest.raises(ValueError, match=r"5 tokens; the cache was made for 4"):
        module(torch.ones(2, 2, D_MODEL), cache)
    with pytest.raises(ValueError, match=r"1 sequences; the cache was made for 2"):
        module(torch.ones(1, 1, D_MODEL), cache)
    assert cache.length == 3


@pytest.mark.parametrize("kind", ["lightning_attention", "gated_delta", "mamba", "short_conv"])
def test_a_state_is_not_repeated_for_more_sequences(kind: str) -> None:
    sizes: Plain = {
        "lightning_attention": {"n_heads": 2, "head_dim": 8},
        "gated_delta": {"n_heads": 2, "key_dim": 8, "value_dim": 8},
        "mamba": {"d_inner": 8, "d_state": 2},
        "short_conv": {},
    }
    module: Any = tree.parse(Mixer, {"kind": kind} | sizes[kind]).build(D_MODEL).eval()
    for parameter in module.parameters():
        parameter.data.fill_(0.1)
    cache = module.new_cache(1, 8)
    module(torch.ones(1, 3, D_MODEL), cache)
    with pytest.raises((ValueError, RuntimeError)):
        module(torch.ones(2, 3, D_MODEL), cache)


@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 1}, {"window": 3}])
def test_a_scale_of_zero_averages_the_values(fields: dict[str, Any]) -> None:
    attention = build(scale=0.0, **fields)
    attend = attention.attend
    generator = torch.Generator().manual_seed(4)
    sizes = (4, attention.qkv.n_kv_heads, attention.qkv.n_kv_heads)
    q, k, v = (torch.randn(2, n, 9, 8, generator=generator) for n in sizes)
    y = attend(q, k, v, 0)
    seen = attend.reach.seen(0, 9, 0, q.device).double()
    weights = seen / seen.sum(-1, keepdim=True)
    values = v.double().repeat_interleave(4 // v.shape[1], dim=1)
    torch.testing.assert_close(y.double(), weights @ values, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 1, "window": 3},
        {"n_kv_heads": 2, "v_head_dim": 16, "chunk": 4},
        {"scale": 0.0},
        {"softcap": 2.0},
    ],
    ids=["multi-head", "window", "wider values", "no scores", "soft cap"],
)
def test_a_sink_takes_its_share_of_the_softmax(fields: dict[str, Any], training: bool) -> None:
    """Explicit sums in float64, and the gradient of the sinks and of all that they compete with."""
    attention = build(sinks=True, **fields)
    attend = attention.attend
    sinks = attend.sinks
    generator = torch.Generator().manual_seed(4)
    sizes = (4, 8), (attention.qkv.n_kv_heads, 8), (attention.qkv.n_kv_heads, attention.qkv.v_dim)
    q, k, v = (torch.randn(2, n, 9, c, generator=generator).requires_grad_() for n, c in sizes)
    k64, v64 = (x.double().repeat_interleave(4 // x.shape[1], dim=1) for x in (k, v))
    scores = q.double() @ k64.mT * attend.scale
    if attend.softcap is not None:
        scores = (scores / attend.softcap).tanh() * attend.softcap
    weights = torch.where(attend.reach.seen(0, 9, 0, q.device), scores.exp(), 0.0)
    shares = weights / (weights.sum(-1, keepdim=True) + sinks.double().exp().view(1, -1, 1, 1))
    wanted = shares @ v64
    with torch.set_grad_enabled(training):
        output = attend(q, k, v, 0)
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-5)
    if training:
        inputs = (sinks, q, k, v)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        oracle = torch.autograd.grad(wanted.square().sum(), inputs)
        for one, other in zip(gradients, oracle, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "surplus"),
    [
        ({}, 2 * 4 * 16 * (17 * 32 - 16 * 16)),
        ({"v_head_dim": 24}, 2 * 4 * 16 * (17 * 40 - 16 * 32)),
        ({"softcap": 3.0}, 0),
        ({"sinks": False}, 0),
    ],
    ids=["as wide", "wider values", "soft cap", "none"],
)
def test_the_operations_of_a_sink_are_foreseen(fields: Plain, surplus: int) -> None:
    """Of 16 tokens, by pencil and paper: keys 8 elements wider and one more of them."""
    mixer: Plain = {"kind": "attention", "head_dim": 8, "sinks": True, **fields}
    one = Architecture.parse({"vocab_size": 9, "d_model": D_MODEL, "blocks": [{"mixer": mixer}]})
    assert one.pass_flops(16) == 16 * one.cost(16).flops_per_token + surplus
    counted = count_flops(one.build(), torch.zeros(1, 16, dtype=torch.int64))
    assert 2 * counted.macs == one.pass_flops(16)


def test_a_sink_is_as_exact_as_its_number_in_bfloat16() -> None:
    """A sink over a scale that bfloat16 rounds: two numbers carry it."""
    attend = build(sinks=True, scale=0.3).attend
    attend.sinks.data = torch.tensor([20.3, -2.77, 0.41, 10.17])
    q, k = torch.zeros(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    with torch.no_grad():
        output = attend(q.bfloat16(), k.bfloat16(), torch.ones_like(k).bfloat16(), 0)
    seen = torch.arange(1, 7)
    wanted = seen / (seen + attend.sinks.exp().unsqueeze(-1))
    torch.testing.assert_close(output[0, ..., 0].float(), wanted, rtol=1e-2, atol=0)


def test_bfloat16_agrees_with_float32_in_value_and_gradient() -> None:
    attention = build()
    x = torch.randn(2, 16, D_MODEL, generator=torch.Generator().manual_seed(3))
    outputs, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        attention.zero_grad()
        y = attention(x.to(dtype))
        assert y.dtype == dtype
        y.float().square().mean().backward()
        assert attention.qkv.weight.grad is not None
        outputs.append(y.float())
        gradients.append(attention.qkv.weight.grad.clone())
    for full, half in (outputs, gradients):
        assert (full - half).norm() < 0.02 * full.norm()


def test_heads_that_do_not_fit_are_refused() -> None:
    assert AttentionMixer(head_dim=16).invalid_at(64) is None
    assert AttentionMixer(head_dim=48, n_heads=2).invalid_at(64) is None
    reason = AttentionMixer(head_dim=48).invalid_at(64)
    assert reason == "head_dim (48) must divide d_model (64); or give n_heads"
    reason = AttentionMixer(head_dim=8, n_kv_heads=3).invalid_at(64)
    assert reason == "n_kv_heads (3) must divide n_heads (8)"
