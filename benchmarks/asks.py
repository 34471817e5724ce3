"""Seconds that an ask takes with 100, 300 and 1,000 finished trials, by sampler.

    OMP_NUM_THREADS=1 python benchmarks/asks.py [SAMPLER...]

The trials are random draws of the space `tiny` with made-up values; nothing is trained. The first
ask of a process reads the study and fits everything. Later asks use its cache, each after one more
finished trial. Seconds are CPU seconds of the process. Prints a table in Markdown.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import optuna

from moenas.records import Evaluation
from moenas.search.trials import OptunaTrials
from moenas.space.space import Space
from moenas.store.store import Store
from moenas.study.candidate import Candidate

SAMPLERS = ("gray_box", "tpe", "gp", "evolution")
TRIALS = (100, 300, 1000)
LATER = 5
"""Later asks at each number of trials; their median is printed."""


def values(space: Space, candidate: Candidate) -> dict[str, float]:
    """Return made-up values: more parameters lower the loss, and cost time and operations."""
    assert candidate.architecture is not None
    cost = space.cost(candidate.architecture)
    noise = (int(candidate.fingerprint[:4], 16) / 65_536 - 0.5) / 50
    loss = 4 - 0.06 * math.log2(cost.flops_per_token) - 0.04 * math.log2(cost.params) + noise
    made = {"val_loss": loss, "decode_ms": 0.2 + cost.active_params / 1e7 + noise}
    return made | {"flops_per_token": float(cost.flops_per_token)}


def ask(space: Space, trials: OptunaTrials) -> Candidate:
    """Ask for a trial and draw its architecture, as the driver does."""
    trial = trials.ask(0)
    candidate = Candidate.from_draw(trial, trials.draw(trial), space)
    trials.set_constraints(candidate.trial, candidate.violations)
    return candidate


def tell(space: Space, trials: OptunaTrials, candidate: Candidate) -> None:
    """Finish a trial with made-up values."""
    evaluation = Evaluation(space.name, candidate.number, 1, "infeasible", candidate.fingerprint)
    if candidate.broken:
        evaluation = dataclasses.replace(evaluation, violations=candidate.broken)
    else:
        made = values(space, candidate)
        evaluation = dataclasses.replace(evaluation, status="complete", values=made)
    trials.tell(candidate.trial, evaluation, summary=candidate.summary)


def opened(store: Store, space: Space, sampler: str) -> OptunaTrials:
    """Return the trials of the study under a sampler, as a process that resumes it has them."""
    trials = OptunaTrials(store, space.with_search(sampler=sampler))
    trials.open()
    trials.load({})
    return trials


def seconds(store: Store, space: Space, sampler: str) -> tuple[float, float]:
    """Return the seconds of the first ask of a process, and the median of later ones."""
    trials, times = opened(store, space, sampler), list[float]()
    for _ in range(1 + LATER):
        began = time.process_time()
        candidate = ask(space, trials)
        times.append(time.process_time() - began)
        tell(space, trials, candidate)
    return times[0], statistics.median(times[1:])


def main() -> None:
    """Print the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, names = Space.load("tiny"), sys.argv[1:] or SAMPLERS
    rows: dict[str, list[str]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{Path(folder, 'asks.db')}", create=True)
        done = 0
        for count in TRIALS:
            trials = opened(store, space, "random")
            while done < count:
                tell(space, trials, ask(space, trials))
                done += 1
            for name in names:
                first, later = seconds(store, space, name)
                rows[name].append(f"{first:.2f} / {later:.2f}")
                print(f"{count} trials, {name}: {rows[name][-1]}", file=sys.stderr, flush=True)
                done += 1 + LATER
        store.engine.dispose()
    print(f"| sampler | {' | '.join(f'{n:,} trials' for n in TRIALS)} |")
    print(f"| --- |{' --- |' * len(TRIALS)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
