"""Chunked recurrences against the formulas of the papers, token after token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moenas.model.mixers.scan import (
    chunk_length,
    delta_rule,
    padded,
    scan_channels,
    scan_heads,
)

LENGTHS = [1, 2, 7, 64, 67, 100, 160]
"""Within a chunk, a prime above it (the last chunk is filled up), and several whole chunks."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pieces(length: int) -> list[int]:
    """A first call and one that goes on from its state."""
    return [length - length // 3, length // 3] if length > 2 else [length]


def agrees(tensor: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(tensor.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_heads_with_one_decay_each_follow_the_recurrence(length: int) -> None:
    batch, heads, groups, width, states = 2, 4, 2, 3, 5
    x, b = numbers(batch, length, heads, width), numbers(batch, length, groups, states, seed=1)
    c, steps = numbers(batch, length, groups, states, seed=2), -numbers(batch, length, heads).abs()
    h, wanted = torch.zeros(batch, heads, states, width, dtype=torch.float64), []
    for t in range(length):
        into, read = (m[:, t].repeat_interleave(heads // groups, dim=1) for m in (b, c))
        h = h * steps[:, t].exp()[..., None, None] + into.unsqueeze(-1) * x[:, t].unsqueeze(-2)
        wanted.append((h * read.unsqueeze(-1)).sum(dim=-2))
    outputs, state = [], None
    parts = [m.float().split(pieces(length), dim=1) for m in (x, steps, b, c)]
    for piece in zip(*parts, strict=True):
        y, state = scan_heads(*piece, state)
        outputs.append(y)
    agrees(torch.cat(outputs, dim=1), torch.stack(wanted, dim=1))
    assert state is not None
    agrees(state.flatten(1, 2), h)


@pytest.mark.parametrize("length", LENGTHS)
def test_channels_with_a_decay_for_each_state_follow_the_recurrence(length: int) -> None:
    batch, channels, states = 2, 3, 4
    x, b = numbers(batch, length, channels), numbers(batch, length, states, seed=1)
    dt, rates = numbers(batch, length, channels, seed=2).abs(), -numbers(channels, states).abs()
    h, wanted = torch.zeros(batch, channels, states, dtype=torch.float64), []
    for t in range(length):
        step = dt[:, t].unsqueeze(-1)
        h = h * (step * rates).exp() + step * x[:, t].unsqueeze(-1) * b[:, t].unsqueeze(-2)
        wanted.append(h)
    outputs, state = [], None
    for now, step, into in zip(
        *(m.float().split(pieces(length), 1) for m in (x, dt, b)), strict=True
    ):
        y, state = scan_channels(now, rates.float(), step, into, state)
        outputs.append(y)
    agrees(torch.cat(outputs, dim=1), torch.stack(wanted, dim=1))
    assert state is not None
    agrees(state, h)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("alike", [False, True], ids=["free keys", "equal keys"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_delta_rule_decays_corrects_and_reads(length: int, alike: bool, decay: str) -> None:
    """Equal keys and beta near 1 make the triangular system as large as it can be."""
    batch, heads, keys, values = 2, 2, 4, 3
    q, k = numbers(batch, length, heads, keys), numbers(batch, length, heads, keys, seed=1)
    k = k[:, :1].expand_as(k) if alike else k
    k = k / k.norm(dim=-1, keepdim=True)
    v, shape = numbers(batch, length, heads, values), (batch, length, heads)
    steps = -numbers(*shape, keys if decay == "channel" else 1).abs() / 10
    beta = torch.sigmoid(numbers(batch, length, heads, seed=3) + (5 if alike else 0))
    s, wanted = torch.zeros(batch, heads, keys, values, dtype=torch.float64), []
    for t in range(length):
        key, rate = k[:, t].unsqueeze(-1), beta[:, t, :, None, None]
        s = s * steps[:, t].exp().unsqueeze(-1)
        s = s - rate * key * (key * s).sum(dim=-2, keepdim=True)
        s = s + rate * key * v[:, t].unsqueeze(-2)
        wanted.append((s * q[:, t].unsqueeze(-1)).sum(dim=-2))
    outputs, state = [], None
    steps = steps if decay == "channel" else steps.squeeze(-1)
    parts = [m.float().split(pieces(length), dim=1) for m in (q, k, v, steps, beta)]
    for q_now, k_now, v_now, step, rate in zip(*parts, strict=True):
        y, state = delta_rule((q_now, k_now, v_now), step, rate, state)
        outputs.append(y)
    agrees(torch.cat(outputs, dim=1), torch.stack(wanted, dim=1))
    assert state is not None
    agrees(state, s)


def test_long_decays_of_channels_leave_gradients_finite() -> None:
    steps = torch.full((1, 40, 2, 4), -50.0, requires_grad=True)
    x, beta = torch.ones(1, 40, 2, 4), torch.full((1, 40, 2), 0.5)
    y, _ = delta_rule((x, x / 2, x), steps, beta, None)
    y.sum().backward()
    assert steps.grad is not None
    assert steps.grad.isfinite().all()


def test_long_decays_leave_gradients_finite() -> None:
    steps = torch.full((1, 128, 2), -50.0, requires_grad=True)
    x, b = torch.ones(1, 128, 2, 3), torch.ones(1, 128, 1, 4)
    y, _ = scan_heads(x, steps, b, b, None)
    y.sum().backward()
    assert steps.grad is not None
    assert steps.grad.isfinite().all()


def test_chunks_divide_the_length_where_they_can() -> None:
    assert [chunk_length(n) for n in (1, 63, 64, 100, 128, 1000)] == [1, 63, 64, 50, 64, 50]
    assert (chunk_length(67), padded(67)) == (64, 128)
    assert all(padded(n) % chunk_length(n) == 0 and padded(n) >= n for n in range(1, 500))
