"""One run of a study: ask, check, evaluate, store, tell; any step may be its last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from optuna.exceptions import StorageInternalError

from moenas.errors import (
    EnvironmentFaultError,
    NoCandidateError,
    PartError,
    StorageLostError,
    StudyBusyError,
    StudyStoppedError,
)
from moenas.failures import internal
from moenas.grammar.summary import one_line
from moenas.records import Evaluation, Failure, Job, Plain
from moenas.search.trials import (
    OptunaTrials,
    ParametersError,
    SamplerFailedError,
    outcome,
)
from moenas.store import attempts
from moenas.store.heartbeat import Lease
from moenas.store.store import Store
from moenas.store.tally import Score
from moenas.store.weights import place
from moenas.study import stop_rules
from moenas.study.candidate import Candidate
from moenas.study.doctor import check_start
from moenas.study.events import Event, Kind, Listener
from moenas.study.intake import Intake
from moenas.study.jobs import Jobs
from moenas.study.reconcile import correct, differences, repair
from moenas.study.spool import Spool
from moenas.study.stop_rules import ENVIRONMENT, FINAL, Draws, Faults, SameFailures, reason
from moenas.workers.pool import Pool, Result

if TYPE_CHECKING:
    from optuna.trial import Trial

    from moenas.space.space import Space

POLL = 0.5
"""Seconds between looks at the lease and the figures."""
PUBLISH = 60.0
"""Seconds between updates of the dashboard's figures."""
ENDS_A_RUN = (
    StorageLostError,
    StudyBusyError,
    StudyStoppedError,
    EnvironmentFaultError,
    NoCandidateError,
    StorageInternalError,
)
"""What is not the fault of one candidate."""


class Driver:
    """The one process that asks and tells a study's sampler and writes its rows.

    Order of writes for a result: the weights' file, a file with the result, our rows in one
    transaction, then Optuna's. So a trial that Optuna holds for RUNNING at the start of a run has
    an evaluation of ours to be told from, or a file to be recorded, or is evaluated again under its
    own number: it keeps its parameters, for Optuna stored them when they were drawn.

    Whatever is raised between the draw of a candidate and its commit becomes a failed trial. Only
    what ENDS_A_RUN names ends the run.
    """

    def __init__(self, store: Store, space: Space, data_sha256: str, listener: Listener) -> None:
        self.store, self.space, self.name = store, space, space.name
        self.jobs, self.listener = Jobs(store, space, data_sha256), listener
        self.names = [o.name for o in space.objectives]
        self.asker = OptunaTrials(store, space)
        self.intake = Intake(store, space)
        self.score = Score({o.name: o.direction for o in space.objectives})
        self.running: dict[int, Candidate] = {}
        self.delayed: list[Candidate] = []
        """Candidates that start again once the environment has had its pause."""
        self.ended = 0
        """Results that came back in this run."""
        self.same: dict[str, list[Candidate]] = {}
        """Fingerprint -> trials that wait for a running one, which is the same model."""
        self.known: dict[str, int] = {}
        """Fingerprint -> a trial of that model whose outcome another one would share."""
        self.crashed: list[tuple[Candidate, Evaluation]] = []
        """Candidates whose workers died, until another candidate shows that workers live."""
        self.total = 0
        self.listener_error: Exception | None = None
        self.draws = Draws(self.name)
        self.faults = Faults(self.name)
        self.failures = SameFailures(self.name)

    # --- begin and end -------------------------------------------------------------------------

    def resume(self, total: int) -> None:
        """Load the study as it is, and make both stores agree; it is to have `total` candidates."""
        self.asker.open()
        spool = self.spool = Spool(self.store.runs, self.name)
        spool.commit(self.store)
        stored = {e.trial: e for e in self.store.evaluations(self.name)}
        found = differences(
            stored, attempts.asked(self.store, self.name), self.asker.trials(), self.names
        )
        if found:
            repair(self.store, self.asker.study, found, stored, self.names)
            self.asker.open()  # Optuna caches finished trials
            stored = {e.trial: e for e in self.store.evaluations(self.name)}
            for difference in found:
                if difference.kind == "untold":
                    self._tell(None, stored[difference.trial])
        for text in check_start(self.store, self.name, stored):
            self.warn(text)
        self.asker.load(stored)
        for evaluation in stored.values():
            self._count(evaluation)
        self.total = max(total, self.score.evaluated)
        self.store.set_trials(self.name, self.total)
        self.score.start()
        self.published = time.monotonic()
        for kind, times in Counter(d.kind for d in found if d.kind != "untold").items():
            first = next(d for d in found if d.kind == kind)
            text = (
                f"Optuna's tables differed in {times} trials, such as {first.trial}: {first.text}"
            )
            self._emit("warning", None, f"{text}; both agree now")

    def warn(self, text: str) -> None:
        """Tell the listener what the user should know of the study."""
        self._emit("warning", None, text)

    @property
    def over(self) -> str | None:
        """Why the study needs no more work; None if it does."""
        if self.asker.orphans:
            return None
        if self.score.evaluated >= self.total:
            return "trials"
        if self.asker.stopped:
            return "sampler"
        if self.draws.over:
            return "draws"
        return "exhausted" if self.asker.exhausted else None

    def end(self) -> str:
        """Say that the study is over and return why; raise NoCandidateError if it has no value."""
        why = self.over
        assert why is not None
        self._raise_for_listener()
        if self.score.counts["complete"]:
            texts = {
                "trials": f"all {self.total} trials of study '{self.name}' are finished",
                "exhausted": f"every point of the space of study '{self.name}' was drawn",
                "sampler": f"the sampler of study '{self.name}' proposes nothing more",
                "draws": f"study '{self.name}' ends: {self.draws.text()}",
            }
            self._emit("done", None, texts[why])
            self._raise_for_listener()
            return why
        if why == "draws":
            raise self.draws.error()
        reasons = Counter(reason(e) for e in self.store.evaluations(self.name))
        most, times = reasons.most_common(1)[0]
        raise NoCandidateError(
            f"study '{self.name}': none of its {reasons.total()} trials is complete; {times} of"
            f" them: {most}"
        )

    def work(self, pool: Pool, lease: Lease) -> None:
        """Bring the study to its end."""
        self.pool = pool
        if count := self.score.counts.total():
            text = f"{count} finished trials of study '{self.name}' are there"
            self._emit("resumed", None, text)
        while True:
            started = self._start_next()
            waiting = bool(self.running or self.delayed or self.faults.pause)
            if not (started or waiting or self._give_up_crashed()):
                break
            timeout = 0.0 if started else POLL
            if self.running:
                self._land_all(pool.wait(timeout))
            else:
                time.sleep(min(timeout, self.faults.pause))
            lease.check()
            self._raise_for_listener()
            if time.monotonic() - self.published > PUBLISH:
                self._publish()
        self._publish()

    # --- from a trial to a candidate -----------------------------------------------------------

    def _start_next(self) -> bool:
        """Start or draw one candidate, if there is room and need; say whether one was."""
        if self.faults.pause or len(self.running) >= self.pool.capacity:
            return False
        # After a fault of the environment another candidate ends first, to tell whose it was.
        for candidate in self.delayed:
            if self.ended > candidate.fault_at or not (self.running or self._more_to_draw):
                self.delayed.remove(candidate)
                self._guarded(candidate, self._start)
                return True
        if not self._more_to_draw:
            return False
        try:
            trial = self.asker.next(self.draws.fruitless)
        except SamplerFailedError as error:
            self._fail(Candidate(error.trial, {}), Failure("sampler", str(error)))
            return True
        self._guarded(Candidate(trial, {}), self._draw)
        return True

    @property
    def _more_to_draw(self) -> bool:
        """Whether the study needs another candidate and can have one."""
        if self.asker.orphans:
            return True
        pending = len(self.running) + len(self.delayed) + len(self.crashed)
        pending += sum(map(len, self.same.values()))
        if self.score.evaluated + pending >= self.total:
            return False
        return not (self.draws.over or self.asker.stopped or self.asker.exhausted)

    def _guarded(self, candidate: Candidate, step: Callable[[Candidate], None]) -> None:
        """Take a step with a candidate; what it raises becomes the candidate's failure."""
        try:
            step(candidate)
        except ENDS_A_RUN:
            raise
        except ParametersError as error:
            self._fail(candidate, Failure("parameters", str(error)))
        except SamplerFailedError as error:
            self._fail(candidate, Failure("sampler", str(error)))
        except PartError as error:
            self._fail(candidate, Failure("error", str(error)))
        except (Exception, SystemExit) as error:  # a part's own code may call sys.exit
            self._fail(candidate, internal(error))

    def _draw(self, drawn: Candidate) -> None:
        """Fill the holes, and see whether the architecture may be built."""
        trial = drawn.trial
        candidate = Candidate.drawn(trial, self.asker.draw(trial), self.space)
        self.store.asked(
            self.name, trial.number, candidate.fingerprint, candidate.plain, candidate.cost
        )
        self.asker.constrain(trial, candidate.violations)
        if broken := candidate.broken:
            self.draws.add(broken)
            text = candidate.clash or one_line(candidate.plain)
            evaluation = candidate.evaluation(
                self.name,
                self.store.attempts(self.name, trial.number),
                "infeasible",
                violations=broken,
                seed=self.space.search.seed,
            )
            self._finish(candidate, evaluation, "infeasible", text)
        else:
            self._dispatch(candidate)

    def _dispatch(self, candidate: Candidate) -> None:
        """Evaluate a candidate, unless the same model is evaluated already, or is right now."""
        same = candidate.fingerprint
        pending = [*self.running.values(), *self.delayed, *(c for c, _ in self.crashed)]
        if same in self.known:
            self.draws.add({})
            self._copy(candidate, self.known[same])
        elif any(other.fingerprint == same for other in pending):
            self.same.setdefault(same, []).append(candidate)
        else:
            self._start(candidate)

    def _copy(self, candidate: Candidate, source: int) -> None:
        """Give a trial the evaluation of an earlier one of the same model."""
        evaluation, warning = self.intake.copy(candidate, source)
        if warning:
            self._emit("warning", candidate.number, warning)
        self._finish(candidate, evaluation, "copied", f"the same model as trial {source}")

    def _start(self, candidate: Candidate) -> None:
        """Send a candidate to the pool."""
        attempt = self.store.start_attempt(self.name, candidate.number)
        where: Plain = {"device": self.pool.device, "sharers": self.pool.sharers}
        where["weights_to"] = place(self.store.runs, self.name, candidate.number)
        job = self.jobs.job(candidate.number, attempt, candidate.plain, **where)
        self.pool.submit(job)
        self.draws.started()
        self.running[candidate.number] = candidate
        self._raise_total()
        self._emit("started", candidate.number, one_line(candidate.plain))

    def _raise_total(self) -> None:
        """Count a trial of an earlier run, or of another program, that goes beyond the total."""
        if (count := self.score.evaluated + len(self.running)) > self.total:
            self.total = count
            self.store.set_trials(self.name, count)

    # --- from a result to an evaluation --------------------------------------------------------

    def _land_all(self, results: list[Result]) -> None:
        """Take results; a reason to stop, which one may be, keeps no other from being recorded."""
        reasons = []
        for result in results:
            try:
                self._handle_result(result)
            except (StudyStoppedError, EnvironmentFaultError) as error:
                reasons.append(error)
        if reasons:
            raise reasons[0]

    def _handle_result(self, result: Result) -> None:
        """Take a result: retry it if that may help, else record and tell it."""
        candidate, found = self.running.pop(result.job.trial), result.outcome
        self.ended += 1
        self.intake.clean(candidate.number, result)
        failure = found if isinstance(found, Failure) else found.failure
        if failure and failure.kind == ENVIRONMENT and self._delay(candidate, failure, result.job):
            return
        died = failure is not None and failure.kind == "crashed"
        if failure and died and candidate.crashes < stop_rules.RETRIES:
            candidate.crashes += 1
            attempts.end(self.store, self.name, candidate.number, result.job.attempt, failure)
            self._emit("retried", candidate.number, failure.message)
            self._guarded(candidate, self._start)
            return
        try:
            evaluation = self.intake.evaluation(candidate, result)
        except ENDS_A_RUN:
            raise
        except Exception as error:
            self._fail(candidate, internal(error))
            return
        if died and self._hold_crashed(candidate, evaluation):
            return
        if failure is None or failure.kind != ENVIRONMENT:
            self.faults.succeeded()
        self._land_crashed()
        self._landed(candidate, evaluation)

    def _landed(self, candidate: Candidate, evaluation: Evaluation) -> None:
        """Record an evaluation, and place the trials that waited for it."""
        with self.spool.holding(evaluation):
            self._finish(candidate, evaluation, "finished", one_line(candidate.plain))
        for waiting in self.same.pop(candidate.fingerprint, []):
            self._guarded(waiting, self._dispatch)
        self.failures.add(evaluation, bool(self.score.counts["complete"]))

    def _delay(self, candidate: Candidate, failure: Failure, job: Job) -> bool:
        """Let a candidate start again after a pause; False if it is to fail itself."""
        attempts.end(self.store, self.name, job.trial, job.attempt, failure)
        tries = attempts.failed(self.store, self.name, job.trial, ENVIRONMENT)
        if self.faults.exhausted(job.trial, tries):
            return False
        self.faults.failed(failure)
        candidate.fault_at = self.ended
        self.delayed.append(candidate)
        text = f"{failure.message}; it starts again in {self.faults.pause:.0f} s"
        self._emit("retried", candidate.number, text)
        return True

    def _hold_crashed(self, candidate: Candidate, evaluation: Evaluation) -> bool:
        """Hold a candidate back whose workers died, as all workers may; False if it is to fail.

        Raises:
            StudyStoppedError: if there are CRASHES of them; they stay to be evaluated.
        """
        number, attempt = candidate.number, evaluation.attempt
        earlier = attempts.failed(self.store, self.name, number, "crashed")
        if earlier >= 2 * (stop_rules.RETRIES + 1):  # it was held back in two earlier runs
            return False
        assert evaluation.failure is not None
        attempts.end(self.store, self.name, number, attempt, evaluation.failure)
        self.crashed.append((candidate, evaluation))
        if len(self.crashed) >= stop_rules.CRASHES:
            raise StudyStoppedError(
                f"study '{self.name}': the worker processes of {stop_rules.CRASHES} candidates in a"
                f" row died, {stop_rules.RETRIES + 1} of each, the last: {reason(evaluation)}; if"
                " memory is short, run it again with fewer --workers. No trial is used up"
            )
        return True

    def _land_crashed(self) -> None:
        """Record the candidates whose workers died: others live, so the fault is theirs."""
        held, self.crashed = self.crashed, []
        for candidate, evaluation in held:
            self._landed(candidate, evaluation)

    def _give_up_crashed(self) -> bool:
        """Record crashed candidates when nothing else is left to run; say whether there were."""
        there = bool(self.crashed)
        self._land_crashed()
        return there

    # --- what is over --------------------------------------------------------------------------

    def _fail(self, candidate: Candidate, failure: Failure) -> None:
        """Give an end to a trial that moenas itself could not bring to one."""
        number = candidate.number
        if not attempts.is_asked(self.store, self.name, number):
            self.store.asked(self.name, number, "", {}, {})
        evaluation = candidate.evaluation(
            self.name,
            self.store.attempts(self.name, number),
            "failed",
            failure=failure,
            seed=self.space.search.seed,
        )
        self.draws.add({})
        self._finish(candidate, evaluation, "finished", failure.message)
        for waiting in self.same.pop(candidate.fingerprint, []) if candidate.fingerprint else []:
            self._guarded(waiting, self._dispatch)
        self.failures.add(evaluation, bool(self.score.counts["complete"]))

    def _finish(self, candidate: Candidate, found: Evaluation, kind: Kind, text: str) -> None:
        """Store the evaluation of a trial, then tell Optuna, then the listener."""
        try:
            recorded = self.store.record(found)
        except ENDS_A_RUN:
            raise
        except Exception as error:  # a value that the tables do not take
            found = candidate.evaluation(
                self.name, found.attempt, "failed", failure=internal(error)
            )
            recorded = self.store.record(found)
        if not recorded:
            raise StudyBusyError(
                f"study '{self.name}': another process has evaluated trial {found.trial} meanwhile"
            )
        self._count(found)
        self._tell(candidate.trial, found)
        self._emit(kind, candidate.number, text, found)

    def _tell(self, trial: Trial | None, found: Evaluation) -> None:
        """Tell Optuna an evaluation that is stored; correct its row if it does not take it."""
        try:
            if trial is None:
                self.asker.tell_stored(found)
            else:
                self.asker.tell(trial, found)
        except ENDS_A_RUN:
            raise
        except Exception as error:
            correct(self.store, self.name, found.trial, *outcome(found, self.names))
            self._emit("warning", found.trial, f"Optuna's row is corrected to ours: {error}")

    def _count(self, found: Evaluation) -> None:
        """Take a finished trial into the figures that this run keeps."""
        self.score.add(found)
        self.intake.add(found)
        # The recipe, the data and the seed are those of the study, so that a model diverges again.
        trained = found.status != "failed" and bool(found.values)
        if trained or (found.failure is not None and found.failure.kind in FINAL):
            self.known.setdefault(found.fingerprint, found.trial)

    def _emit(
        self, kind: Kind, trial: int | None, text: str, found: Evaluation | None = None
    ) -> None:
        size, hypervolume = self.store.standing(self.name)
        tally = self.score.tally(self.total, len(self.running), size, hypervolume)
        try:
            self.listener(Event(kind, trial, text, found, tally))
        except Exception as error:
            # It ends the run, but not between two writes.
            self.listener_error = self.listener_error or error

    def _raise_for_listener(self) -> None:
        """Raise what the listener raised."""
        if self.listener_error is not None:
            raise self.listener_error

    def _publish(self) -> None:
        """Update the dashboard's figures; a fault there does not stop the study."""
        try:
            from moenas.dashboard.server import publish

            publish(self.store, self.name)
        except Exception as error:
            text = f"the dashboard's figures were not updated: {type(error).__name__}: {error}"
            self._emit("warning", None, text)
        self.published = time.monotonic()
