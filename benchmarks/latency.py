"""How much a measured latency varies from round to round: absolute, and as a paired ratio.

`python benchmarks/latency.py [--rounds N] [--busy N]` times three candidates in turn. First nothing
of ours runs beside them, then busy processes that know of no lease. It prints for each the
coefficient of variation over the rounds: of the median time, and of the value that moenas stores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch

from moenas.evaluate.devices import device_info
from moenas.evaluate.latency import (
    Workload,
    device_lock,
    inference_copy,
    measure_latency,
)
from moenas.model.architecture import Architecture, Model
from moenas.records import Plain
from moenas.space.sections import Protocol

BUSY = """
import torch
torch.set_num_threads(1)
a = torch.randn(512, 512)
while True:
    a @ a
"""
MIXER: Plain = {"kind": "attention", "head_dim": 32, "n_kv_heads": 1}
CANDIDATES: dict[str, tuple[int, int, Plain]] = {
    "dense 2x64": (64, 2, {"kind": "dense", "d_ff": 256}),
    "moe 4x96": (96, 4, {"kind": "moe", "n_experts": 8, "d_expert": 128}),
    "moe 4x192": (192, 4, {"kind": "moe", "n_experts": 16, "d_expert": 256}),
}


def build(d_model: int, layers: int, ffn: Plain) -> Model:
    """Build a candidate as it would be deployed, in float32."""
    block = {"repeat": layers, "mixer": MIXER, "ffn": ffn}
    plain = {"vocab_size": 256, "d_model": d_model, "blocks": [block]}
    architecture = Architecture.parse(plain)
    return inference_copy(architecture, architecture.build(), torch.float32)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep processes multiplying matrices, one thread each."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def variation(values: list[float]) -> str:
    """Return mean and coefficient of variation."""
    mean = statistics.mean(values)
    return f"{mean:8.3f} +- {100 * statistics.stdev(values) / mean:4.1f} %"


def measure_rounds(models: dict[str, Model], phase: str, rounds: int) -> dict[str, list[Plain]]:
    """Measure every model once a round; return model -> details of each round."""
    protocol, device = Protocol(), torch.device("cpu")
    sizes = {"decode": (8, 128), "prefill": (1, 256)}
    workload = Workload(phase, *sizes[phase], torch.float32, 1, device)  # type: ignore[arg-type]
    tokens = torch.randint(256, workload.tokens, generator=torch.Generator().manual_seed(0))
    by_model: dict[str, list[Plain]] = {name: [] for name in models}
    with contextlib.closing(device_lock(device)) as lease:
        for _ in range(rounds):
            for name, model in models.items():
                timed = measure_latency(model, tokens, workload, protocol, lease, {})
                by_model[name].append(timed.details)
    return by_model


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--busy", type=int, default=1, help="busy processes in the second half")
    options = parser.parse_args()
    models = {name: build(*fields) for name, fields in CANDIDATES.items()}
    info = device_info(torch.device("cpu"), 1, torch.float32)
    print(f"{info['name']}, {info['cores']} cores, torch {torch.__version__}, 1 thread, float32;")
    print(f"{options.rounds} rounds; mean and coefficient of variation over the rounds\n")
    print("| beside it | phase | candidate | median, ms | paired ratio | CPU-time ratio | noisy |")
    print("|---|---|---|---|---|---|---|")
    for count in (0, options.busy):
        with busy(count):
            for phase in ("decode", "prefill"):
                for name, rows in measure_rounds(models, phase, options.rounds).items():
                    columns = [
                        variation([row[key] for row in rows])
                        for key in ("wall_ms", "ratio", "cpu_ratio")
                    ]
                    noisy = f"{sum(row['noisy'] for row in rows)}/{len(rows)}"
                    print(f"| {count} busy | {phase} | {name} | {' | '.join(columns)} | {noisy} |")
    print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
