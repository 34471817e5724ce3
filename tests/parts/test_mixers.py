"""Attention against the textbook: explicit sums in float64, one query after another."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from moenas.parts import Attention, AttentionMixer, Rotary

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


def textbook(attention: Attention, x: Tensor) -> Tensor:
    """One sequence (S, D), in float64, without any batching."""
    width, theta = attention.qkv.head_dim, attention.rotary.theta
    heads, kv_heads = attention.qkv.n_heads, attention.qkv.n_kv_heads
    rows = (x.double() @ attention.qkv.weight.double().T).view(len(x), -1, width).tolist()
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
        {"n_kv_heads": 1, "rope_theta": 50.0},
        {"n_heads": 3, "n_kv_heads": 1, "head_dim": 16},
        {"n_kv_heads": 2, "qk_norm": "head"},
    ],
    ids=["multi-head", "grouped", "multi-query", "own width", "normed"],
)
def test_attention_is_the_textbook_formula(fields: dict[str, object], training: bool) -> None:
    attention = build(**fields)
    x = torch.randn(2, 7, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(training):
        y = attention(x)
    for sequence, found in zip(x, y, strict=True):
        torch.testing.assert_close(
            found.double(), textbook(attention, sequence), rtol=1e-5, atol=1e-5
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
