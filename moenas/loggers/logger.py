"""The base of the loggers: a thread writes, so that failures and delays do not harm a run."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from abc import abstractmethod
from types import TracebackType
from typing import ClassVar, Self

from moenas.failures import error_line
from moenas.loggers.trial_log import TrialLog, trial_log
from moenas.study.events import Event, ToleratedListener

WAIT_S = 60.0
"""Seconds that the end of a run waits for what is not written yet."""


class Logger(ToleratedListener):
    """A listener that writes each evaluated trial to a tool, in a thread of its own.

    The first failure ends the logging: the run has one warning and goes on. `close` ends the
    thread; a `with` statement calls it.
    """

    tool: ClassVar[str]
    """Name of the tool, for warnings."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[TrialLog | None] = queue.Queue()
        self._error: Exception | None = None
        self._is_reported = False
        self._thread: threading.Thread | None = None

    def __str__(self) -> str:
        return f"the logger of {self.tool}"

    @abstractmethod
    def write(self, trial: TrialLog) -> None:
        """Write one trial, and how far its study is."""

    def finish(self) -> None:
        """End what is open at the tool."""

    def __call__(self, event: Event) -> None:
        """Take an event of the run.

        Raises:
            Exception: what the tool raised since the event before, once.
        """
        logged = trial_log(event)
        if logged is not None:
            self._put(logged)
        if event.kind == "done":
            self._put(None)
            self._wait()
        self._report()

    def close(self) -> str | None:
        """End the logging; return why something is not written, unless a run was told."""
        self._put(None)
        self._wait()
        try:
            self._report()
        except Exception as error:
            return f"{self} fails: {error_line(error)}"
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (problem := self.close()) is not None:
            warnings.warn(problem, stacklevel=2)

    def _put(self, item: TrialLog | None) -> None:
        """Hand an item to the thread, which is started by the first trial and ends at None."""
        thread = self._thread
        if item is not None and (thread is None or not thread.is_alive()):
            if self._error is not None:
                return
            self._waiting = queue.Queue()
            self._thread = threading.Thread(
                target=self._work, args=(self._waiting,), name=str(self), daemon=True
            )
            self._thread.start()
        self._waiting.put(item)

    def _work(self, waiting: queue.Queue[TrialLog | None]) -> None:
        """Write the records that come until None or the first failure."""
        try:
            while (item := waiting.get()) is not None:
                self.write(item)
            self.finish()
        except Exception as error:
            self._error = error

    def _wait(self) -> None:
        """Wait until the thread has ended, for at most WAIT_S seconds."""
        if self._thread is None or self._is_reported:
            return
        began = time.monotonic()
        self._thread.join(WAIT_S)
        if self._thread.is_alive():
            waited = time.monotonic() - began
            self._error = TimeoutError(f"not everything is written after {waited:.0f} s")

    def _report(self) -> None:
        """Raise the first failure, once."""
        if self._error is not None and not self._is_reported:
            self._is_reported = True
            raise self._error
