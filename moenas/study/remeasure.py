"""Objectives of finished trials, measured again from their stored weights, without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from moenas.errors import InputError, MoenasError, NotFoundError
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Failure, Job, Plain, StudyRecord
from moenas.search.trials import outcome
from moenas.space.objective import Objective, load_objective
from moenas.store import replicates, rungs, weights
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store
from moenas.store.study_store import StudyStore
from moenas.study import repairs
from moenas.study.changes import changed_objectives
from moenas.study.jobs import Jobs
from moenas.study.result_processing import ResultProcessor
from moenas.study.stop_rules import CRASH_RETRIES
from moenas.study.uncommitted import UncommittedResults
from moenas.workers.pool import Pool, Result

if TYPE_CHECKING:
    from moenas.data.corpus import Corpus
    from moenas.space.space import Space

Progress = Callable[[int, int, Evaluation], None]
"""Takes how many trials are measured, of how many, and the latest one."""


@dataclass(frozen=True)
class Remeasured:
    """What a new measurement of a study gave."""

    objectives: list[str]
    trials: list[int]
    """Trials that were measured."""
    complete: int
    """How many of these trials are complete now."""
    failed: int


def chosen_objectives(
    record: StudyRecord, space: Space, ref: str | None, trial: int | None
) -> list[Objective]:
    """Return the objectives to measure: the one named, or those whose files have changed.

    With a trial and no name, all of the study's.

    Raises:
        InputError: if there is nothing to measure, or a changed objective is asked for one trial.
    """
    changed = changed_objectives(record, space)
    if ref is None:
        chosen = list(space.objectives) if trial is not None else changed
    else:
        chosen = [o for o in space.objectives if ref in (o.name, o.path)] or [load_objective(ref)]
    if not chosen:
        raise InputError(
            f"study '{record.name}': no objective's file has changed; name one by --objective, or"
            " a trial"
        )
    mixed = [o.name for o in chosen if o in changed]
    if mixed and trial is not None:
        raise InputError(
            f"study '{record.name}': the file of '{mixed[0]}' has changed, so all trials must be"
            " measured again, that one front does not mix two measurements; leave the trial out"
        )
    return chosen


class Remeasurer:
    """Measures objectives of the finished trials of one study."""

    def __init__(
        self, store: Store, space: Space, corpus: Corpus, *, elsewhere: bool = False
    ) -> None:
        """Take the study and its corpus; `elsewhere` goes to `Jobs`."""
        self._store, self._space = store, space
        self._record = store.study(space.name)
        study = StudyStore(store, space.name)
        self._jobs = Jobs(study, space, corpus, elsewhere=elsewhere)
        self._results = ResultProcessor(study, space)
        self._constraints: dict[int, dict[str, float]] = {}
        """Number of a trial that was judged -> violations of requirements of the trained model."""

    def run(
        self,
        pool: Pool,
        objectives: Sequence[Objective],
        trial: int | None = None,
        progress: Progress | None = None,
    ) -> Remeasured:
        """Measure, then store all values, Optuna's and the front in one transaction.

        A candidate whose objective fails now becomes failed; one whose objective failed before
        becomes complete. Nothing is stored if the run is stopped before its end.

        Raises:
            InputError: if the trial cannot be measured.
            MoenasError: if the machine fails a measurement.
        """
        name, store = self._space.name, self._store
        with StudyLease(store, name) as lease:
            UncommittedResults(store.runs, name).commit(store)
            todo = self._todo(trial)
            done: list[Evaluation] = []
            waiting = list(todo)
            running: dict[int, Evaluation] = {}
            crashes: Counter[int] = Counter()
            while waiting or running:
                while waiting and len(running) < pool.capacity:
                    known = waiting.pop(0)
                    running[known.trial] = known
                    pool.submit(self._job(pool, known, objectives))
                for result in pool.wait(0.5):
                    known = running.pop(result.job.trial)
                    if _died(result) and crashes[known.trial] < CRASH_RETRIES:
                        crashes[known.trial] += 1
                        waiting.append(known)
                        continue
                    merged = self._merged(known, result, objectives)
                    self._results.add(merged)
                    done.append(merged)
                    if progress is not None:
                        progress(len(done), len(todo), merged)
                lease.check()
            done += self._copies(done)
            self._store_all(done + self._outdated(objectives), objectives)
        complete = sum(e.status == "complete" for e in done)
        failed = sum(e.status == "failed" for e in done)
        names = [o.name for o in objectives]
        return Remeasured(names, [e.trial for e in done], complete, failed)

    def _todo(self, trial: int | None) -> list[Evaluation]:
        """Return the evaluations to measure: complete ones, and those with stored weights."""
        stored = self._store.evaluations(self._space.name)
        evaluations = [
            e
            for e in stored
            if not e.is_copy
            and (e.status == "complete" or e.weights_sha256 is not None)
            and (trial is None or e.trial == trial)
        ]
        if not evaluations and trial is not None:
            raise InputError(
                f"study '{self._space.name}': trial {trial} is not complete and has no stored"
                " weights; there is nothing to measure again"
            )
        for other in stored if trial is not None else ():
            if other.trial != trial:  # all latencies of a study come from one device
                self._results.add(other)
        return evaluations

    def _job(self, pool: Pool, known: Evaluation, objectives: Sequence[Objective]) -> Job:
        """Return the job of one trial, with its stored weights if an objective needs them."""
        name, runs, digest = self._space.name, self._store.runs, known.weights_sha256
        more: Plain = {"known": self._with_time(known).plain()}
        if digest and any(o.needs == "training" for o in objectives):
            more |= weights.for_job(runs, name, known.trial, digest)
        architecture = self._store.architecture(name, known.trial)
        more |= {"device": pool.device, "sharers": pool.sharers}
        return self._jobs.job(known.trial, known.attempt, architecture, objectives, **more)

    def _with_time(self, known: Evaluation) -> Evaluation:
        """Return a reused evaluation with the time of the training in the study that trained it."""
        first: Evaluation | None = known
        try:
            while first is not None and (source := first.reused_from) is not None:
                first = self._store.evaluation(source["study"], source["trial"])
        except NotFoundError:  # that study is deleted
            first = None
        if first is None or "train" not in first.seconds:
            return known
        return replace(known, seconds=known.seconds | {"train": first.seconds["train"]})

    def _merged(
        self, known: Evaluation, result: Result, objectives: Sequence[Objective]
    ) -> Evaluation:
        """Return the stored evaluation with the new values."""
        outcome = result.outcome
        failure = outcome if isinstance(outcome, Failure) else outcome.failure
        if failure is not None and failure.kind == "environment":
            raise MoenasError(
                f"study '{known.study}', trial {known.trial}: {failure.message}; nothing is stored"
            )
        own = {o.name for o in self._space.objectives}
        if failure is not None and own & {o.name for o in objectives}:
            return replace(known, status="failed", failure=failure)
        if isinstance(outcome, Failure):
            return known
        merged = replace(
            known,
            values=known.values | outcome.values,
            measurements=known.measurements | outcome.measurements,
        )
        if not own <= merged.values.keys():
            return merged
        architecture = Architecture.parse(result.job.architecture)
        complete = replace(merged, status="complete", failure=None, violations={})
        judged, self._constraints[known.trial] = self._results.judge(architecture, complete)
        return judged

    def _copies(self, done: Sequence[Evaluation]) -> list[Evaluation]:
        """Return the copies of measured trials with their values."""
        by_trial = {float(e.trial): e for e in done}
        return [
            replace(
                e,
                status=source.status,
                values=source.values,
                measurements=source.measurements,
                failure=source.failure,
                violations=source.violations,
            )
            for e in self._store.evaluations(self._space.name)
            if (source := by_trial.get(e.metrics.get("copied_from", -1.0))) is not None
        ]

    def _outdated(self, objectives: Sequence[Objective]) -> list[Evaluation]:
        """Return infeasible and stopped trials without the values of changed objectives.

        Their weights were not kept. Without a value Optuna holds such a trial as one that was not
        measured, so that no sampler learns from two measurements under one name.
        """
        changed = changed_objectives(self._record, self._space)
        names = {o.name for o in objectives if o in changed}
        return [
            replace(
                e,
                values={k: v for k, v in e.values.items() if k not in names},
                measurements={k: v for k, v in e.measurements.items() if k not in names},
            )
            for e in self._store.evaluations(self._space.name)
            if e.status in ("infeasible", "stopped")
            and e.weights_sha256 is None
            and names & e.values.keys()
        ]

    def _trained_violations(self, evaluation: Evaluation) -> dict[str, float]:
        """Return by how much each requirement of the trained model is broken, over 0, or met.

        A copy has the violations of its source.
        """
        source = int(evaluation.metrics.get("copied_from", evaluation.trial))
        if source in self._constraints:
            return self._constraints[source]
        return self._results.trained_violations(evaluation)

    def _store_all(self, done: Sequence[Evaluation], objectives: Sequence[Objective]) -> None:
        """Store values, digests, Optuna's rows and the front together."""
        record, space = self._record, self._space
        names = list(record.directions)
        changes = [
            repairs.Replacement(e, *outcome(e, names), self._trained_violations(e)) for e in done
        ]
        infos = [o.info() for o in objectives if o.name in names]
        all_current = all(o in objectives for o in changed_objectives(record, space))

        def store_rows(connection: Connection) -> None:
            repairs.replace_evaluations(connection, record, changes)
            changed = {o.name for o in objectives if o in changed_objectives(record, space)}
            if changed:
                rungs.drop(connection, record.name, changed)
                replicates.drop(connection, record.name)
            if all_current:
                repairs.accept(connection, record.name, space.plain(), space.sha256, infos)

        self._store.apply(record.name, store_rows)


def _died(result: Result) -> bool:
    """Say whether the worker process of a result died, which another try may not do."""
    return isinstance(result.outcome, Failure) and result.outcome.kind == "crashed"
