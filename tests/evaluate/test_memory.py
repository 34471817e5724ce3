"""The peak of live tensors, against torch's memory profiler."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from moenas.evaluate.memory import peak_bytes

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
FLOAT = 4
"""Bytes."""


def profiled_peak(work: Callable[[], object]) -> int:
    """The highest sum of what the CPU's allocator gave and took back, by the profiler."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        work()
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_what_lives_at_once_counts_and_views_count_once() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = first.view(10, 100).t() + 1  # 2 live
        third = second.reshape(-1) * 2  # 3 live, and the copy that reshape makes: 4
        del first, second
        third.view(10, 100)[1:] + 1  # 1 live, and 900 new

    assert peak_bytes(work, [], CPU) == 4 * 1000 * FLOAT


def test_held_tensors_count_from_the_start() -> None:
    weight = torch.zeros(50, 20)
    assert peak_bytes(lambda: None, [weight, weight.t(), weight[1:]], CPU) == 1000 * FLOAT
    assert peak_bytes(lambda: weight.add_(1), [weight], CPU) == 1000 * FLOAT
    assert peak_bytes(lambda: weight + 1, [weight], CPU) == 2000 * FLOAT


@pytest.mark.parametrize("width", [16, 48])
def test_a_training_step_takes_what_the_profiler_sees(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.RMSNorm(64), nn.Linear(64, width))
    experts = nn.Parameter(torch.randn(4, width, 32))
    weights = [*model.parameters(), experts]
    optimizer = torch.optim.AdamW(weights, fused=True)
    batch = torch.randn(32, width)
    ends = torch.tensor([8, 8, 20, 32], dtype=torch.int32)

    def step() -> None:
        x = model(batch)
        y = F.grouped_mm(x, experts, offs=ends)
        q = y.view(1, 2, 32, -1)
        z = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        (z.square().mean() + x.softmax(-1).amax()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state
    state = [v for s in optimizer.state.values() for v in s.values()]
    held = [*weights, *state, batch, ends]
    own = sum(t.numel() * t.element_size() for t in held)
    assert peak_bytes(step, held, CPU) == own + profiled_peak(step)


PEAKS = """
import torch
from moenas.model.architecture import Architecture
from moenas.data.loading import load
from moenas.evaluate.memory import peak_bytes
from moenas.space.sections import Recipe
from moenas.evaluate.training import train

device = torch.device("cuda", 0)
ffn = {"kind": "moe", "n_experts": 8, "d_expert": 64}
block = {"repeat": 2, "mixer": {"kind": "attention", "head_dim": 32}, "ffn": ffn}
one = Architecture.parse({"vocab_size": 256, "d_model": 128, "blocks": [block]})
recipe = Recipe(tokens=2 * 16 * 128, context=128, batch=16, lr=1e-3, dtype="bfloat16")
text = load({"kind": "pydoc"})
for turn in range(3):
    if turn == 2:
        torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
    model = one.build(device, 0)
    held = list(model.state_dict(keep_vars=True).values())
    steps = train(model, text, recipe, 0)
    print(peak_bytes(lambda: list(steps), held, device))
    del model, held, steps
"""


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_the_same_again_and_after_other_work() -> None:
    """In a process of its own, as what torch takes at its first product must not count."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [int(word) for word in done.stdout.split()]
    assert len(peaks) == 3
    assert max(peaks) <= 1.001 * min(peaks), peaks
