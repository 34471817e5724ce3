"""A training step of an MoE layer over a step of a dense layer of the same active FLOPs.

Times are of replayed CUDA graphs, as moenas trains. `launched` beside them are times of steps that
the host launches kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from torch import Tensor, nn

from gpu.card import DEVICE, GPU, PEAK, captured, kernels, milliseconds, release, sized
from gpu.report import Report
from moenas.model import DenseFFN, MoE, MoEFFN, Router

SHAPES = ((512, 16, 2, 512), (512, 64, 8, 128), (1024, 64, 8, 256), (256, 16, 2, 256))
"""Model width, experts, experts of a token, width of an expert."""
THEIRS = ("grouped_mm", "eager")
"""Implementations of transformers, with the same weights, all in bfloat16."""
WAITS = "eager"
"""The implementation that reads on the host which experts have tokens."""


def measure(report: Report) -> None:
    """Time all layers of each shape at 16k tokens."""
    for shape in SHAPES:
        d, experts, k, width = shape
        name = f"d{d} E{experts}k{k} f{width}"
        with report.part(name):
            one_shape(report, name, sized(shape, (64, 4, 2, 32)), shape == SHAPES[1])
        release()


def one_shape(report: Report, name: str, shape: tuple[int, int, int, int], profiled: bool) -> None:
    """Time the layers of one shape; one that fails leaves out its ratio."""
    d, _, k, width = shape
    count = sized(16384, 64)
    x = torch.randn(1, count, d, device=DEVICE, dtype=torch.bfloat16)
    layers = layers_of(report, shape)
    times: dict[str, float] = {}
    for which, layer in layers.items():
        with report.part(f"{name}: {which}"):
            launched, times[which] = both_times(step_of(layer, x), which != WAITS)
            report.figure(f"{name}: {which} launched", launched, "ms")
    dense = times["dense"]
    share = 6 * count * 3 * d * k * width / dense / 1e-3 / PEAK
    report.figure(f"{name}: dense", dense, "ms", f"{share:.0%} of the rate of a large product")
    ratios = {
        "moenas": "over dense",
        "grouped_mm": "grouped_mm over dense",
        "eager": "eager over dense",
    }
    for which, words in ratios.items():
        if which in times:
            report.figure(f"{name}: {words}", times[which] / dense, "", f"{times[which]:.3f} ms")
    if "grouped_mm" in times:
        report.figure(f"{name}: over grouped_mm", times["moenas"] / times["grouped_mm"])
    if GPU and profiled:
        for line in kernels(step_of(layers["moenas"], x)):
            report.note(line)


def both_times(step: Callable[[], None], capturable: bool) -> tuple[float, float]:
    """Return the milliseconds of a step that the host launches, and of its replay from a graph.

    A step that is not `capturable` has the first time for both. Its capture is not tried, because
    a failed capture leaves torch's random generator unusable.
    """
    if not GPU:
        return (milliseconds(step),) * 2
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launched = milliseconds(step, 15, 3)
    if not capturable:
        return launched, launched
    replay, _ = captured(step, stream=stream)
    return launched, milliseconds(replay, 15, 3)


def layers_of(report: Report, shape: tuple[int, int, int, int]) -> dict[str, nn.Module]:
    """Build the layers with equal weights where they have the same."""
    d, experts, k, width = shape
    router = Router(top_k=k, normalize=True)
    moe = peers.filled(MoEFFN(n_experts=experts, d_expert=width, router=router).build(d)).to(DEVICE)
    assert isinstance(moe, MoE)
    layers: dict[str, nn.Module] = {
        "dense": peers.filled(DenseFFN(d_ff=k * width).build(d)).to(DEVICE),
        "moenas": moe,
    }
    for implementation in THEIRS:
        with report.part(f"transformers {implementation}"):
            layers[implementation] = peers.block_of(moe, implementation, torch.bfloat16)
    return layers


def step_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a step forward and backward, from empty gradients."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        y = y[0] if isinstance(y, tuple) else y
        if isinstance(layer, MoE):
            torch.autograd.backward((y, layer.auxiliary_loss()), (torch.ones_like(y), None))
            layer.after_step()
        else:
            y.backward(torch.ones_like(y))

    return step
