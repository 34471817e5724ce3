"""Events of a run, one for each step of a trial, and the listeners that they go to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moenas.errors import MoenasError
from moenas.failures import error_line
from moenas.records import Evaluation, Plain
from moenas.study.progress import Progress

Kind = Literal[
    "resumed",
    "started",
    "paused",
    "promoted",
    "finished",
    "stopped",
    "infeasible",
    "copied",
    "reused",
    "retried",
    "replicating",
    "replicated",
    "state",  # a study of a server has another state of its queue
    "warning",
    "done",
]


class Interrupted(MoenasError):
    """The run was stopped by Ctrl-C or SIGTERM; the same call resumes the study."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Event:
    """One step of a trial, or a message about the study."""

    kind: Kind
    trial: int | None
    text: str
    """The architecture in one line, or what happened."""
    evaluation: Evaluation | None
    progress: Progress
    params: Plain | None = None
    """Hole -> drawn value, of a finished trial."""


Listener = Callable[[Event], None]


class ToleratedListener(ABC):
    """A listener whose failure is one warning, after which it gets no further events."""

    @abstractmethod
    def __call__(self, event: Event) -> None:
        """Take an event of the run."""


class EventEmitter:
    """Sends events to the listeners of a run.

    What a listener raises ends the run, but not between two writes: `raise_error` raises it. A
    `ToleratedListener` that raises is left out from then on, with a warning.
    """

    def __init__(self, listeners: Sequence[Listener], progress: Callable[[], Progress]) -> None:
        self._listeners, self._progress = list(listeners), progress
        self._error: Exception | None = None

    def add(self, listener: Listener) -> None:
        """Send later events to one more listener."""
        self._listeners.append(listener)

    def emit(
        self,
        kind: Kind,
        trial: int | None,
        text: str,
        evaluation: Evaluation | None = None,
        params: Plain | None = None,
    ) -> None:
        """Send an event with the progress of the study now."""
        event = Event(kind, trial, text, evaluation, self._progress(), params)
        warnings = []
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception as error:
                if isinstance(listener, ToleratedListener):
                    self._listeners.remove(listener)
                    reason = error_line(error)
                    warnings.append(f"{listener} fails and gets no further events: {reason}")
                else:
                    self._error = self._error or error
        for warning in warnings:
            self.warn(warning)

    def warn(self, text: str, trial: int | None = None) -> None:
        """Send a warning."""
        self.emit("warning", trial, text)

    def raise_error(self) -> None:
        """Raise the first exception that a listener raised, if one did."""
        if self._error is not None:
            raise self._error
