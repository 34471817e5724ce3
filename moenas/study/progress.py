"""How far a run is: finished trials by status, the best values, the front and the time left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass

from moenas.records import Evaluation
from moenas.store.counting import is_evaluated
from moenas.store.front_rows import FrontSummary


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    total: int
    """Candidates that the study is to evaluate."""
    running: int
    """Candidates that workers evaluate now."""
    evaluated: int
    """Candidates that were evaluated: complete, failed or stopped. They count towards the total."""
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
    at_rungs: int = 0
    """Candidates that have reached a rung and are not evaluated; they count, too."""
    paused: int = 0
    """Candidates that wait at a rung for the decision of early stopping."""
    stopped: int = 0
    """Candidates that early stopping has stopped, copies included."""

    @property
    def reached(self) -> int:
        """Candidates that are evaluated or have reached a rung."""
        return self.evaluated + self.at_rungs


class ProgressTracker:
    """Counts the finished trials of a study, and measures the pace of this run.

    Attributes:
        total: candidates that the study is to evaluate.
        running: the candidates that workers evaluate now; the driver owns them.
        paused: the candidates that wait at a rung.
        at_rungs: the candidates that have reached a rung and have no evaluation.
        front: the front after the latest evaluation.
        counts: status -> trials, those that do not count towards the total included.
        evaluated: trials that count towards the total.
        repeated: copies of an earlier trial of the same model.
        best: objective -> the best value so far.
    """

    def __init__(self, directions: Mapping[str, str]) -> None:
        self.total = 0
        self.running: Sized = ()
        self.paused: Sized = ()
        self.at_rungs: Sized = ()
        self.front = FrontSummary(0, None)
        self.counts: Counter[str] = Counter()
        self.evaluated = self.repeated = 0
        self.best: dict[str, float] = {}
        self._directions = directions
        self._reached_before = 0
        self._began = time.monotonic()

    @property
    def reached(self) -> int:
        """Candidates that are evaluated or have reached a rung."""
        return self.evaluated + len(self.at_rungs)

    def start(self, front: FrontSummary) -> None:
        """Measure the pace from now on; trials of earlier runs are added already."""
        self.front = front
        self._reached_before, self._began = self.reached, time.monotonic()

    def add(self, evaluation: Evaluation) -> None:
        """Count a finished trial."""
        self.counts[evaluation.status] += 1
        self.repeated += evaluation.is_copy
        self.evaluated += is_evaluated(
            evaluation.status, evaluation.metrics, evaluation.failure, bool(evaluation.values)
        )
        if evaluation.status != "complete":
            return
        for name, direction in self._directions.items():
            value = evaluation.values[name]
            better = min if direction == "minimize" else max
            self.best[name] = better(self.best.get(name, value), value)

    def snapshot(self) -> Progress:
        """Return how far the study is now."""
        here = max(0, self.reached - self._reached_before)
        pace = (time.monotonic() - self._began) / here if here else None
        return Progress(
            total=self.total,
            running=len(self.running),
            evaluated=self.evaluated,
            complete=self.counts["complete"],
            failed=self.counts["failed"],
            infeasible=self.counts["infeasible"],
            repeated=self.repeated,
            best=dict(self.best),
            front=self.front.size,
            hypervolume=self.front.hypervolume,
            eta_s=None if pace is None else pace * max(0, self.total - self.reached),
            at_rungs=len(self.at_rungs),
            paused=len(self.paused),
            stopped=self.counts["stopped"],
        )
