"""Training steps of whole models: eager and captured, and whether the host ever waits."""

from __future__ import annotations

import torch

from gpu.card import GPU, PEAK, kernels, peak_gib, reads_nothing, release, sized
from gpu.models import D256, D256_SMALL, D512, D1024, Shape, recipe
from gpu.report import Report
from gpu.training import capture, milliseconds_a_step, opened, warm_up

SHORT, LONG = 128, 1024
"""Tokens of a sequence; 16 sequences make a step of 2k or 16k tokens."""
CASES = (
    (D512, LONG),
    (D256, SHORT),
    (D256, LONG),
    (D512, SHORT),
    (D1024, LONG),
    (D256_SMALL, SHORT),
)
PROFILED = CASES[:2]


def measure(report: Report) -> None:
    """Measure each model at each length."""
    for shape, context in CASES:
        name = f"{shape.name}, {16 * context // 1024}k tokens"
        with report.part(name):
            one_case(report, name, shape, context)
        release()


def one_case(report: Report, name: str, shape: Shape, context: int) -> None:
    """Time eager steps, look for waits of the host, then time replays of a captured step."""
    run = recipe(sized(60, 12), context)
    useful = 3 * shape.architecture().cost(run.context).flops_per_token * run.batch * run.context
    torch.manual_seed(0)
    peak_gib()
    with opened(shape.build(), run) as steps:
        warm_up(steps)
        report.figure(f"{name}: host never waits", reads_nothing(steps.step))
        eager = milliseconds_a_step(steps, sized(8, 1))
        tell(report, f"{name}: eager", eager, useful)
        report.figure(f"{name}: peak", peak_gib(), "GiB")
        if GPU and (shape, context) in PROFILED:
            for line in kernels(steps.step):
                report.note(line)
        report.figure(f"{name}: capture", capture(steps), "s")
        steps.step()
        graph = milliseconds_a_step(steps, sized(20, 1))
        tell(report, f"{name}: graph", graph, useful)
        report.figure(f"{name}: graph over eager", graph / eager)
        report.figure(f"{name}: MFU", 100 * useful / PEAK / graph * 1e3, "%", "captured")
        report.figure(f"{name}: peak with a graph", peak_gib(), "GiB")


def tell(report: Report, name: str, took: float, useful: float) -> None:
    """Report the time of a step, with its share of the rate of a large product."""
    report.figure(name, took, "ms", f"{100 * useful / PEAK / took * 1e3:.1f} % MFU")
