"""The worker process of Ray: it runs one job or several, and ends all that they start."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moenas.checked import plain_json
from moenas.failures import error_line, failure_of, is_of_the_device
from moenas.processes import adopt_orphans, kill, kill_descendants, machine, process_start
from moenas.records import Failure, Job, Plain, WeightsFile
from moenas.workers.results import Evaluate

SAID = 4096
"""Characters that are kept of what a job prints."""
LINGER = 10.0
"""Seconds after its result at which a worker process ends itself, whatever still runs in it."""
REPLY_BYTES = 256 * 2**20
"""Size of an evaluation as JSON at most."""


class _Printed(io.TextIOBase):
    """Keeps the beginning of what is printed."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._length < SAID:
            self._parts.append(text[: SAID - self._length])
        self._length += len(text)
        return len(text)

    def text(self) -> str:
        """Return the kept output, and the number of characters that were dropped."""
        more = self._length - SAID
        return "".join(self._parts) + (f"\n... and {more} characters more" if more > 0 else "")


def work(evaluate: Evaluate, job: Plain, gpus: float) -> Iterator[Any]:
    """Say which process has begun, then return the result of the job; it is a Ray task.

    Orphans of the job become children of this process, so that none of them outlives it.
    """
    _begin(gpus)
    yield _greeting()
    reply = _reply(evaluate, job, gpus)
    kill_descendants(os.getpid())
    yield reply
    threading.Thread(target=_end, name="moenas-end", daemon=True).start()


class Worker:
    """Works on jobs one after another in one process; it is an actor of Ray.

    After each job the process is as it was before, as far as `isolation.put_back` says. Processes
    that the job started are ended, and its memory is freed.
    """

    def __init__(self, evaluate: Evaluate, gpus: float) -> None:
        self._evaluate, self._gpus = evaluate, gpus
        _begin(gpus)

    def work(self, job: Plain) -> Iterator[Any]:
        """Say that the job has begun, then return its result."""
        yield _greeting()
        from moenas.evaluate.isolation import put_back

        threads = set(threading.enumerate())
        with put_back():
            reply = _reply(self._evaluate, job, self._gpus)
        kill_descendants(os.getpid())
        reply["unfit"] = self._tidy(reply) or _left(threads)
        yield reply

    def _tidy(self, reply: Plain) -> str | None:
        """Free what the job left; say why the process must not work on another one."""
        from moenas.evaluate import cuda_graphs
        from moenas.evaluate.devices import has_gpu, named, tidy

        why = tidy(named("cuda" if self._gpus and has_gpu() else "cpu"))
        if why is None and cuda_graphs.faults:
            why = f"a capture of a CUDA graph failed: {cuda_graphs.faults[0]}"
        failure = _failure_in(reply)
        if why is None and failure is not None:
            faulty = failure.kind == "environment" or is_of_the_device(failure)
            why = failure.message if faulty else None
        return why


def _failure_in(reply: Plain) -> Failure | None:
    """Return the failure in a reply: of the job, or of its evaluation."""
    failure = reply.get("failure")
    if failure is None and "evaluation" in reply:
        evaluation = json.loads(reply["evaluation"])
        failure = evaluation.get("failure") if isinstance(evaluation, dict) else None
    if not isinstance(failure, dict):
        return None
    return Failure.parse(failure)


def _left(before: set[threading.Thread]) -> str | None:
    """Name a thread that a job has left running; a process cannot end it."""
    for thread in set(threading.enumerate()) - before:
        if not isinstance(thread, threading._DummyThread):  # a thread of a library in C
            return f"the thread {thread.name} still runs"
    return None


def _begin(gpus: float) -> None:
    """Set up a worker process.

    Ray hides no GPU from a worker that asks for none (from 2.56 on); CUDA reads the variable when
    it is used for the first time.
    """
    adopt_orphans()
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _greeting() -> Plain:
    """Return what tells the process from all others."""
    return {"pid": os.getpid(), "process_start": process_start(os.getpid()), "machine": machine()}


def _end() -> None:
    """End this process, for threads and exit handlers of the job could keep it."""
    time.sleep(LINGER)
    kill(os.getpid())


def _reply(evaluate: Evaluate, job: Plain, gpus: float) -> Plain:
    """Evaluate the job; return plain data, whatever its code raises."""
    printed, stdout = _Printed(), sys.stdout
    sys.stdout = printed
    reply: Plain = {}
    try:
        if gpus:
            from moenas.evaluate.devices import named, prepare_process

            prepare_process(named("cuda"), gpus)
        evaluation, weights = evaluate(Job.parse(job))
        plain = evaluation.plain() if hasattr(evaluation, "plain") else evaluation
        try:
            reply["evaluation"] = json.dumps(plain_json(plain, REPLY_BYTES))
        except ValueError as error:
            reply["failure"] = Failure("invalid", f"the result is no evaluation: {error}")
        known = weights is None or isinstance(weights, bytes | WeightsFile)
        reply["weights"] = weights if known else ""
    except BaseException as error:
        failure = failure_of(error)
        if failure.kind == "error":
            failure = replace(failure, message=error_line(error))
        reply["failure"] = failure
    finally:
        sys.stdout = stdout
    if "failure" in reply:
        reply["failure"] = reply["failure"].plain()
    return reply | {"printed": printed.text()}
