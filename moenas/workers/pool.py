"""Where jobs run: one after another in this process, or side by side on Ray."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Literal

from moenas.errors import EnvironmentFaultError, InputError
from moenas.failures import error_line, failure_of
from moenas.records import Failure, Job
from moenas.space.sections import Search
from moenas.workers.ray_pool import RayPool
from moenas.workers.results import Evaluate, Pool, Result, checked_result

__all__ = ["Evaluate", "Inline", "Pool", "Result", "Workers", "open_pool"]

Workers = int | Literal["inline"] | None


def open_pool(
    workers: Workers,
    search: Search,
    *,
    address: str | None = None,
    evaluate: Evaluate | None = None,
) -> Pool:
    """Open a pool.

    "inline" evaluates in this process, on its first GPU unless `search.gpus` is 0: no Ray, and the
    time limit holds between training steps only. A number is as many processes on Ray; None asks
    `search.workers`, which takes as many as fit if it is null too. Ray is a cluster of this process
    alone, unless `address` or RAY_ADDRESS names another.

    Raises:
        InputError: if no machine has what a candidate asks for, or the cluster cannot be used.
    """
    if (search.gpus or 0.0) > 1:
        raise InputError(
            f"search.gpus: a candidate asks for {search.gpus:g} GPUs; one candidate is trained on"
            " one GPU at most, so give a share of it, 1 or less"
        )
    if evaluate is None:
        from moenas.evaluate import job as measure

        evaluate = measure.evaluate
    if workers == "inline":
        return Inline(evaluate, _inline_device(search))
    return RayPool(evaluate, search, workers or search.workers, address)


def names_cluster(address: str | None) -> bool:
    """Say whether an address, or RAY_ADDRESS in its place, names a cluster of other machines."""
    return address is not None or "RAY_ADDRESS" in os.environ


def _inline_device(search: Search) -> str:
    """Return the device for candidates in this process; refuse the CPU for what asks for a GPU."""
    if search.gpus == 0:
        return "cpu"
    from moenas.evaluate import devices

    if devices.has_gpu():
        return "cuda"
    if search.gpus is not None:
        raise InputError(
            f"search.gpus: a candidate asks for {search.gpus:g} GPU, and this process sees none;"
            " set search.gpus=0, or make a CUDA device visible"
        )
    return "cpu"


class Inline:
    """Works on one job at a time, in this process and in `wait`."""

    capacity = 1
    sharers = 1

    def __init__(self, evaluate: Evaluate, device: str = "cpu") -> None:
        self.device = device
        self._evaluate = evaluate
        self._jobs: list[Job] = []
        self._lost = ""
        """Why the device cannot be used any more."""

    def submit(self, job: Job) -> None:
        """Take a job.

        Raises:
            EnvironmentFaultError: if the GPU cannot be used any more.
        """
        if self._lost:
            raise EnvironmentFaultError(
                f"{self._lost}; this process cannot use its GPU any more: run the same command"
                " again. No further trial is used up"
            )
        self._jobs.append(job)

    def wait(self, timeout: float) -> list[Result]:
        """Evaluate the next job, however long it takes.

        Changes of this process by its code are undone. Its output goes to stderr. An exception of
        any kind is its failure. Ctrl-C, SIGTERM and SIGHUP end the wait, even if its code swallows
        the exception.
        """
        from moenas.evaluate.devices import named, prepare_process
        from moenas.evaluate.isolation import put_back, stdout_to_stderr

        if not self._jobs:
            return []
        job = self._jobs.pop(0)
        sent: object = None
        weights: object = None
        failure: Failure | None = None
        with put_back(), stdout_to_stderr(), _signals() as signals:
            try:
                prepare_process(named(job.device))
                sent, weights = self._evaluate(job)
            except BaseException as error:
                if signals:
                    raise
                failure = _inline_failure(error)
        if signals:
            raise KeyboardInterrupt
        result = Result(job, failure) if failure else checked_result(job, sent, weights)
        self._look_after(result)
        return [result]

    def _look_after(self, result: Result) -> None:
        """Free what a candidate has left on a GPU, and see whether the GPU can still be used."""
        from moenas.evaluate.devices import has_gpu, named, tidy

        if result.job.device == "cpu" or not has_gpu():
            return
        if why := tidy(named(result.job.device)):
            self._lost = f"trial {result.job.trial} ended with an error of CUDA: {why}"

    def close(self) -> None:
        """Forget the jobs that have not begun."""
        self._jobs.clear()


def _inline_failure(error: BaseException) -> Failure:
    """Say why no evaluation came back."""
    failure = failure_of(error)
    if failure.kind == "error":
        return replace(failure, message=error_line(error))
    return failure


HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run."""


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note which of SIGINT, SIGTERM and SIGHUP came, and hand them to the handlers that were there.

    So an interrupt by the user differs from a KeyboardInterrupt that a candidate raises.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in HEEDED}

    def note(number: int, frame: object) -> None:
        came.append(number)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)  # type: ignore[arg-type]

    noted = [number for number, handler in before.items() if callable(handler)]
    for number in noted:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number in noted:
            with suppress(ValueError):
                signal.signal(number, before[number])
