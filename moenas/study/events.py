"""What a run tells its listener: one event for each step of a trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moenas.errors import MoenasError
from moenas.records import Evaluation
from moenas.store.tally import Tally

Kind = Literal[
    "resumed", "started", "finished", "infeasible", "copied", "retried", "warning", "done"
]


class Interrupted(MoenasError):
    """The run was stopped by Ctrl-C or SIGTERM; the same call resumes the study."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Event:
    """Something that a listener may want to show."""

    kind: Kind
    trial: int | None
    text: str
    """The architecture in one line, or what happened."""
    evaluation: Evaluation | None
    tally: Tally


Listener = Callable[[Event], None]
