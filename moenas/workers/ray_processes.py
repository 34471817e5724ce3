"""The processes of Ray that jobs run in: a fresh one for each, or one for many in turn."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from moenas.processes import born
from moenas.records import Job
from moenas.space.sections import Search
from moenas.workers.ray_worker import Worker, work
from moenas.workers.results import Evaluate

ON_CPU, IN_TURN = 1, 50
"""Jobs of a process if the space names no number: on a CPU, and where a start costs too much."""
IDLE_S = 60.0
"""Seconds without a job after which a process ends, as it holds its part of the cluster."""


@dataclass
class Held:
    """A process that works on jobs one after another."""

    actor: Any
    jobs: int = 0
    """How many it has begun."""
    pid: int | None = None
    born: str | None = None
    """When it began; None until its first result, and on another machine."""
    idle_since: float = 0.0

    @property
    def is_dead(self) -> bool:
        """Whether it is seen from here that it is gone."""
        return self.pid is not None and self.born is not None and born(self.pid) != self.born


class Processes(Protocol):
    """Starts jobs, each in a process that works on no other job meanwhile."""

    def start(self, job: Job) -> tuple[Any, Held | None]:
        """Start a job; return Ray's generator of what its process says, and the process."""

    def stop(self, stream: Any, held: Held | None) -> None:
        """End the process of a job that is not done."""

    def keep(self, held: Held | None, said: Any) -> bool:
        """Take a process back whose job is done; False if it ends."""

    def tend(self) -> None:
        """End what has waited for a job for long."""

    def close(self) -> None:
        """End what waits for a job."""


def processes(ray: Any, evaluate: Evaluate, search: Search) -> Processes:
    """Return the kind of processes that `search.candidates_per_worker` asks for."""
    # A job that ends at a rung may be shorter than the start of a process.
    costly = search.gpus or search.early_stopping.stops
    most = search.candidates_per_worker or (IN_TURN if costly else ON_CPU)
    if most == 1:
        return Fresh(ray, evaluate, search)
    return Kept(ray, evaluate, search, most)


class Fresh:
    """A process for each job, which is gone when the job is."""

    def __init__(self, ray: Any, evaluate: Evaluate, search: Search) -> None:
        self._ray, self._evaluate, self._gpus = ray, evaluate, search.gpus or 0.0
        # max_calls in the decorator, not in options: a process, and what it holds of a GPU, must
        # not outlive its job. max_retries=0: Ray would run a crashed job again, out of memory for
        # ever.
        self._remote = ray.remote(max_calls=1, max_retries=0)(work).options(
            num_cpus=search.cpus, num_gpus=self._gpus, num_returns="streaming", name="_work"
        )

    def start(self, job: Job) -> tuple[Any, Held | None]:
        """Start a job in a process of its own."""
        return self._remote.remote(self._evaluate, job.plain(), self._gpus), None

    def stop(self, stream: Any, held: Held | None) -> None:
        """End the process."""
        self._ray.cancel(stream, force=True)

    def keep(self, held: Held | None, said: Any) -> bool:
        """Say that the process ends by itself."""
        return False

    def tend(self) -> None:
        """Do nothing: no process waits."""

    def close(self) -> None:
        """Do nothing: no process waits."""


class Kept:
    """Processes that work on up to `most` jobs each; an actor of Ray keeps its GPU for life."""

    def __init__(self, ray: Any, evaluate: Evaluate, search: Search, most: int) -> None:
        self._ray, self._evaluate, self._most = ray, evaluate, most
        self._gpus = search.gpus or 0.0
        # Neither a process nor a job is started again by Ray: the driver decides.
        self._remote = ray.remote(max_restarts=0, max_task_retries=0)(Worker).options(
            num_cpus=search.cpus, num_gpus=self._gpus
        )
        self._idle: list[Held] = []

    def start(self, job: Job) -> tuple[Any, Held | None]:
        """Start a job in the process that has become free last, or in a new one."""
        held = None
        while self._idle and held is None:
            held = self._idle.pop()
            if held.is_dead:
                self._end(held)
                held = None
        if held is None:
            held = Held(self._remote.remote(self._evaluate, self._gpus))
        held.jobs += 1
        method = held.actor.work.options(num_returns="streaming", name="_work")
        return method.remote(job.plain()), held

    def stop(self, stream: Any, held: Held | None) -> None:
        """End the process; Ray cannot cancel a job of an actor by force."""
        if held is not None:
            self._end(held)

    def keep(self, held: Held | None, said: Any) -> bool:
        """Keep a process for the next job, unless it has done its number, or is not fit for one."""
        if held is None:
            return False
        if held.jobs >= self._most or not isinstance(said, dict) or said.get("unfit"):
            self._end(held)
            return False
        held.idle_since = time.monotonic()
        self._idle.append(held)
        return True

    def tend(self) -> None:
        """End the processes that have had no job for IDLE_S."""
        now = time.monotonic()
        for held in [one for one in self._idle if now >= one.idle_since + IDLE_S]:
            self._idle.remove(held)
            self._end(held)

    def close(self) -> None:
        """End the processes that wait for a job."""
        while self._idle:
            self._end(self._idle.pop())

    def _end(self, held: Held) -> None:
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(held.actor)
