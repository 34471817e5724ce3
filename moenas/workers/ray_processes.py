"""The processes of Ray that jobs run in: a fresh one for each, or one for many in turn."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from moenas.processes import process_start
from moenas.records import Job
from moenas.space.sections import Search
from moenas.workers.ray_worker import Worker, work
from moenas.workers.results import Evaluate

ON_CPU, IN_TURN = 1, 50
"""Jobs of a process if the space names no number: on a CPU, and where a start costs too much."""
TURN_S = 300.0
"""Seconds after which a process of a full cluster ends between two jobs. Jobs of other studies,
which wait in Ray's queue, then get its place."""
IDLE_S = 60.0
"""Seconds without a job after which a process ends, as it holds its part of the cluster."""


@dataclass
class WorkerProcess:
    """A process that works on jobs one after another."""

    actor: Any
    jobs: int = 0
    """How many it has begun."""
    pid: int | None = None
    process_start: str | None = None
    """Ticks from the boot to its start; None until its first result, or on another machine."""
    idle_since: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def is_dead(self) -> bool:
        """Whether it is seen from here that it is gone."""
        return (
            self.pid is not None
            and self.process_start is not None
            and process_start(self.pid) != self.process_start
        )


class Processes(Protocol):
    """Starts jobs, each in a process that works on no other job meanwhile."""

    def start(self, job: Job) -> tuple[Any, WorkerProcess | None]:
        """Start a job; return Ray's generator of what its process says, and the process."""

    def stop(self, stream: Any, process: WorkerProcess | None) -> None:
        """End the process of a job that is not done."""

    def keep(self, process: WorkerProcess | None, said: Any, *, is_full: bool) -> bool:
        """Take a process back whose job is done; False if it ends.

        `is_full` says that no other process of this size fits into the cluster.
        """

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
        return FreshProcesses(ray, evaluate, search)
    return ReusedProcesses(ray, evaluate, search, most)


class FreshProcesses:
    """A process for each job, which is gone when the job is."""

    def __init__(self, ray: Any, evaluate: Evaluate, search: Search) -> None:
        self._ray, self._evaluate, self._gpus = ray, evaluate, search.gpus or 0.0
        # max_calls in the decorator, not in options: a process, and its memory on a GPU, must not
        # outlive its job. max_retries=0: Ray would run a crashed job again, out of memory for ever.
        self._remote = ray.remote(max_calls=1, max_retries=0)(work).options(
            num_cpus=search.cpus, num_gpus=self._gpus, num_returns="streaming", name="_work"
        )

    def start(self, job: Job) -> tuple[Any, WorkerProcess | None]:
        """Start a job in a process of its own."""
        return self._remote.remote(self._evaluate, job.plain(), self._gpus), None

    def stop(self, stream: Any, process: WorkerProcess | None) -> None:
        """End the process."""
        self._ray.cancel(stream, force=True)

    def keep(self, process: WorkerProcess | None, said: Any, *, is_full: bool) -> bool:
        """Say that the process ends by itself."""
        return False

    def tend(self) -> None:
        """Do nothing: no process waits."""

    def close(self) -> None:
        """Do nothing: no process waits."""


class ReusedProcesses:
    """Processes that work on up to `most` jobs each; an actor of Ray keeps its GPU for life."""

    def __init__(self, ray: Any, evaluate: Evaluate, search: Search, most: int) -> None:
        self._ray, self._evaluate, self._most = ray, evaluate, most
        self._gpus = search.gpus or 0.0
        # Neither a process nor a job is started again by Ray: the driver decides.
        self._remote = ray.remote(max_restarts=0, max_task_retries=0)(Worker).options(
            num_cpus=search.cpus, num_gpus=self._gpus
        )
        self._idle: list[WorkerProcess] = []

    def start(self, job: Job) -> tuple[Any, WorkerProcess | None]:
        """Start a job in the process that has become free last, or in a new one."""
        process = None
        while self._idle and process is None:
            process = self._idle.pop()
            if process.is_dead:
                self._end(process)
                process = None
        if process is None:
            process = WorkerProcess(self._remote.remote(self._evaluate, self._gpus))
        process.jobs += 1
        method = process.actor.work.options(num_returns="streaming", name="_work")
        return method.remote(job.plain()), process

    def stop(self, stream: Any, process: WorkerProcess | None) -> None:
        """End the process; Ray cannot cancel a job of an actor by force."""
        if process is not None:
            self._end(process)

    def keep(self, process: WorkerProcess | None, said: Any, *, is_full: bool) -> bool:
        """Keep a process for the next job, unless it has done its number, or is not fit for one.

        In a full cluster it is kept for TURN_S.
        """
        if process is None:
            return False
        unfit = not isinstance(said, dict) or said.get("unfit")
        turn_over = is_full and time.monotonic() >= process.began + TURN_S
        if process.jobs >= self._most or unfit or turn_over:
            self._end(process)
            return False
        process.idle_since = time.monotonic()
        self._idle.append(process)
        return True

    def tend(self) -> None:
        """End the processes that have had no job for IDLE_S."""
        now = time.monotonic()
        for process in [one for one in self._idle if now >= one.idle_since + IDLE_S]:
            self._idle.remove(process)
            self._end(process)

    def close(self) -> None:
        """End the processes that wait for a job."""
        while self._idle:
            self._end(self._idle.pop())

    def _end(self, process: WorkerProcess) -> None:
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(process.actor)
