"""Memory of a candidate, and what building, the gate of causality, validation and weights take."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch

from gpu.card import DEVICE, GIB, GPU, MIB, milliseconds, release, seconds, sized, synchronize
from gpu.models import D256, D256_SMALL, D512, Shape, corpus, recipe, tokens
from gpu.report import Report
from gpu.training import capture, opened, warm_up
from moenas.evaluate import causality
from moenas.evaluate.memory import peak_bytes
from moenas.evaluate.subject import excerpts
from moenas.evaluate.training import train, validate
from moenas.model.architecture import Model

SELECTIONS: dict[str, dict[str, Any]] = {
    "base": {"top_k": 1, "selection": "base", "allow_acausal": True},
    "sinkhorn": {"top_k": 1, "selection": "sinkhorn", "allow_acausal": True},
    "threshold": {"selection": "threshold"},
}


def measure(report: Report) -> None:
    """Measure the peak first: nothing may have used the card before."""
    for name, work in {
        "peak": peaks, "growth": growth, "parts of a candidate": whole_candidate
    }.items():  # fmt: skip
        with report.part(name):
            work(report)
        release()
    for name, router in SELECTIONS.items():
        with report.part(f"selection {name}"):
            report.figure(f"selection {name}", step_ms(D256, router), "ms", "2 layers, 16k tokens")
        release()


def one_peak() -> float:
    """Return the peak of two steps in MiB, as the objective `peak_memory` measures it."""
    model = D256_SMALL.build()
    steps = train(model, corpus(), recipe(2, 128), 0)
    held = model.state_dict(keep_vars=True).values()
    return peak_bytes(lambda: list(steps), held, DEVICE) / MIB


def peaks(report: Report) -> None:
    """Measure a peak before the first product of the process, again, and after other work."""
    measured = []
    for turn in range(3):
        if turn == 2:
            products(torch.randn(512, 512, device=DEVICE))
        measured.append(one_peak())
        release()
    first, second, third = measured
    worst = max(measured) / min(measured) - 1
    report.figure("peak", first, "MiB", f"then {second:.2f}, after other work {third:.2f}")
    report.figure("peak: apart", 100 * worst, "%")


def products(x: torch.Tensor) -> None:
    """Multiply in both types, which makes cuBLAS take its workspaces."""
    for one in (x, x.bfloat16()):
        one @ one
    synchronize()


def growth(report: Report) -> None:
    """Take a hundred steps, captured and not; what lives after 10 and after all must be equal."""
    for graph in (False, True):
        with opened(D256_SMALL.build(), recipe(sized(110, 12), 128)) as steps:
            warm_up(steps)
            if graph:
                capture(steps)
            while steps.done < sized(10, 5):
                steps.step()
            synchronize()
            before = torch.cuda.memory_allocated() if GPU else 0
            while steps.done < steps.recipe.steps:
                steps.step()
            synchronize()
            after = torch.cuda.memory_allocated() if GPU else 0
        name = "captured" if graph else "eager"
        report.figure(f"growth in 100 {name} steps", (after - before) / MIB, "MiB")
        del steps
        release()
    left = torch.cuda.memory_allocated() / MIB if GPU else 0.0
    report.figure("left after two runs", left, "MiB")


def whole_candidate(report: Report) -> None:
    """Time what surrounds the training of a model of 106 million parameters."""
    surroundings(report)
    release()
    if GPU:
        free, whole = torch.cuda.mem_get_info()
        report.figure("left of a candidate", torch.cuda.memory_allocated() / MIB, "MiB")
        report.figure("taken of the card", (whole - free) / GIB, "GiB")
        context = (whole - free - torch.cuda.memory_reserved()) / MIB
        report.figure("context", context, "MiB", "of CUDA and its libraries, beside tensors")


def surroundings(report: Report) -> None:
    """Build, ask the gate, validate, and write the weights down."""
    took, model = seconds(lambda: D512.architecture().build(DEVICE, 0))
    weights = sum(p.numel() for p in model.parameters())
    report.figure("build", took, "s", f"{weights / 1e6:.0f} million parameters")
    gate(report, D512, model)
    plan = recipe(2, 1024, val_tokens=sized(65536, 256))
    took, validation = seconds(lambda: validate(model, corpus(), plan))
    report.figure(
        "validation", took, "s", f"loss {validation.loss:.3f}, {validation.tokens} tokens"
    )
    took, state = seconds(
        lambda: {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    )
    report.figure("weights to the host", took, "s")
    took, data = seconds(lambda: safetensors.torch.save(state))
    report.figure("weights to bytes", took, "s", f"{len(data) / MIB:.0f} MiB")


def gate(report: Report, shape: Shape, model: Model) -> None:
    """Time the gate of causality, and count its second looks."""
    looks: list[int] = []
    exact: Any = causality._exact_run

    def counted(*given: Any) -> Any:
        looks.append(1)
        return exact(*given)

    mask_boundaries = causality.mask_boundaries(shape.architecture())
    text = excerpts(corpus(), *causality.text_size(sized(1024, 16), mask_boundaries))
    causality._exact_run = counted  # type: ignore[assignment]
    try:
        took, leaks = seconds(lambda: causality.find_leaks(model, text, mask_boundaries))
    finally:
        causality._exact_run = exact
    report.figure("gate of causality", took, "s", f"{len(leaks)} leaks")
    report.figure("gate: second looks", len(looks))


def step_ms(shape: Shape, router: dict[str, Any]) -> float:
    """Return the time of a pass forward and backward of a model with a router."""
    two_layers = Shape(shape.d_model, 2, shape.n_experts, shape.top_k, shape.width)
    model, text = two_layers.build(0, **router), tokens(16, 1024)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (model.loss(text, text, torch.bfloat16) + model.auxiliary_loss()).backward()
        model.after_step()

    return milliseconds(step, 3, 1)
