"""A process that stays and runs one task after another, so that its caller needs no PyTorch."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from moenas.errors import MoenasError

T = TypeVar("T")

TIMEOUT_S = 120.0
"""Seconds that a task may take, its wait for the process not included."""


class TaskTimeoutError(MoenasError):
    """A task took too long and was ended."""


class TaskLostError(MoenasError):
    """The process of a task died, or the task failed by a mistake of moenas."""


def _serve(connection: Connection) -> None:
    """Run the tasks that come over the connection, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes it
    while True:
        try:
            function, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[str, Any]
        try:
            answer = ("done", function(*args, **kwargs))
        except MoenasError as error:
            answer = ("error", error)
        except Exception:
            answer = ("lost", traceback.format_exc())
        try:
            connection.send(answer)
        except (TypeError, AttributeError, ValueError) as error:  # it cannot be pickled
            connection.send(("lost", str(error)))


class TaskProcess:
    """One process, started at the first task and after its death; tasks wait for one another."""

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def call(
        self, function: Callable[..., T], *args: Any, timeout: float = TIMEOUT_S, **kwargs: Any
    ) -> T:
        """Run a function of a module in the process and return its result.

        Raises:
            MoenasError: as the function raised it. TaskTimeoutError: after `timeout` seconds; the
            process is ended. TaskLostError: if the process dies, or the function raises another
            exception.
        """
        with self._lock:
            connection, process = self._ready()
            try:
                connection.send((function, args, kwargs))
                if not wait([connection, process.sentinel], timeout):
                    self._end()
                    raise TaskTimeoutError(f"it took longer than {timeout:.0f} s and was ended")
                kind, value = connection.recv()
            except (EOFError, OSError) as error:
                self._end()
                raise TaskLostError(f"the process of {self._name} died") from error
        if kind == "done":
            result: T = value
            return result
        if kind == "error":
            raise value
        raise TaskLostError(f"{self._name} failed: {value}")

    def _ready(self) -> tuple[Connection, BaseProcess]:
        if self._process is not None and self._connection is not None and self._process.is_alive():
            return self._connection, self._process
        self._end()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), name=self._name, daemon=True)
        process.start()
        theirs.close()
        self._process, self._connection = process, ours
        return ours, process

    def close(self) -> None:
        """End the process; a task that it runs is lost."""
        process = self._process
        with suppress(ValueError):  # it was closed meanwhile
            if process is not None:
                process.kill()
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            with suppress(ValueError):
                self._process.kill()
                self._process.join()
                self._process.close()
        self._process = self._connection = None
