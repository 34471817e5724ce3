"""Jobs side by side on Ray, each in a process that works on no other meanwhile."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from moenas.errors import FailureKind, StorageLostError
from moenas.evaluate.devices import has_gpu
from moenas.failures import MESSAGE, TRACEBACK, clean, error_line
from moenas.processes import (
    descendants,
    is_gone,
    kernel_kills,
    kill,
    machine,
    memory_bytes,
    process_start,
    resident_bytes,
)
from moenas.records import Failure, Job
from moenas.space.sections import Search
from moenas.workers.ray_address import fit, sharers, with_share
from moenas.workers.ray_cluster import acquire, release
from moenas.workers.ray_processes import WorkerProcess, processes
from moenas.workers.results import Evaluate, Result, checked_result

MIN_GRACE = 10.0
"""Seconds beyond its time limit after which a worker process is killed, at the least."""
GRACE = 0.1
"""The same as a share of the time limit; the larger of the two counts."""
START_S = 120.0
"""Seconds after which a job that no process has begun, although there is room, is given up."""
LEAVE_S = 3.0
"""Seconds after its result at which a process is killed that has not ended."""
STOPPED_S = 15.0
"""Seconds after which a worker process that is stopped, and has begun no job, is killed."""
DIE_S = 5.0
"""Seconds in which a killed process must be gone; until it is, its slot is not used again."""
LOOK = 1.0
"""Seconds between looks at the cluster and at the memory of its processes."""


@dataclass
class _Task:
    """A job on Ray."""

    job: Job
    stream: Any
    """Ray's generator of what `work` yields."""
    process: WorkerProcess | None
    """Its process, if that works on other jobs too."""
    submitted: float
    pid: int | None = None
    """The worker's process, once it has begun."""
    process_start: str | None = None
    """When it began; None on another machine, where it cannot be seen from here."""
    deadline: float = math.inf
    """Monotonic time at which its process is killed; counts from its beginning."""
    memory: int = 0
    """Most bytes that it was seen to hold."""
    kernel_kills: int = field(default_factory=kernel_kills)

    @property
    def local(self) -> bool:
        return self.pid is not None and self.process_start is not None

    def is_there(self) -> bool:
        """Whether its process can be seen from here and lives."""
        return self.local and process_start(self.pid or 0) == self.process_start

    def kill(self) -> None:
        """Kill its process and what that has started."""
        if self.is_there():
            below = descendants(self.pid or 0)
            kill(self.pid or 0)
            for one in below:
                kill(one)


class RayPool:
    """Works on jobs side by side; each has a process, which is fresh or has worked on others.

    A process that dies is reported and never silently run again. A job past its time limit gets
    some grace to stop by itself, then its process is killed. If a process cannot be killed, there
    is one slot less from then on.
    """

    def __init__(
        self, evaluate: Evaluate, search: Search, workers: int | None, address: str | None
    ) -> None:
        self._cluster = acquire(search, workers, address or os.environ.get("RAY_ADDRESS"))
        self._ray = self._cluster.ray
        self._tasks: list[_Task] = []
        self._stuck: list[_Task] = []
        """Killed tasks whose process is still there."""
        self._leaving: list[_Task] = []
        """Done tasks whose process has not ended yet."""
        self._looked = 0.0
        self._killed_stopped = -math.inf
        """Monotonic time at which stopped workers were killed last."""
        self._closed = False
        try:
            usable = self._cluster.head is None or has_gpu()
            self._search = search = with_share(self._ray, search, workers, usable=usable)
            self._processes = processes(self._ray, evaluate, search)
            room = fit(self._ray, search)
            on_a_device = sharers(self._ray, search)
        except BaseException:
            release(self._cluster)
            raise
        self._slots = min(workers, room) if workers else room
        # A process has its share of a GPU's memory, and no more, however many others there are.
        self.sharers = on_a_device if search.gpus else min(self._slots, on_a_device)
        self.device = "cuda" if search.gpus else "cpu"

    @property
    def capacity(self) -> int:
        """How many jobs are worked on at a time; 1 if there is no slot left, see `submit`."""
        return max(1, self._free_of_stuck())

    def _free_of_stuck(self) -> int:
        """Return how many slots are not held by a process that cannot be killed."""
        self._stuck = [task for task in self._stuck if not self._has_ended(task, 0.0)]
        return self._slots - len(self._stuck)

    def submit(self, job: Job) -> None:
        """Start a job.

        Raises:
            StorageLostError: if the cluster is lost, or no slot is left.
        """
        self._require_cluster()
        if self._free_of_stuck() <= 0:
            pids = ", ".join(str(task.pid) for task in self._stuck)
            raise StorageLostError(
                f"no worker process is left: {pids} did not end when killed; see what state they"
                " are in, and restart the machine if they never end"
            )
        stream, held = self._processes.start(job)
        self._tasks.append(_Task(job, stream, held, time.monotonic()))

    def wait(self, timeout: float) -> list[Result]:
        """Return the results that are there, waiting for the first at most `timeout` seconds.

        Raises:
            StorageLostError: if the cluster is lost; results that came before are given first.
        """
        end = time.monotonic() + timeout
        results: list[Result] = []
        if not self._tasks:
            self._look()
        while self._tasks:
            now = time.monotonic()
            until = min([end, now + LOOK, *(task.deadline for task in self._tasks)])
            ready = self._ready(0.0 if results else max(0.0, until - now))
            try:
                for task in [t for t in self._tasks if t.stream in ready]:
                    results += self._take(task)
                if ready:
                    continue
                results += self._give_up_late()
                self._look()
            except StorageLostError:
                if results:
                    return results  # the next call finds the cluster lost again
                raise
            if results or time.monotonic() >= end:
                break
        return results

    def close(self) -> None:
        """Kill what is running; end the cluster if it is this process' own and not shared."""
        if self._closed:
            return
        self._closed = True
        if self._cluster.trouble() is None:
            for task in self._tasks:
                self._processes.stop(task.stream, task.process)
                task.kill()
            self._processes.close()
        self._tasks.clear()
        release(self._cluster)

    # --- the cluster ---------------------------------------------------------------------------

    def _require_cluster(self) -> None:
        """Raise StorageLostError if the cluster is lost."""
        if (text := self._cluster.trouble()) is not None:
            raise StorageLostError(f"the Ray cluster went away: {text}")

    def _look(self) -> None:
        """Look at the cluster and at the memory of its processes, now and then."""
        now = time.monotonic()
        if now < self._looked + LOOK:
            return
        self._looked = now
        self._require_cluster()
        for task in list(self._leaving):
            if not task.is_there():
                self._leaving.remove(task)
            elif now >= task.deadline:
                task.kill()  # threads or exit handlers of its job keep it
        self._processes.tend()
        unbegun = any(t.pid is None and now >= t.submitted + STOPPED_S for t in self._tasks)
        if unbegun and self._cluster.kill_stopped({task.pid for task in self._tasks}):
            self._killed_stopped = now
        for task in self._tasks:
            if task.is_there():
                task.memory = max(task.memory, resident_bytes(task.pid or 0))

    def _ready(self, pause: float) -> list[Any]:
        """Return the streams that have something, waiting for one."""
        streams = [task.stream for task in self._tasks]
        try:
            return list(self._ray.wait(streams, num_returns=1, timeout=pause)[0])
        except self._ray.exceptions.RayError as error:
            self._require_cluster()
            raise StorageLostError(f"the Ray cluster went away: {error_line(error)}") from error

    # --- results -------------------------------------------------------------------------------

    def _take(self, task: _Task) -> list[Result]:
        """Take the next thing that a worker said; nothing if that is only that it has begun."""
        try:
            said = self._ray.get(next(task.stream))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            failure = self._failure(task, error)
            self._tasks.remove(task)
            if task.process is not None:
                self._processes.stop(task.stream, task.process)
            return [Result(task.job, failure)]
        if task.pid is None:
            task.pid = said["pid"]
            task.process_start = said["process_start"] if said["machine"] == machine() else None
            if (limit := task.job.time_limit_s) is not None:
                task.deadline = time.monotonic() + limit + max(MIN_GRACE, GRACE * limit)
            return []
        self._tasks.remove(task)
        if task.process is not None:
            task.process.pid, task.process.process_start = task.pid, task.process_start
        if not self._processes.keep(task.process, said, is_full=self._is_full()):
            task.deadline = time.monotonic() + LEAVE_S
            self._leaving.append(task)
        return [_result(task.job, said)]

    def _give_up_late(self) -> list[Result]:
        """Kill every process that is past its deadline; give up what no process has begun."""
        results, now = [], time.monotonic()
        for task in list(self._tasks):
            if task.pid is None and now >= task.submitted + START_S and self._has_room():
                text = (
                    f"no process of the Ray cluster began the job within {START_S:.0f} s; see the"
                    " cluster's logs"
                )
                failure = Failure("environment", text)
            elif now >= task.deadline:
                text = f"did not stop at its time limit of {task.job.time_limit_s:g} s; killed"
                failure = Failure("timeout", text)
            else:
                continue
            self._processes.stop(task.stream, task.process)
            task.kill()
            self._tasks.remove(task)
            if task.pid is not None and not self._has_ended(task, DIE_S):
                self._stuck.append(task)
            results.append(Result(task.job, failure))
        return results

    def _has_room(self) -> bool:
        """Whether a job must have begun by now: no other job uses the resources that it needs."""
        if self._cluster.head is not None and self._cluster.users == 1:
            return True
        asked = {"CPU": self._search.cpus, "GPU": self._search.gpus or 0.0}
        return any(
            all(free.get(name, 0.0) >= need for name, need in asked.items())
            for free in self._cluster.available
        )

    def _is_full(self) -> bool:
        """Whether jobs of other studies may wait for a process of this one to end."""
        return self._cluster.head is None and not self._has_room()

    def _has_ended(self, task: _Task, timeout: float) -> bool:
        """Wait for the end of a killed task's process; say whether it came."""
        if task.local:
            return is_gone(task.pid or 0, task.process_start, timeout)
        return bool(self._ray.wait([task.stream], num_returns=1, timeout=timeout)[0])

    def _failure(self, task: _Task, error: Exception) -> Failure:
        """Say why no evaluation came back.

        Raises:
            StorageLostError: if the reason is that the cluster is lost.
        """
        errors = self._ray.exceptions
        self._require_cluster()
        if isinstance(error, errors.LocalRayletDiedError | errors.RaySystemError):
            raise StorageLostError(f"the Ray cluster went away: {error_line(error)}") from error
        process = f"worker process {task.pid}" if task.pid else "the worker process"
        trace = clean(str(error), TRACEBACK)
        if isinstance(error, errors.RayTaskError):
            # The job's own exceptions are part of the reply: this one came before or after it.
            text = clean(error_line(error.cause or error), MESSAGE)
            return Failure("environment", f"{process} could not work on a job: {text}", trace)
        if isinstance(error, errors.OutOfMemoryError):
            return self._out_of_memory(task, f"Ray killed {process}", trace)
        if isinstance(error, errors.RayActorError) and _is_of_a_node(error):
            text = f"the node of {process} went away: {error_line(error)}"
            return Failure("environment", text, trace)
        if isinstance(error, errors.WorkerCrashedError | errors.RayActorError):
            if kernel_kills() > task.kernel_kills and not task.is_there():
                return self._out_of_memory(task, f"the kernel killed {process}", trace)
            ours = task.pid is None and self._killed_stopped >= task.submitted
            kind: FailureKind = "environment" if ours else "crashed"
            return Failure(kind, f"{process} died ({type(error).__name__})", trace)
        gone = f"the node of {process} went away or lost its result ({type(error).__name__})"
        return Failure("environment", gone, trace)

    def _out_of_memory(self, task: _Task, what: str, trace: str) -> Failure:
        """Say who used the memory: a candidate is to blame for more than its share of it."""
        share, gib = memory_bytes() / self._slots, 2**30
        text = f"{what}: the machine ran out of memory"
        if not task.memory:
            return Failure("out_of_memory", text, trace)
        text += f"; the candidate held {task.memory / gib:.1f} GiB of {share / gib:.1f}"
        text += f" GiB, the memory shared by {self._slots} candidates"
        own = task.memory > share
        return Failure("out_of_memory" if own else "environment", text, trace)


def _is_of_a_node(error: Any) -> bool:
    """Whether an actor is gone as its node is, or never began as its process could not be made."""
    return bool(error.actor_init_failed or error.preempted or "node has died" in str(error))


def _result(job: Job, said: Any) -> Result:
    """Return the result of a worker's reply; what the job printed goes to stderr."""
    if not isinstance(said, dict):
        return checked_result(job, said, None)
    printed = clean(str(said.get("printed") or ""), 2 * MESSAGE).rstrip()
    if printed:
        for line in printed.splitlines():
            print(f"trial {job.trial}: {line}", file=sys.stderr)
    if isinstance(failure := said.get("failure"), dict):
        return Result(job, Failure.parse(failure))
    try:
        sent = json.loads(said["evaluation"])
    except (KeyError, TypeError, ValueError) as error:
        return Result(job, Failure("invalid", f"the result is no evaluation: {error_line(error)}"))
    return checked_result(job, sent, said.get("weights"))
