"""What runs in a worker process of Ray: one job, and the end of all that it started."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from moenas.checked import plain_json
from moenas.errors import MachineError
from moenas.failures import failure_of, one_line, traceback_of
from moenas.processes import adopt_orphans, born, kill, kill_descendants, machine
from moenas.records import Failure, Job, Plain
from moenas.results import Evaluate

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
        """Return what was kept, and how much more there was."""
        more = self._length - SAID
        return "".join(self._parts) + (f"\n... and {more} characters more" if more > 0 else "")


def work(evaluate: Evaluate, job: Plain, gpus: float) -> Iterator[Any]:
    """Say which process has begun, then give what came of the job; it is a task of Ray.

    Orphans of the job become children of this process, so that none of them outlives it.
    """
    adopt_orphans()
    yield {"pid": os.getpid(), "born": born(os.getpid()), "machine": machine()}
    reply = _reply(evaluate, job, gpus)
    kill_descendants(os.getpid())
    yield reply
    threading.Thread(target=_end, name="moenas-end", daemon=True).start()


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
        _require_gpu(gpus)
        evaluation, weights = evaluate(Job.parse(job))
        plain = evaluation.plain() if hasattr(evaluation, "plain") else evaluation
        try:
            reply["evaluation"] = json.dumps(plain_json(plain, REPLY_BYTES))
        except ValueError as error:
            reply["failure"] = Failure("invalid", f"what came back is no evaluation: {error}")
        reply["weights"] = weights if weights is None or isinstance(weights, bytes) else ""
    except BaseException as error:
        failure = failure_of(error)
        if failure.kind == "error":
            failure = Failure("error", one_line(error), traceback_of(error))
        reply["failure"] = failure
    finally:
        sys.stdout = stdout
    if "failure" in reply:
        reply["failure"] = reply["failure"].plain()
    return reply | {"printed": printed.text()}


def _require_gpu(gpus: float) -> None:
    """Refuse to evaluate on a CPU what asks for a GPU."""
    if gpus <= 0:
        return
    from moenas.subject import default_device

    if default_device().type == "cpu":
        raise MachineError(
            f"host {os.uname().nodename}: Ray has a GPU there, and PyTorch sees none"
        )
