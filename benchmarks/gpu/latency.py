"""Latency of decoding and prefill as a study measures it, in one process; `run.py` runs three."""

from __future__ import annotations

import time
from contextlib import closing

import torch

from gpu.card import DEVICE, GPU, release, sized
from gpu.models import D256_SMALL, D512, DENSE, Shape
from gpu.report import Report
from moenas.evaluate.device_lock import DeviceLock
from moenas.evaluate.latency import Workload, device_lock, inference_copy, measure_latency
from moenas.space.sections import Protocol

SHAPES = (D512, D256_SMALL, DENSE)
WORKLOADS = (("decode", 8, 128), ("prefill", 4, 2048))
"""Phase, sequences, and tokens of each."""


def measure(report: Report) -> None:
    """Measure each model under each workload."""
    with closing(device_lock(DEVICE)) as lease:
        for shape in SHAPES:
            for phase, batch, context in WORKLOADS:
                with report.part(f"{shape.name} {phase}"):
                    one_workload(report, lease, shape, (phase, *sized((batch, context), (1, 16))))
                release()


def one_workload(
    report: Report, lease: DeviceLock, shape: Shape, sizes: tuple[str, int, int]
) -> None:
    """Report the value that a study would store, and what stands beside it."""
    phase, batch, context = sizes
    dtype = sized(torch.bfloat16, torch.float32)
    architecture = shape.architecture()
    model = inference_copy(architecture, architecture.build(DEVICE).eval(), dtype)
    workload = Workload(phase, batch, context, dtype, 1, DEVICE)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, workload.tokens, generator=generator).to(DEVICE)
    protocol = Protocol() if GPU else Protocol(min_repeats=3, max_repeats=3, max_seconds=0.2)
    began = time.perf_counter()
    measurement = measure_latency(model, tokens, workload, protocol, lease, {})
    took = time.perf_counter() - began
    details, name = measurement.details, f"{shape.name} {phase}"
    text = (
        f"spread {details['spread']:.3f}, {details['n']} pairs in {took:.1f} s, reference"
        f" {details['reference_ms']:.3f} ms"
    )
    report.figure(f"{name}", measurement.value, "ms", text)
    report.figure(f"{name}: ratio", details["ratio"])
    report.figure(f"{name}: within its precision", not details["noisy"])
    report.figure(f"{name}: captured", bool(details.get("captured", False)))
    if "eager_ms" in details:
        report.figure(f"{name}: eager", float(details["eager_ms"]), "ms")
