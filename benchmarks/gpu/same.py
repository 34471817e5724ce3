"""Whether a captured run is the eager run, and whether equal runs give equal bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu.card import GPU, release, sized
from gpu.models import Shape, corpus, recipe
from gpu.report import Report
from gpu.training import capture, opened, warm_up
from moenas.evaluate.training import train

SHAPE = Shape(128, 2, 8, 2, 64)
ROUTERS: dict[str, dict[str, Any]] = {
    "auxiliary loss": {},
    "bias": {"balance": "bias", "score": "sigmoid"},
    "capacity": {"capacity_factor": 1.0},
    "threshold": {"selection": "threshold"},
    "sinkhorn": {"selection": "sinkhorn", "top_k": 1, "allow_acausal": True},
    "expert choice": {"selection": "expert_choice", "allow_acausal": True},
}


def measure(report: Report) -> None:
    """Compare eager runs with each other and with captured ones, router by router."""
    for name, router in ROUTERS.items():
        with report.part(name):
            compare(report, name, router)
        release()
    with report.part("train"):
        whole_runs(report)


def compare(report: Report, name: str, router: dict[str, Any]) -> None:
    """Run four times: eager and captured, twice each; what is known is told before the next."""
    eager, again = run(router, False), run(router, False)
    noise = apart(eager, again)
    report.figure(f"{name}: two eager runs are bit-equal", noise == 0, "", f"apart {noise:.2g}")
    graph = run(router, True)
    gap = apart(eager, graph)
    losses = f"losses {eager[0]:.4f} {graph[0]:.4f}"
    text = f"weights apart {gap:.2g}, two eager runs {noise:.2g}, {losses}"
    within = gap <= 3 * noise and abs(eager[0] - graph[0]) <= 0.02
    report.figure(f"{name}: captured is eager", within, "", text)
    twice = apart(graph, run(router, True))
    report.figure(f"{name}: two captured runs are bit-equal", twice == 0, "", f"apart {twice:.2g}")


def run(router: dict[str, Any], graph: bool) -> tuple[float, dict[str, Tensor]]:
    """Train; return the mean loss of the second half of the steps, and the weights."""
    plan = recipe(sized(120, 6), 128, lr=2e-3)
    torch.manual_seed(0)
    model = SHAPE.build(0, **router)
    with opened(model, plan) as steps:
        warm_up(steps)
        if graph and GPU:
            capture(steps)
        while steps.done < plan.steps // 2:
            steps.step()
        steps.read()
        half = steps.done
        while steps.done < plan.steps:
            steps.step()
        loss = steps.read().loss / (plan.steps - half)
        return loss, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


def apart(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> float:
    """Return the largest distance between versions of a tensor, over its norm; 0: equal bits."""
    largest = 0.0
    for name, one in a[1].items():
        if not torch.equal(one, b[1][name]):
            gap = (one.double() - b[1][name].double()).norm() / one.double().norm().clamp_min(1e-20)
            largest = max(largest, float(gap), 1e-300)
    return largest


def whole_runs(report: Report) -> None:
    """Train twice as a study does, and compare curves and weights."""
    plan = recipe(sized(200, 8), 128, lr=2e-3)
    curves, states = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = SHAPE.build()
        curves.append(
            [(row["train_loss"], row["grad_norm"]) for row in train(model, corpus(), plan, 0)]
        )
        states.append({k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
    equal = curves[0] == curves[1] and apart((0.0, states[0]), (0.0, states[1])) == 0
    report.figure("two runs of train are bit-equal", equal, "", f"last loss {curves[0][-1][0]:.4f}")
