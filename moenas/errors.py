"""The exception tree: kinds of errors, and the exit code of each.

MoenasError                      1   anything that moenas itself raises
|-- InputError                   2   what the user wrote or named is wrong; no study was created
|   |-- LocatedError                 something at one place of what the user wrote
|   |   |-- SpaceError               a space file, an override or an architecture
|   |   `-- DataError                a corpus that cannot be read or is too small
|   |-- PartError                    a part of the user's raised, or gave what cannot be used
|   |-- NotFoundError                a study, trial, space, objective or figure that does not exist
|   |-- ConflictError                a study whose state or name does not allow what was asked
|   `-- StorageError                 a database that cannot be opened, read or written at the start
|-- NoCandidateError             3   the study ended without one feasible, complete trial
|-- StorageLostError             4   the database or the Ray cluster went away in mid-study
|-- EnvironmentFaultError        4   the machine fails every candidate; the same command resumes
|-- StudyStoppedError            1   several candidates in a row failed for one reason
|-- StudyBusyError               6   another process is running this study
|-- MachineError                     this machine or its surroundings; no candidate is at fault
`-- CandidateError                   one candidate failed; becomes a row with a reason
    |-- DivergedError                its loss stopped being finite
    |-- AcausalError                 it looks at later tokens, or at other sequences
    |-- CollapsedError               hardly any expert of one of its layers is used
    |-- NoRoomError                  it needs more memory than its device has
    `-- TimeLimitError               it used up its time limit
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

FailureKind = Literal[
    "diverged",  # the loss stopped being finite
    "acausal",  # a logit depends on a later token or on another sequence
    "collapsed",  # hardly any expert of a layer gets tokens
    "timeout",  # the candidate used up its time limit
    "out_of_memory",
    "crashed",  # the worker process died
    "error",  # the candidate's code raised
    "refused",  # the job names something that cannot be read or used
    "environment",  # the machine or its surroundings are at fault, not the candidate
    "invalid",  # what a worker or an objective sent is no evaluation
    "internal",  # moenas itself raised
    "parameters",  # the trial's parameters are no point of the space
    "sampler",  # the sampler raised, so the trial has no parameters
    "foreign",  # another program made and finished the trial
]
"""Why a trial has no values."""
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(frozen=True)
class SourceLocation:
    """A place in what the user wrote; line and column count from 1, and are 0 where unknown."""

    source: str
    """The file as the user named it, or the override; empty for plain data."""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class MoenasError(Exception):
    """Base of every error that moenas raises on purpose."""

    exit_code = 1

    def plain(self) -> dict[str, Any]:
        """Return the error as a JSON object: its class and its message."""
        return {"error": type(self).__name__, "message": str(self)}


class InputError(MoenasError):
    """What the user wrote or named is wrong."""

    exit_code = 2


class LocatedError(InputError):
    """Something at one place of what the user wrote is wrong.

    The message says what is wrong and what would be right; place and field are arguments:

        raise SpaceError("0 is below 1", location=node.mark, path="train.batch")

    `Node.error(path, message)` builds a SpaceError for a node of a file. `str(error)` is
    `file:line:column: path: message`, of which it leaves out what is None. Code that needs a part
    reads the attribute and never takes the text apart.

    Attributes:
        message: what is wrong; what would be right.
        location: file, line and column; None for plain data.
        path: the dotted path of the field, such as `architecture.blocks.0.repeat`; or None.
    """

    def __init__(
        self, message: str, *, location: SourceLocation | None = None, path: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.location = location if location is not None and location.source else None
        self.path = path or None

    def __str__(self) -> str:
        place = None if self.location is None else str(self.location)
        return ": ".join(part for part in (place, self.path, self.message) if part is not None)

    def plain(self) -> dict[str, Any]:
        """Return the error as a JSON object: class, message, path, file, line and column."""
        place = self.location or SourceLocation("")
        return {
            "error": type(self).__name__,
            "message": self.message,
            "path": self.path,
            "file": place.source or None,
            "line": place.line or None,
            "column": place.column or None,
        }


class SpaceError(LocatedError):
    """A space file, an override or an architecture is not valid."""


class DataError(LocatedError):
    """A corpus cannot be read, or is too small for what is asked of it."""


class PartError(InputError):
    """A part of the user's raised, or gave what cannot be used."""


class NotFoundError(InputError):
    """A study, trial, space, objective or figure does not exist."""


class ConflictError(InputError):
    """The state or the name of a study does not allow the request."""


class StorageError(InputError):
    """A database cannot be opened, read or written."""


class NoCandidateError(MoenasError):
    """The study ended without one feasible, complete trial."""

    exit_code = 3


class StorageLostError(MoenasError):
    """The database or the Ray cluster went away in mid-study."""

    exit_code = 4


class EnvironmentFaultError(MoenasError):
    """The machine or its surroundings fail every candidate: a full disk, a changed corpus."""

    exit_code = 4


class StudyStoppedError(MoenasError):
    """Several candidates in a row failed for one reason, so the run stopped."""


class StudyBusyError(MoenasError):
    """Another process is running this study."""

    exit_code = 6


class MachineError(MoenasError):
    """The machine or its surroundings are at fault: a disk, a file, a lock, a device."""


class CandidateError(MoenasError):
    """One candidate failed; the study records the reason and goes on."""

    kind: FailureKind = "error"


class DivergedError(CandidateError):
    """The loss of a candidate stopped being finite."""

    kind = "diverged"


class AcausalError(CandidateError):
    """A logit of a candidate depends on a later token or on another sequence."""

    kind = "acausal"


class CollapsedError(CandidateError):
    """Almost no expert of a layer of a candidate gets tokens."""

    kind = "collapsed"


class NoRoomError(CandidateError):
    """A candidate needs more memory than its device has; nothing was built."""

    kind = "out_of_memory"


class TimeLimitError(CandidateError):
    """A candidate used up its time limit."""

    kind = "timeout"


def suggestion(word: str, words: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `words`, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
