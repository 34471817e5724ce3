"""Search methods on the recorded table: hypervolume against training compute.

    python benchmarks/search.py [--seeds 20] [--workers 4 32 256] [--methods random ...]
    python benchmarks/search.py --page

It replays benchmarks/moe_table in simulated time and adds each run to
benchmarks/results/search.json, so a second start goes on. Remove the rows of a method whose code
has changed. `--page` writes docs/search_benchmark.md and docs/search.png from these results. The
page says which share of the points was not trained: their losses are predicted. Methods of packages
that are not installed are left out, and named; `pip install "moenas[rivals]"` installs them.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from replay import methods as own
from replay import page, rivals
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
RULES = 2
"""Number of the rules of the simulation; runs by other rules are not kept."""
GRID = 100
"""Points of a curve, at equal steps of compute."""
OWN: dict[str, Make] = {
    "moenas gray_box": own.gray_box,
    "moenas gray_box, halving": lambda s, seed: own.Stopping(own.gray_box(s, seed), own.halving(s)),
    "moenas gray_box, predictive": lambda s, seed: own.Stopping(
        own.gray_box(s, seed), own.predictive(s)
    ),
    "moenas gray_box, costs unknown": own.costs_unknown,
    "moenas evolution": own.evolution,
    "moenas random, halving": lambda s, seed: own.Stopping(own.Random(s, seed), own.halving(s)),
}
"""Name -> method of moenas; a comma separates what is added or left out."""
REPEATS_TRAINED = ", repeats trained"
"""End of the names of methods whose repeated proposals are trained again, as without a cache."""


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
        self._flops = {key: table.training_flops(key) for key in keys}
        self.mean_flops = float(np.mean(list(self._flops.values())))

    def _volume(self, values: Array) -> float:
        return pareto.hypervolume(values, list(self._reference), ["minimize"] * 2)

    def curve(self, progress: Progress, budget: float) -> list[float]:
        """Return the share of the true hypervolume at GRID points of compute, up to a budget."""
        shares, reached = list[float](), list[Array]()
        done = iter([*progress.found, (np.inf, "")])
        spent, fingerprint = next(done)
        for at in np.linspace(0, budget, GRID + 1)[1:]:
            before = len(reached)
            while spent <= at:
                reached.append(self.values[fingerprint])
                spent, fingerprint = next(done)
            if not shares or len(reached) > before:
                shares.append(self._volume(np.array(reached)) / self._whole if reached else 0.0)
            else:
                shares.append(shares[-1])
        return shares

    def limit(self, workers: int, budget: float) -> list[float]:
        """Return the curve of all models together, each found as soon as it can be trained.

        No method reaches more, because all workers are always busy.
        """
        found = sorted((flops * workers, key) for key, flops in self._flops.items())
        return self.curve(Progress(found), budget)


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


def every_method() -> dict[str, Make]:
    """Return our methods and the rivals by name; making one may need its package."""
    published = rivals.methods()
    repeating = ("optuna TPE", "optuna NSGA-II")
    return OWN | published | {name + REPEATS_TRAINED: published[name] for name in repeating}


def available(wanted: list[str]) -> dict[str, Make]:
    """Return the methods that can run here; say which cannot."""
    runnable, searched = dict[str, Make](), space()
    for name, make in every_method().items():
        if wanted and name not in wanted:
            continue
        try:
            make(searched, 0)
        except ImportError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
        else:
            runnable[name] = make
    return runnable


def one_run(task: tuple[str, int, int]) -> dict[str, Any]:
    """Run a method with a seed and a number of workers."""
    name, workers, seed = task
    warnings.simplefilter("ignore")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared = bench()
    budget = BUDGETS[workers] * shared.judge.mean_flops
    np.random.seed(seed)  # Syne Tune draws from the global generator
    method = every_method()[name](shared.space, seed)
    began = time.perf_counter()
    cache = not name.endswith(REPEATS_TRAINED)
    simulation = Simulation(shared.table, shared.space, method, workers, seed=seed, cache=cache)
    progress = simulation.run(budget)
    seconds = time.perf_counter() - began
    return {
        "method": name,
        "workers": workers,
        "seed": seed,
        "curve": [round(share, 5) for share in shared.judge.curve(progress, budget)],
        "started": progress.started,
        "finished": len(progress.found),
        "filled": progress.filled,
        "seconds": round(seconds, 2),
    }


def limit(workers: int) -> list[float]:
    """Return the curve that no method exceeds."""
    judge = bench().judge
    return [round(share, 5) for share in judge.limit(workers, BUDGETS[workers] * judge.mean_flops)]


def stored(out: Path) -> page.Results:
    """Return the results of former starts; empty if the table or the rules are others."""
    digest = Table.load().digest()
    if out.exists():
        results: page.Results = json.loads(out.read_text())
        if (results["table_sha256"], results.get("rules")) == (digest, RULES):
            return results
    shared = bench()
    return {
        "table_sha256": digest,
        "rules": RULES,
        "rows": len(shared.table.rows),
        "predicted": round(shared.predicted, 4),
        "judge_error": round(shared.judge.error, 5),
        "budgets": {str(workers): budget for workers, budget in BUDGETS.items()},
        "runs": [],
    }


def write(results: page.Results, out: Path) -> None:
    """Write the results, a run a line."""
    results["runs"].sort(key=lambda r: (r["workers"], r["method"], r["seed"]))
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in results["runs"])
    facts = {name: value for name, value in results.items() if name != "runs"}
    head = json.dumps(facts).removesuffix("}")
    out.write_text(f'{head}, "runs": [\n{runs}\n]}}\n')


def main() -> None:
    """Run what is missing, store and show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    given = parser.parse_args()
    if given.page:
        page.write(json.loads(given.out.read_text()), Table.load(), ROOT / "docs")
        return
    results = stored(given.out)
    results["limits"] = {str(workers): limit(workers) for workers in BUDGETS}
    done = {(r["method"], r["workers"], r["seed"]) for r in results["runs"]}
    names = available(given.methods)
    tasks = [(m, w, s) for s in range(given.seeds) for w in given.workers for m in names]
    tasks = [task for task in tasks if task not in done]
    with get_context("spawn").Pool(given.processes) as pool:
        for number, result in enumerate(pool.imap_unordered(one_run, tasks), 1):
            results["runs"].append(result)
            write(results, given.out)
            text = f"{result['method']}, {result['workers']} workers, seed {result['seed']}"
            print(f"[{number}/{len(tasks)}] {text}: {result['seconds']} s", file=sys.stderr)
    print("\n".join(page.tables(results)))


if __name__ == "__main__":
    main()
