"""A pool that answers from recorded evaluations, in simulated time."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from moenas.records import Evaluation, Job
from moenas.workers.results import Result, checked_result

Recorded = Callable[[Job], tuple[Evaluation, float]]
"""Gives the recorded evaluation of a job, and the seconds that it took."""


class ReplayPool:
    """Evaluates nothing: a job ends after its recorded seconds of a simulated clock.

    `workers` jobs run at a time. A job that ends at the same moment as another one is returned in
    the order of submission, so that a replay repeats exactly.
    """

    device = "cpu"
    sharers = 1

    def __init__(self, recorded: Recorded, workers: int) -> None:
        self._recorded = recorded
        self._running: list[tuple[float, int, Result]] = []
        self._submitted = 0
        self.capacity = workers
        self.now = 0.0
        """The simulated clock, in seconds."""

    def submit(self, job: Job) -> None:
        """Take a job; it starts at once."""
        evaluation, seconds = self._recorded(job)
        result = checked_result(job, evaluation, None)
        heapq.heappush(self._running, (self.now + seconds, self._submitted, result))
        self._submitted += 1

    def wait(self, timeout: float) -> list[Result]:
        """Return the job that ends next, and set the clock to its end.

        With a `timeout` of 0 it returns nothing: the driver looks whether it can start another job.
        """
        if not (timeout and self._running):
            return []
        self.now, _, result = heapq.heappop(self._running)
        return [result]

    def close(self) -> None:
        """Forget what runs."""
        self._running.clear()
