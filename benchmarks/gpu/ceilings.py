"""What the card and torch give at best: copies, products, launches, and kernels of attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.card import DEVICE, GPU, captured, milliseconds, seconds, sized, synchronize
from gpu.report import Report

KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""torch's `sdp::SDPBackend`."""


def measure(report: Report) -> None:
    """Measure the ceilings first: later figures are read beside them."""
    with report.part("copy"):
        copy(report)
    with report.part("products"):
        products(report)
    with report.part("launches"):
        launches(report)
    with report.part("attention"):
        attention(report)


def copy(report: Report) -> None:
    """Copy 1 GiB of random numbers, bytes read and written counted."""
    a = torch.empty(sized(2**29, 2**16), dtype=torch.int16, device=DEVICE).random_()
    b = torch.empty_like(a)
    took = milliseconds(lambda: b.copy_(a))
    report.figure("copy", 2 * a.numel() * a.element_size() / took / 1e9, "TB/s")


def products(report: Report) -> None:
    """Multiply in bfloat16: one large square, and the shapes of models at 16k tokens."""
    large = sized(8192, 64)
    shapes = [(large, large, large), (16384, 512, 512), (16384, 1536, 512), (16384, 1024, 1024)]
    for i, (m, n, k) in enumerate(shapes):
        m, n, k = sized((m, n, k), (64, 32, 32))
        x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
        y = torch.randn(k, n, device=DEVICE, dtype=torch.bfloat16)
        took = milliseconds(lambda x=x, y=y: x @ y)  # type: ignore[misc]
        name = "product of 8192" if i == 0 else "product {} x {} x {}".format(*shapes[i])
        report.figure(name, 2 * m * n * k / took / 1e9, "TFLOP/s", f"{1e3 * took:.1f} us")


def launches(report: Report) -> None:
    """Launch many small kernels: on the host, to their end, and as the nodes of a graph."""
    count = sized(2000, 50)
    x = torch.zeros(1, device=DEVICE)

    def some(n: int) -> None:
        for _ in range(n):
            x.add_(1)

    some(count // 10)
    synchronize()
    began = time.perf_counter()
    some(count)
    queued = time.perf_counter() - began
    synchronize()
    done = time.perf_counter() - began
    report.figure("launch", 1e6 * queued / count, "us", f"{1e6 * done / count:.2f} us to the end")
    nodes = sized(500, 10)
    replay: Callable[[], None] = captured(lambda: some(nodes))[0] if GPU else lambda: some(nodes)
    report.figure("graph node", 1e3 * milliseconds(replay) / nodes, "us")


@dataclass(frozen=True)
class Attention:
    """One call of attention: (B, H, S, D) queries, and keys of H or fewer heads."""

    name: str
    heads: int
    dtype: torch.dtype
    masked: bool = False


CALLS = (
    Attention("causal, 2 of 8 heads, bfloat16", 2, torch.bfloat16),
    Attention("causal, 8 heads, bfloat16", 8, torch.bfloat16),
    Attention("mask, 2 of 8 heads, bfloat16", 2, torch.bfloat16, masked=True),
    Attention("mask, 8 heads, bfloat16", 8, torch.bfloat16, masked=True),
    Attention("causal, 2 of 8 heads, float32", 2, torch.float32),
    Attention("causal, 8 heads, float32", 8, torch.float32),
)


def attention(report: Report) -> None:
    """Say which kernel torch takes for a call, and what first and later calls take."""
    batch, length = sized((16, 1024), (1, 16))
    for call in CALLS:
        with report.part(f"attention: {call.name}"):
            shape = (batch, 8, length, 64)
            q, k, v = (
                torch.randn(shape[0], heads, *shape[2:], device=DEVICE, dtype=call.dtype)
                for heads in (8, call.heads, call.heads)
            )
            leaves = [x.requires_grad_() for x in (q, k, v)]
            mask = None
            if call.masked:
                mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
            report.figure(f"kernel: {call.name}", chosen(q, k, v, mask))
            work = step_of(leaves, mask)
            first, _ = seconds(work)
            took = milliseconds(work, 10, 2)
            report.figure(f"attention: {call.name}", took, "ms", f"first call {1e3 * first:.0f} ms")


def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Return the kernel that torch takes."""
    number = torch._fused_sdp_choice(
        q, k, v, mask, 0.0, mask is None, scale=None, enable_gqa=k.shape[1] != q.shape[1]
    )
    return KERNELS.get(number, str(number))


def step_of(leaves: list[Tensor], mask: Tensor | None) -> Callable[[], object]:
    """Return a call forward and backward."""
    q, k, v = leaves
    grouped = k.shape[1] != q.shape[1]

    def work() -> object:
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=grouped
        )
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return work
