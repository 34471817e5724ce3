"""When a run stops early: one failure again and again, a failing machine, no new candidate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from moenas.errors import EnvironmentFaultError, NoCandidateError, StudyStoppedError
from moenas.records import Evaluation, Failure

if TYPE_CHECKING:
    from moenas.study.candidate import Candidate

ENVIRONMENT: Final = "environment"
"""Kind of a failure that is the machine's, not the candidate's."""
ENVIRONMENT_FAULTS = 5
"""Faults of the environment in a row, pauses between them, before the run stops."""
FIRST_PAUSE_S = 1.0
"""Pause after a first fault of the environment; each further one in a row doubles it."""
LONGEST_PAUSE_S = 30.0
TRIES = 4
"""Faults of the environment of one candidate, others evaluated between them, that make it fail."""
TRIES_ALONE = 2 * ENVIRONMENT_FAULTS + 1
"""The same over all runs, where no other candidate shows that the environment works."""

SAME_FAILURES = 5
"""Candidates in a row that fail for one reason before the run stops."""
FINAL = ("diverged", "acausal", "collapsed")
"""Kinds of failure that another candidate of the same model would end with, too."""
OF_THE_CANDIDATE = (*FINAL, "timeout", "out_of_memory", ENVIRONMENT)
"""Kinds of failure that stop a run only where no candidate has been complete yet: a space may hold
many such models."""

CRASH_RETRIES = 2
"""Times that a candidate is tried again after its worker process died."""
CRASHES = 5
"""Candidates in a row that use up their retries before the run stops."""
DRAWS = 1000
"""Draws in a row that give nothing to evaluate before a study ends."""


def reason(evaluation: Evaluation) -> str:
    """Say in one line why a trial has no values."""
    if evaluation.failure:
        return str(evaluation.failure)
    if evaluation.status == "stopped":
        return "stopped early"
    return "breaks " + ", ".join(evaluation.violations)


class EnvironmentFaults:
    """Faults of the environment: how long to pause after one, and when to stop the run."""

    def __init__(self, study: str) -> None:
        self._study = study
        self._streak = 0
        self._until = 0.0
        self._successes = 0
        self._seen: dict[int, set[int]] = {}
        """Trial -> how many candidates had been evaluated at each of its faults."""

    @property
    def pause(self) -> float:
        """Seconds for which nothing must be started."""
        return max(0.0, self._until - time.monotonic())

    def succeeded(self) -> None:
        """A worker gave a result that is not a fault of the environment."""
        self._streak = 0
        self._successes += 1

    def failed(self, failure: Failure) -> None:
        """Count a fault; several at a time count once.

        Raises:
            EnvironmentFaultError: after ENVIRONMENT_FAULTS in a row.
        """
        if self.pause:
            return
        self._streak += 1
        if self._streak >= ENVIRONMENT_FAULTS:
            raise EnvironmentFaultError(
                f"study '{self._study}': {self._streak} times in a row no candidate could be"
                f" evaluated here: {failure.message}; put that right and resume. No trial is used"
                " up"
            )
        pause = min(FIRST_PAUSE_S * 2 ** (self._streak - 1), LONGEST_PAUSE_S)
        self._until = time.monotonic() + pause

    def exhausted(self, trial: int, tries: int) -> bool:
        """Say whether a trial is to fail itself, now that it has met `tries` faults."""
        seen = self._seen.setdefault(trial, set())
        seen.add(self._successes)
        return (len(seen) > 1 and tries >= TRIES) or tries >= TRIES_ALONE


class DelayedCandidates:
    """Candidates that met a fault of the environment and start again.

    One starts once another candidate has ended: that tells whether the environment or the
    candidate is at fault.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Candidate, int]] = []
        """Candidates, each with the number of results at its fault."""
        self._results = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Candidate]:
        return (candidate for candidate, _ in self._waiting)

    def count_result(self) -> None:
        """Count a result that came back in this run."""
        self._results += 1

    def add(self, candidate: Candidate) -> None:
        """Delay a candidate."""
        self._waiting.append((candidate, self._results))

    def pop(self, nothing_else: bool) -> Candidate | None:
        """Return the candidate to start now, or None; any one if there is nothing else to do."""
        for index, (candidate, results) in enumerate(self._waiting):
            if nothing_else or self._results > results:
                del self._waiting[index]
                return candidate
        return None


class CrashedCandidates:
    """Candidates whose worker processes died at every try.

    They are held until another candidate shows that workers live; all workers may die, such as
    where memory is short.
    """

    def __init__(self, study: str) -> None:
        self._study = study
        self._held: list[tuple[Candidate, Evaluation]] = []

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Candidate]:
        return (candidate for candidate, _ in self._held)

    def hold(self, candidate: Candidate, evaluation: Evaluation) -> None:
        """Hold a candidate.

        Raises:
            StudyStoppedError: if CRASHES candidates are held; the next run evaluates them.
        """
        self._held.append((candidate, evaluation))
        if len(self._held) >= CRASHES:
            raise StudyStoppedError(
                f"study '{self._study}': the worker processes of {CRASHES} candidates in a row"
                f" died, {CRASH_RETRIES + 1} of each, the last: {reason(evaluation)}; if memory is"
                " short, run it again with fewer --workers. No trial is used up"
            )

    def release(self) -> list[tuple[Candidate, Evaluation]]:
        """Return the candidates that are held, each with its evaluation, and hold none."""
        held, self._held = self._held, []
        return held


class RepeatedFailures:
    """Counts candidates in a row that fail for one reason."""

    def __init__(self, study: str) -> None:
        self._study = study
        self._last: Failure | None = None
        self._times = 0

    def add(self, evaluation: Evaluation, any_complete: bool) -> None:
        """Take in a finished trial.

        Raises:
            StudyStoppedError: at SAME_FAILURES in a row.
        """
        failure = evaluation.failure
        if failure is not None and failure.kind == "crashed":  # see `CrashedCandidates`
            return
        if failure is None or (any_complete and failure.kind in OF_THE_CANDIDATE):
            self._last, self._times = None, 0
            return
        same = self._last is not None and failure.has_reason_of(self._last)
        self._times = self._times + 1 if same else 1
        self._last = failure
        if self._times >= SAME_FAILURES:
            which = "candidates in a row" if any_complete else "first candidates"
            raise StudyStoppedError(
                f"study '{self._study}': the {self._times} {which} all failed for one reason:"
                f" {reason(evaluation)}; put that right, then `moenas retry` runs them again"
            )


class FruitlessDraws:
    """Counts draws in a row that give nothing to evaluate."""

    def __init__(self, study: str) -> None:
        self._study = study
        self._broken: Counter[str] = Counter()
        self.fruitless = 0
        """Draws since the last one that was sent to a worker."""

    @property
    def over(self) -> bool:
        """Whether the bound is reached."""
        return self.fruitless >= DRAWS

    def add(self, broken: dict[str, float]) -> None:
        """Take in a draw that is not evaluated; `broken` are the requirements that it breaks."""
        self.fruitless += 1
        self._broken.update(broken.keys())

    def started(self) -> None:
        """A draw is sent to a worker."""
        self.fruitless = 0
        self._broken.clear()

    def text(self) -> str:
        """Say what the draws were."""
        head = f"{self.fruitless} draws in a row gave no new candidate"
        if not self._broken:
            return f"{head}: all were models that are evaluated already"
        most, times = self._broken.most_common(1)[0]
        return (
            f"{head}: {times} of them broke '{most}'; loosen it, or take the options out of the"
            " space that break it"
        )

    def error(self) -> NoCandidateError:
        """Return the error of a study without any complete trial."""
        return NoCandidateError(f"study '{self._study}': {self.text()}")
