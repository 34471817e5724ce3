"""The product that experts are made of, torch's grouped_mm: right, fast, and right in a graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.card import DEVICE, GPU, captured, milliseconds, release, sized
from gpu.report import Report

SHAPES = ((16, 32768, 512, 1024), (64, 131072, 512, 256), (64, 131072, 1024, 512))
"""Experts, rows, width in, width out."""


def measure(report: Report) -> None:
    """Measure each shape; the second and the last expert get no row."""
    for shape in SHAPES:
        experts, rows, d, f = shape
        name = f"E{experts} {rows} x {d} x {f}"
        with report.part(name):
            one_shape(report, name, sized(shape, (4, 64, 16, 16)))
        release()


def one_shape(report: Report, name: str, shape: tuple[int, int, int, int]) -> None:
    """Compare values and gradients with float32, time them, and replay with other offsets."""
    experts, rows, d, f = shape
    x = torch.randn(rows, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(experts, d, f, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    ends = offsets(experts, rows)
    y = F.grouped_mm(x, w, offs=ends)
    g = torch.randn_like(y)
    worst = error(x, w, ends, y, g)
    report.figure(f"{name}: error", worst, "", "largest of values and gradients, over the norm")
    flops = 2 * rows * d * f
    forward = milliseconds(lambda: F.grouped_mm(x.detach(), w.detach(), offs=ends))
    both = milliseconds(lambda: torch.autograd.grad(F.grouped_mm(x, w, offs=ends), [x, w], g))
    report.figure(name, flops / forward / 1e9, "TFLOP/s", "forward")
    report.figure(f"{name}: with gradients", 3 * flops / both / 1e9, "TFLOP/s")
    rows_in, matrices = x.detach(), w.detach()
    report.figure(f"{name}: replay is right", replays(rows_in, matrices, ends))
    whole, wide = rows_in.float(), matrices.float()
    took = milliseconds(lambda: F.grouped_mm(whole, wide, offs=ends), 5, 2)
    report.figure(f"{name}: float32", flops / took / 1e9, "TFLOP/s", f"{took:.2f} ms")


def offsets(experts: int, rows: int) -> Tensor:
    """Return where the rows of each expert end, the second and the last without rows."""
    load = torch.rand(experts, generator=torch.Generator().manual_seed(0)) + 0.1
    load[1] = load[-1] = 0
    ends = (load.cumsum(0) / load.sum() * rows).round().int()
    ends[-2:] = rows
    return ends.to(DEVICE)


def error(x: Tensor, w: Tensor, ends: Tensor, y: Tensor, g: Tensor) -> float:
    """Return the largest error of an expert's values and gradients, over the norm of the right one.

    Of an expert without rows the gradient must be 0; its largest element counts.
    """
    gx, gw = torch.autograd.grad(y, [x, w], g)
    x, w, y = x.detach(), w.detach(), y.detach()
    start, worst = 0, 0.0
    for i, end in enumerate(ends.tolist()):
        if end == start:
            worst = max(worst, float(gw[i].abs().max()))
            continue
        a, b, up = x[start:end].float(), w[i].float(), g[start:end].float()
        pairs = ((y[start:end], a @ b), (gw[i], a.T @ up), (gx[start:end], up @ b.T))
        for actual, right in pairs:
            gap = float((actual.float() - right).norm() / right.norm())
            worst = max(worst, gap if gap == gap else float("inf"))
        start = end
    return worst


def replays(x: Tensor, w: Tensor, ends: Tensor) -> bool:
    """Whether a captured product gives the bits of an eager one, for other rows and offsets."""
    if not GPU:
        return True
    replay, result = captured(lambda: F.grouped_mm(x, w, offs=ends))
    experts, rows = len(w), len(x)
    ends.copy_(torch.linspace(rows / experts, rows, experts).round().int())
    x.normal_()
    replay()
    return torch.equal(result, F.grouped_mm(x, w, offs=ends))
