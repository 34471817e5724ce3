"""The session of one run: both stores in agreement, its trials, progress and events."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from optuna.exceptions import StorageInternalError

from moenas.errors import (
    EnvironmentFaultError,
    NoCandidateError,
    StorageLostError,
    StudyBusyError,
    StudyStoppedError,
)
from moenas.failures import internal
from moenas.records import EndReason, Evaluation
from moenas.search.rungs import Rungs
from moenas.search.trials import OptunaTrials, outcome
from moenas.store.store import Store
from moenas.store.study_store import StudyStore
from moenas.study.budget import Budget
from moenas.study.candidate import Candidate
from moenas.study.doctor import check_start
from moenas.study.duplicates import DuplicateModels
from moenas.study.evaluation_cache import EvaluationCache
from moenas.study.events import EventEmitter, Kind, Listener
from moenas.study.latency_bounds import LatencyBounds
from moenas.study.paused_candidates import PausedCandidates
from moenas.study.progress import ProgressTracker
from moenas.study.reconcile import Difference, correct, differences, repair
from moenas.study.result_processing import ResultProcessor
from moenas.study.stop_rules import FruitlessDraws, reason
from moenas.study.uncommitted import UncommittedResults

if TYPE_CHECKING:
    from moenas.space.space import Space

ENDS_A_RUN = (
    StorageLostError,
    StudyBusyError,
    StudyStoppedError,
    EnvironmentFaultError,
    NoCandidateError,
    StorageInternalError,
)
"""Errors that end the run; every other exception is the failure of one candidate."""


class Session:
    """The state of a study that its driver reads and changes; `open` loads it."""

    def __init__(self, store: Store, space: Space, listeners: Sequence[Listener] = ()) -> None:
        self.name, self.space = space.name, space
        self.store = StudyStore(store, space.name)
        rungs = Rungs()
        self.trials = OptunaTrials(store, space, rungs)
        self.results = ResultProcessor(self.store, space)
        self.uncommitted = UncommittedResults(store.runs, space.name)
        self.progress = ProgressTracker({o.name: o.direction for o in space.objectives})
        self.events = EventEmitter(listeners, self.progress.snapshot)
        self.duplicates = DuplicateModels()
        self.draws = FruitlessDraws(space.name)
        self.cache = EvaluationCache(self.store, space)
        self.latency_bounds = LatencyBounds(self.store, space)
        self.budget = Budget(self.store, space.search.stop)
        self.paused = PausedCandidates(self.store, space, self.events, rungs)
        self.progress.paused, self.progress.at_rungs = self.paused, self.paused.pauses
        self._objectives = [o.name for o in space.objectives]
        self._epochs_told = False

    @classmethod
    def open(
        cls, store: Store, space: Space, total: int, listeners: Sequence[Listener] = ()
    ) -> Self:
        """Load a study that this process holds the lease of, and make both stores agree.

        `total` is how many candidates the study is to evaluate.
        """
        session = cls(store, space, listeners)
        session.trials.open()
        # 1. Results that an earlier run computed and could not commit.
        session.uncommitted.commit(store)
        # 2. Optuna's rows are made to agree with ours.
        differing, stored = session._reconcile()
        # 3. The front and the weights that the run relies on.
        for text in check_start(store, space.name, stored):
            session.events.warn(text)
        # 4. The state of the run.
        session.trials.load(stored)
        session.paused.load(stored)
        for evaluation in stored.values():
            session._count(evaluation)
        session.set_total(max(total, session.progress.evaluated))
        session.progress.start(session.store.front_summary())
        session.budget.start()
        if session.over is None:
            session.store.set_ended(None)
        session._report_differences(differing)
        return session

    def _reconcile(self) -> tuple[list[Difference], dict[int, Evaluation]]:
        """Make Optuna's rows agree with ours; return what differed, and our rows by trial."""
        stored = {e.trial: e for e in self.store.evaluations()}
        differing = differences(
            stored, self.store.candidates(), self.trials.frozen(), self._objectives
        )
        if differing:
            repair(self.store.store, self.trials.study, differing, stored, self._objectives)
            self.trials.open()  # Optuna caches finished trials
            stored = {e.trial: e for e in self.store.evaluations()}
            for difference in differing:
                if difference.kind == "untold":
                    self._tell(None, stored[difference.trial])
        return differing, stored

    def _report_differences(self, differing: Sequence[Difference]) -> None:
        """Warn of what another program has changed in Optuna's tables."""
        for kind, times in Counter(d.kind for d in differing if d.kind != "untold").items():
            first = next(d for d in differing if d.kind == kind)
            self.events.warn(
                f"Optuna's tables differed in {times} trials, such as {first.trial}: {first.text};"
                " both agree now"
            )

    # --- the end of a study --------------------------------------------------------------------

    @property
    def over(self) -> EndReason | None:
        """Why the study needs no more work; None if it does."""
        if self.trials.interrupted:
            return None
        if self.progress.evaluated >= self.progress.total:
            return "trials"
        if self.trials.stopped:
            return "sampler"
        if self.draws.over:
            return "draws"
        if self.trials.exhausted:
            return "exhausted"
        return self.budget.used_up

    def finish(self) -> None:
        """Store why the study is over, and tell the listeners.

        Raises:
            NoCandidateError: if not one trial is complete.
        """
        end = self.over
        assert end is not None
        self.events.raise_error()
        self.store.set_ended(end)
        self.budget.report(last=True)
        if self.progress.counts["complete"]:
            texts: dict[EndReason, str] = {
                "trials": f"all {self.progress.total} trials of study '{self.name}' are finished",
                "exhausted": f"every point of the space of study '{self.name}' was drawn",
                "sampler": f"the sampler of study '{self.name}' proposes nothing more",
                "draws": f"study '{self.name}' ends: {self.draws.text()}",
            }
            text = texts.get(end) or f"study '{self.name}' ends: {self.budget.text(end)}"
            self.events.emit("done", None, text)
            self.events.raise_error()
            return
        if end == "draws":
            raise self.draws.error()
        reasons = Counter(reason(e) for e in self.store.evaluations())
        if not reasons:
            text = f"study '{self.name}' ends before a first candidate: {self.budget.text(end)}"
            raise NoCandidateError(text)
        most, times = reasons.most_common(1)[0]
        raise NoCandidateError(
            f"study '{self.name}': none of its {reasons.total()} trials is complete; {times} of"
            f" them: {most}"
        )

    # --- finished trials -----------------------------------------------------------------------

    def set_total(self, total: int) -> None:
        """Set how many candidates the study is to evaluate."""
        self.progress.total = total
        self.store.set_trials(total)

    def record(
        self, candidate: Candidate, evaluation: Evaluation, kind: Kind, text: str
    ) -> Evaluation:
        """Store the evaluation of a trial, then tell Optuna, then the listeners.

        Returns what is stored: a failure, if the tables do not take the evaluation.

        Raises:
            StudyBusyError: if another process has evaluated the trial meanwhile.
        """
        try:
            front = self.store.record(evaluation)
        except ENDS_A_RUN:
            raise
        except Exception as error:  # a value that the tables do not take
            evaluation = candidate.evaluation(
                self.name,
                evaluation.attempt,
                "failed",
                failure=internal(error),
                seed=evaluation.seed,
            )
            front = self.store.record(evaluation)
        if front is None:
            raise StudyBusyError(
                f"study '{self.name}': another process has evaluated trial {evaluation.trial}"
                " meanwhile"
            )
        self.progress.front = front
        self._count(evaluation)
        self.budget.add(evaluation)
        self._warn_of_epochs(evaluation)
        self._tell(candidate, evaluation)
        self.paused.finished(evaluation)
        self.events.emit(kind, candidate.number, text, evaluation, candidate.trial.params)
        return evaluation

    def _warn_of_epochs(self, evaluation: Evaluation) -> None:
        """Warn once of a run whose budget of seconds held more tokens than the corpus has."""
        tokens = evaluation.metrics.get("train_tokens", 0)
        if self._epochs_told or tokens <= (known := evaluation.data.get("train_tokens", math.inf)):
            return
        self._epochs_told = True
        self.events.warn(
            f"data: {tokens:,.0f} tokens of training were drawn from {known:,}: each is seen"
            f" {tokens / known:.1f} times",
            evaluation.trial,
        )

    def _count(self, evaluation: Evaluation) -> None:
        """Add a finished trial to the state of the run."""
        self.progress.add(evaluation)
        self.results.add(evaluation)
        self.duplicates.add(evaluation)

    def _tell(self, candidate: Candidate | None, evaluation: Evaluation) -> None:
        """Tell Optuna an evaluation that is stored; correct its row if it does not take it."""
        try:
            if candidate is None:
                violations = self.results.trained_violations(evaluation)
                self.trials.tell_stored(evaluation, violations)
            else:
                self.trials.tell(
                    candidate.trial, evaluation, candidate.trained_violations, candidate.summary
                )
        except ENDS_A_RUN:
            raise
        except Exception as error:
            state = outcome(evaluation, self._objectives)
            correct(self.store.store, self.name, evaluation.trial, *state)
            self.events.warn(f"Optuna's row is corrected to ours: {error}", evaluation.trial)
