"""One study of a store: reads and writes of a run, without the study's name in every call."""

from __future__ import annotations

from moenas.errors import FailureKind
from moenas.records import EndReason, Evaluation, Failure, Plain, StudyRecord
from moenas.store import attempts, origins
from moenas.store.files import Root
from moenas.store.front_rows import FrontSummary
from moenas.store.object_path import ObjectPath
from moenas.store.store import Store


class StudyStore:
    """The rows of one study. Each method is one transaction; see `Store`."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    @property
    def runs(self) -> Root | ObjectPath:
        """The folder of the weights."""
        return self.store.runs

    def study(self) -> StudyRecord:
        """Return what is stored of the study itself."""
        return self.store.study(self.name)

    def set_trials(self, trials: int) -> None:
        """Set how many candidates the study is to evaluate in total."""
        self.store.set_trials(self.name, trials)

    def set_ended(self, reason: EndReason | None) -> None:
        """Store why the study is over; None if it is not."""
        self.store.set_ended(self.name, reason)

    # --- trials --------------------------------------------------------------------------------

    def add_candidate(
        self, trial: int, fingerprint: str, architecture: Plain, cost: dict[str, int]
    ) -> None:
        """Store what a trial is to evaluate; see `Store.add_candidate`."""
        self.store.add_candidate(self.name, trial, fingerprint, architecture, cost)

    def add_source(self, trial: int, source: str) -> None:
        """Store where the architecture of an enqueued trial is from."""
        origins.add_source(self.store, self.name, trial, source)

    def has_candidate(self, trial: int) -> bool:
        """Say whether a trial has a row of ours."""
        return attempts.has_candidate(self.store, self.name, trial)

    def candidates(self) -> set[int]:
        """Return the trials that have an architecture of ours."""
        return attempts.candidates(self.store, self.name)

    def architecture(self, trial: int) -> Plain:
        """Return the canonical architecture of a trial."""
        return self.store.architecture(self.name, trial)

    def start_attempt(self, trial: int) -> int:
        """Store that a trial is started once more; return the number of the attempt, from 1."""
        return self.store.start_attempt(self.name, trial)

    def end_attempt(self, trial: int, attempt: int, failure: Failure) -> None:
        """Store why an attempt gave no evaluation; the trial stays without one."""
        attempts.end(self.store, self.name, trial, attempt, failure)

    def attempts(self, trial: int) -> int:
        """Return how many times a trial was started."""
        return self.store.attempts(self.name, trial)

    def failed_attempts(self, trial: int, kind: FailureKind) -> int:
        """Return how many attempts of a trial ended by a kind of failure."""
        return attempts.failed(self.store, self.name, trial, kind)

    # --- evaluations ---------------------------------------------------------------------------

    def record(self, evaluation: Evaluation) -> FrontSummary | None:
        """Store an evaluation and return the front after it; None if it does not count."""
        return self.store.record(evaluation)

    def evaluation(self, trial: int) -> Evaluation | None:
        """Return the evaluation of a trial, or None if there is none yet."""
        return self.store.evaluation(self.name, trial)

    def evaluations(self) -> list[Evaluation]:
        """Return all evaluations in order of their trials."""
        return self.store.evaluations(self.name)

    def front_summary(self) -> FrontSummary:
        """Return the size of the front and its hypervolume."""
        return self.store.front_summary(self.name)

    # --- the reference model -------------------------------------------------------------------

    def reference_ms(self) -> dict[str, float]:
        """Return device and workload -> time of the reference model there, in ms."""
        return self.store.reference_ms(self.name)

    def set_reference_ms(self, key: str, ms: float) -> float:
        """Fix the time of the reference model, if none is fixed; return the one that holds."""
        return self.store.set_reference_ms(self.name, key, ms)
