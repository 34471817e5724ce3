"""How far a study is: which trials count, the best values, and the time that is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moenas.records import Evaluation, Failure

NOT_EVALUATED = ("parameters", "foreign", "sampler")
"""Kinds of failure of a trial that no worker has seen: they do not count as evaluated."""


def is_evaluated(
    status: str, metrics: Mapping[str, float], failure: Failure | None, has_values: bool
) -> bool:
    """Say whether a trial counts towards `search.trials`: a worker evaluated its model.

    Complete and failed candidates count. A draw that breaks a requirement before it is built, a
    copy of an earlier trial of the same model and a trial of another program do not.
    """
    if "copied_from" in metrics:
        return False
    if status == "failed":
        return failure is None or failure.kind not in NOT_EVALUATED
    return has_values


@dataclass(frozen=True)
class Tally:
    """How far a study is."""

    total: int
    """Candidates that it is to evaluate."""
    running: int
    evaluated: int
    """Candidates that were evaluated, complete or failed."""
    complete: int
    """Complete trials, copies included."""
    failed: int
    infeasible: int
    repeated: int
    """Trials that are copies of an earlier trial of the same model."""
    best: dict[str, float]
    """Objective -> the best value so far."""
    front: int
    """Members of the front."""
    hypervolume: float | None
    eta_s: float | None
    """Seconds to the end at the pace of this run; None before its first result."""

    @property
    def finished(self) -> int:
        """Candidates that count towards the total."""
        return self.evaluated


class Score:
    """The figures that a run keeps of the finished trials of a study."""

    def __init__(self, directions: Mapping[str, str]) -> None:
        self._directions = directions
        self.counts: Counter[str] = Counter()
        """Status -> trials, those that do not count included."""
        self.evaluated = self.repeated = 0
        self.best: dict[str, float] = {}
        self._before = 0
        self._began = time.monotonic()

    def start(self) -> None:
        """Measure the pace of the run from now on."""
        self._before, self._began = self.evaluated, time.monotonic()

    def add(self, found: Evaluation) -> None:
        """Take a finished trial into the figures."""
        self.counts[found.status] += 1
        self.evaluated += is_evaluated(
            found.status, found.metrics, found.failure, bool(found.values)
        )
        self.repeated += "copied_from" in found.metrics
        if found.status != "complete":
            return
        for name, direction in self._directions.items():
            better = min if direction == "minimize" else max
            self.best[name] = better(self.best.get(name, found.values[name]), found.values[name])

    def tally(self, total: int, running: int, front: int, hypervolume: float | None) -> Tally:
        """Return the figures together with those of the front and of the running candidates."""
        here = self.evaluated - self._before
        pace = (time.monotonic() - self._began) / here if here else None
        return Tally(
            total=total,
            running=running,
            evaluated=self.evaluated,
            complete=self.counts["complete"],
            failed=self.counts["failed"],
            infeasible=self.counts["infeasible"],
            repeated=self.repeated,
            best=dict(self.best),
            front=front,
            hypervolume=hypervolume,
            eta_s=None if pace is None else pace * max(0, total - self.evaluated),
        )
