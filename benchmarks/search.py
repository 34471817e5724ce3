"""Search methods on the recorded table: hypervolume against training compute.

    python benchmarks/search.py [--seeds 20] [--workers 4 32 256] [--methods random ...]

It replays benchmarks/moe_table in simulated time, writes benchmarks/results/search.json and prints
a table. It says which share of the points was not trained: their losses are predicted. Methods of
packages that are not installed are left out, and named; `pip install "moenas[rivals]"` installs
them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from replay import methods as own
from replay import rivals
from replay.effects import expected
from replay.fill import every_point, filled
from replay.simulate import Method, Progress, Simulation
from replay.table import Table

from moenas import Space, pareto

Array = NDArray[np.float64]
Make = Callable[[Space, int], Method]

ROOT = Path(__file__).parents[1]
OBJECTIVES = ("val_loss", "flops_per_token")
RESULTS = ROOT / "benchmarks" / "results" / "search.json"
BUDGETS = {4: 400, 32: 400, 256: 800}
"""Workers -> training compute of a run, in mean candidates of the table."""
GRID = 100
"""Points of a curve, at equal steps of compute."""
OWN: dict[str, Make] = {
    "moenas gray_box": own.GrayBoxMethod,
    "moenas gray_box, halving": lambda s, seed: own.Stopping(
        own.GrayBoxMethod(s, seed), own.halving(s)
    ),
    "moenas gray_box, predictive": lambda s, seed: own.Stopping(
        own.GrayBoxMethod(s, seed), own.predictive(s)
    ),
    "moenas random, halving": lambda s, seed: own.Stopping(own.Random(s, seed), own.halving(s)),
}


def space() -> Space:
    """Return the space of the table with the objectives of the benchmark."""
    overrides = [f"objectives=[{', '.join(OBJECTIVES)}]", "search.sampler=random"]
    return Space.load(ROOT / "benchmarks" / "moe_table" / "space.yaml", overrides)


class Judge:
    """Measures what a run has found against the true front of the table.

    The loss of an architecture is the expected one of `effects.expected`, so a lucky seed is worth
    nothing. The hypervolume is in units of the true front's, with the worst values of the table as
    the reference point.
    """

    def __init__(self, table: Table, space: Space) -> None:
        points = every_point(space)
        keys = [point.architecture.fingerprint for point in points]
        recorded = np.array([table.mean_loss(key) for key in keys])
        losses, self.error = expected([point.params for point in points], recorded)
        flops = np.array([float(table.row(key)["flops_per_token"]) for key in keys])
        every = np.column_stack([losses, flops])
        self.values = dict(zip(keys, every, strict=True))
        self._reference = every.max(axis=0) * 1.001
        self._whole = self._volume(every)
        self.mean_flops = float(np.mean([table.training_flops(key) for key in keys]))

    def _volume(self, values: Array) -> float:
        return pareto.hypervolume(values, list(self._reference), ["minimize"] * 2)

    def curve(self, progress: Progress, budget: float) -> list[float]:
        """Return the share of the true hypervolume at GRID points of compute, up to a budget."""
        shares, found = list[float](), list[Array]()
        done = iter([*progress.found, (np.inf, "")])
        spent, fingerprint = next(done)
        for at in np.linspace(0, budget, GRID + 1)[1:]:
            before = len(found)
            while spent <= at:
                found.append(self.values[fingerprint])
                spent, fingerprint = next(done)
            if not shares or len(found) > before:
                shares.append(self._volume(np.array(found)) / self._whole if found else 0.0)
            else:
                shares.append(shares[-1])
        return shares


@dataclass(frozen=True)
class Bench:
    """What all runs of one process share."""

    space: Space
    table: Table
    judge: Judge
    predicted: float
    """Share of the points that were not trained."""


@cache
def bench() -> Bench:
    """Read the table, fill it, and find its true front, once in a process."""
    searched = space()
    table, predicted = filled(Table.load(), searched)
    return Bench(searched, table, Judge(table, searched), predicted)


def available(wanted: list[str]) -> dict[str, Make]:
    """Return the methods that can run here; say which cannot."""
    found, searched = dict[str, Make](), space()
    for name, make in (OWN | rivals.methods()).items():
        if wanted and name not in wanted:
            continue
        try:
            make(searched, 0)
        except ImportError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
        else:
            found[name] = make
    return found


def one_run(task: tuple[str, int, int]) -> dict[str, Any]:
    """Run a method with a seed and a number of workers."""
    name, workers, seed = task
    warnings.simplefilter("ignore")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared = bench()
    budget = BUDGETS[workers] * shared.judge.mean_flops
    np.random.seed(seed)  # Syne Tune draws from the global generator
    method = (OWN | rivals.methods())[name](shared.space, seed)
    began = time.perf_counter()
    progress = Simulation(shared.table, shared.space, method, workers).run(budget)
    seconds = time.perf_counter() - began
    return {
        "method": name,
        "workers": workers,
        "seed": seed,
        "curve": [round(share, 5) for share in shared.judge.curve(progress, budget)],
        "started": progress.started,
        "finished": len(progress.found),
        "seconds": round(seconds, 2),
    }


def compute_to(curve: list[float], share: float) -> float:
    """Return the part of the budget after which a curve reaches a share; infinite if never."""
    reached = [i for i, value in enumerate(curve, 1) if value >= share]
    return reached[0] / len(curve) if reached else float("inf")


def report(results: list[dict[str, Any]]) -> None:
    """Print a row for each method and number of workers."""
    for workers in sorted({r["workers"] for r in results}):
        runs = [r for r in results if r["workers"] == workers]
        final = fmean(r["curve"][-1] for r in runs if r["method"] == "random")
        print(f"\n{workers} workers, budget {BUDGETS[workers]} mean candidates; random's final"
              f" hypervolume is {final:.4f} of the true front's")  # fmt: skip
        print(f"{'method':24} {'10 %':>7} {'25 %':>7} {'50 %':>7} {'100 %':>7} {'to final':>9}")
        for name in sorted({r["method"] for r in runs}):
            mine = np.array([r["curve"] for r in runs if r["method"] == name])
            at = [mine[:, GRID * part // 100 - 1].mean() for part in (10, 25, 50, 100)]
            reach = compute_to(mine.mean(axis=0).tolist(), final)
            shares = " ".join(f"{share:7.4f}" for share in at)
            print(f"{name:24} {shares} {reach:9.2f}  n={len(mine)}")


def main() -> None:
    """Run, store and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    names = available(given.methods)
    print(
        f"{bench().predicted:.1%} of the points are predicted; losses that were left out of the"
        f" judge's model are {bench().judge.error:.4f} nats away from it"
    )
    tasks = [(m, w, s) for w in given.workers for s in range(given.seeds) for m in names]
    with get_context("spawn").Pool(given.processes) as pool:
        results = []
        for number, result in enumerate(pool.imap_unordered(one_run, tasks), 1):
            results.append(result)
            text = f"{result['method']}, {result['workers']} workers, seed {result['seed']}"
            print(f"[{number}/{len(tasks)}] {text}: {result['seconds']} s", file=sys.stderr)
    results.sort(key=lambda r: (r["workers"], r["method"], r["seed"]))
    given.out.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    report(results)


if __name__ == "__main__":
    main()
