"""The loop of a run: ask, check, evaluate, store, tell; any step may be its last."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moenas.errors import EnvironmentFaultError, PartError, StudyStoppedError
from moenas.failures import internal, origin
from moenas.records import Evaluation, Failure, Plain
from moenas.search.start_points import SOURCE
from moenas.search.trials import ParametersError, SamplerFailedError
from moenas.store.weights import place
from moenas.study.candidate import Candidate
from moenas.study.events import Interrupted, Kind
from moenas.study.jobs import Jobs
from moenas.study.session import ENDS_A_RUN, Session
from moenas.study.stop_rules import (
    CRASH_RETRIES,
    ENVIRONMENT,
    CrashedCandidates,
    DelayedCandidates,
    EnvironmentFaults,
    RepeatedFailures,
)
from moenas.workers.pool import Pool, Result

if TYPE_CHECKING:
    from moenas.store.heartbeat import StudyLease

SLOW_ASKS = ("gray_box",)
"""Samplers whose asks take seconds."""
SIGINT_CODE = 130
"""Exit code of a run that ends as after Ctrl-C."""
POLL_S = 0.5
"""Seconds between looks at the lease of the study."""


class Driver:
    """The one process that asks and tells a study's sampler and writes its rows.

    Order of writes for a result: the file of the weights, a file with the result, our rows in one
    transaction, then Optuna's. At the start of a run Optuna holds some trials for RUNNING. Each has
    a stored evaluation, which is told, or a file, which is recorded, or it is evaluated again. It
    keeps its number and its parameters, for Optuna stored them when they were drawn.

    An exception between the draw of a candidate and its commit makes the trial fail. Only the
    errors of ENDS_A_RUN end the run.
    """

    def __init__(self, session: Session, jobs: Jobs, pool: Pool, lease: StudyLease) -> None:
        self.session, self.jobs, self.pool, self.lease = session, jobs, pool, lease
        self.store, self.trials, self.events = session.store, session.trials, session.events
        self.paused = session.paused
        self.running: dict[int, Candidate] = {}
        """Trial -> candidate that the pool works on."""
        session.progress.running = self.running
        self.ahead: deque[Candidate] = deque()
        """Candidates that were drawn while all workers were busy, at most one."""
        self.delayed = DelayedCandidates()
        self.crashed = CrashedCandidates(session.name)
        self.faults = EnvironmentFaults(session.name)
        self.failures = RepeatedFailures(session.name)

    def run(self) -> None:
        """Evaluate candidates until the study is over."""
        if count := self.session.progress.counts.total():
            text = f"study '{self.session.name}' has {count} finished trials"
            self.events.emit("resumed", None, text)
        while True:
            started = self._start_one()
            waiting = bool(self.running or self.ahead or self.delayed or self.faults.pause)
            if not (started or waiting or self._record_crashed() or self._end_pauses()):
                return
            timeout = 0.0 if started else POLL_S
            if self.running:
                self._handle_results(self.pool.wait(timeout))
            else:
                time.sleep(min(timeout, self.faults.pause))
            self._check_lease()
            self.session.budget.report()
            self.events.raise_error()

    def _check_lease(self) -> None:
        """Raise what went wrong with the lease, or Interrupted if a user of a server ends the run.

        The server signals a driver of its own host; only this reaches one of another host.
        """
        self.lease.check()
        if (state := self.lease.wanted_end) is not None:
            raise Interrupted(f"study '{self.session.name}' is {state} in the queue", SIGINT_CODE)

    # --- from a trial to a running candidate ---------------------------------------------------

    def _start_one(self) -> bool:
        """Start or draw one candidate, if there is room and need; say whether one was."""
        if self.faults.pause or not (self._has_room or self._asks_ahead):
            return False
        # A paused candidate comes before one that was drawn ahead: the next one is drawn at once.
        # Trials of an earlier run come first: only then are all paused candidates known.
        if self._has_room and not self.trials.interrupted and self._promote():
            return True
        if self.ahead:
            self._guarded(self.ahead.popleft(), self._start)
            return True
        if self.delayed and self._has_room:
            nothing_else = not (self.running or self._needs_draw)
            if (delayed := self.delayed.pop(nothing_else)) is not None:
                self._guarded(delayed, self._start)
                return True
        if not self._needs_draw:
            return False
        try:
            trial = self.trials.ask(self.session.draws.fruitless)
        except SamplerFailedError as error:
            self._fail(Candidate(error.trial), Failure("sampler", str(error), cause=origin(error)))
            return True
        self._guarded(Candidate(trial), self._draw)
        return True

    @property
    def _has_room(self) -> bool:
        """Whether a worker is free."""
        return len(self.running) < self.pool.capacity

    @property
    def _asks_ahead(self) -> bool:
        """Whether a candidate is drawn though all workers are busy, so that none waits for it.

        An ask ahead knows fewer results, so only a sampler asks ahead whose asks take seconds. A
        pool of one worker in this process could not evaluate meanwhile.
        """
        slow = self.session.space.search.sampler in SLOW_ASKS
        return slow and self.pool.capacity > 1 and not self.ahead

    @property
    def _needs_draw(self) -> bool:
        """Whether the study needs another candidate and can have one."""
        if self.trials.interrupted:
            return True
        progress = self.session.progress
        pending = len(self.running) + len(self.ahead) + len(self.delayed) + len(self.crashed)
        pending += len(self.paused) + self.session.duplicates.waiting(
            {candidate.fingerprint for candidate in self.paused}
        )
        if progress.evaluated + pending >= progress.total or self.session.budget.used_up:
            return False
        return not (self.session.draws.over or self.trials.stopped or self.trials.exhausted)

    def _guarded(self, candidate: Candidate, step: Callable[[Candidate], None]) -> None:
        """Take a step with a candidate; an exception becomes the candidate's failure."""
        try:
            step(candidate)
        except ENDS_A_RUN:
            raise
        except ParametersError as error:
            self._fail(candidate, Failure("parameters", str(error), cause=origin(error)))
        except SamplerFailedError as error:
            self._fail(candidate, Failure("sampler", str(error), cause=origin(error)))
        except PartError as error:
            self._fail(candidate, Failure("error", str(error), cause=origin(error)))
        except (Exception, SystemExit) as error:  # code of a user's component may call sys.exit
            self._fail(candidate, internal(error))

    def _draw(self, asked: Candidate) -> None:
        """Fill the holes of the space, and check the requirements on the architecture."""
        is_new = not asked.trial.params
        drawn = self.trials.draw(asked.trial)
        candidate = Candidate.from_draw(asked.trial, drawn, self.session.space)
        # A candidate that an earlier run drew goes on, whatever calibration there is now.
        if is_new and self.session.duplicates.source(candidate) is None:
            self.session.latency_bounds.apply(candidate)
        number = candidate.number
        # Optuna's rows come first: a trial of ours has its parameters there.
        self.trials.set_constraints(candidate.trial, candidate.violations)
        self.store.add_candidate(number, candidate.fingerprint, candidate.plain, candidate.cost)
        if (source := candidate.trial.user_attrs.get(SOURCE)) is not None:
            self.store.add_source(number, str(source))
        if not candidate.broken:
            self._guarded(candidate, self._dispatch)
            return
        self.session.draws.add(candidate.broken)
        evaluation = candidate.evaluation(
            self.session.name,
            self.store.attempts(number),
            "infeasible",
            violations=candidate.broken,
            metrics=candidate.predicted,
            seed=self.session.space.search.seed,
        )
        text = candidate.invalid or candidate.summary
        self.session.record(candidate, evaluation, "infeasible", text)

    def _dispatch(self, candidate: Candidate) -> None:
        """Evaluate a candidate, unless the same model is evaluated already, or is right now."""
        pending = [*self.running.values(), *self.ahead, *self.delayed, *self.crashed, *self.paused]
        source = self.session.duplicates.source(candidate)
        if source is not None:
            self.session.draws.add({})
            self._copy(candidate, source)
        elif any(other.fingerprint == candidate.fingerprint for other in pending):
            self.session.duplicates.wait(candidate)
        elif self.paused.take_back(candidate):
            self.session.draws.started()
            self._stop(self.paused.hopeless())  # an earlier run may have ended before it decided
        elif self._reuse(candidate):
            return
        elif self._has_room:
            self._start(candidate)
        else:
            self.ahead.append(candidate)

    def _copy(self, candidate: Candidate, source: int) -> None:
        """Give a trial the evaluation of an earlier one of the same model."""
        evaluation, warning = self.session.results.copy(candidate, source)
        if warning:
            self.events.warn(warning, candidate.number)
        self.session.record(candidate, evaluation, "copied", f"the same model as trial {source}")

    def _reuse(self, candidate: Candidate) -> bool:
        """Give a trial the evaluation of its model in another study, if there is one that holds.

        One that lacks objectives is remembered, so that only these are measured.
        """
        source = self.session.cache.find(candidate.fingerprint)
        evaluation = None if source is None else self.session.results.reuse(candidate, source)
        if source is None or evaluation is None:
            candidate.source = self.session.cache.find_trained(candidate.fingerprint)
            return False
        candidate.source = source
        self.session.draws.started()
        text = candidate.summary_with_source
        self._after(candidate, self.session.record(candidate, evaluation, "reused", text))
        return True

    def _start(self, candidate: Candidate) -> None:
        """Send a candidate to the pool, which has room; a paused one continues where it stopped."""
        number = candidate.number
        objectives, known = self.session.results.job_of_source(candidate)
        fields = known or self.paused.job_fields(candidate)
        attempt = self.store.start_attempt(number)
        where: Plain = {"device": self.pool.device, "sharers": self.pool.sharers, **fields}
        where["weights_to"] = place(self.store.runs, self.session.name, number)
        self.pool.submit(self.jobs.job(number, attempt, candidate.plain, objectives, **where))
        self.session.draws.started()
        self.running[number] = candidate
        # A trial of an earlier run, or of another program, may go beyond the total.
        count = self.session.progress.evaluated + len(self.running) + len(self.paused)
        if count > self.session.progress.total:
            self.session.set_total(count)
        kind: Kind = "promoted" if "paused" in fields else "started"
        self.events.emit(kind, number, candidate.summary_with_source)

    # --- from a result to an evaluation --------------------------------------------------------

    def _handle_results(self, results: list[Result]) -> None:
        """Handle all results, then raise the first error that stops the run."""
        errors = []
        for result in results:
            try:
                self._handle_result(result)
            except (StudyStoppedError, EnvironmentFaultError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _handle_result(self, result: Result) -> None:
        """Start the candidate of a result again if that may help, else record the result."""
        candidate, outcome = self.running.pop(result.job.trial), result.outcome
        self.delayed.count_result()
        self.session.results.remove_drafts(candidate.number, result)
        failure = outcome if isinstance(outcome, Failure) else outcome.failure
        if failure is not None and self._is_tried_again(candidate, failure, result.job.attempt):
            return
        try:
            evaluation = self.session.results.evaluation(candidate, result)
        except ENDS_A_RUN:
            raise
        except Exception as error:
            self._fail(candidate, internal(error))
            return
        if failure is not None and failure.kind == "crashed" and self._hold(candidate, evaluation):
            return
        if failure is None or failure.kind != ENVIRONMENT:
            self.faults.succeeded()
        self._record_crashed()  # a worker lives, so the crashes are the candidates' own
        if evaluation.status == "paused":
            self.paused.pause(candidate, evaluation)
            tokens = evaluation.curve[-1]["tokens"]
            self.session.budget.pause(candidate.number, tokens, candidate.cost)
            self._stop(self.paused.hopeless())
            return
        self._record(candidate, evaluation)

    def _is_tried_again(self, candidate: Candidate, failure: Failure, attempt: int) -> bool:
        """Start a candidate again after a fault of the environment or a crash, a few times."""
        number = candidate.number
        if failure.kind == ENVIRONMENT:
            self.store.end_attempt(number, attempt, failure)
            if self.faults.exhausted(number, self.store.failed_attempts(number, ENVIRONMENT)):
                return False
            self.faults.failed(failure)
            self.delayed.add(candidate)
            text = f"{failure.message}; it starts again in {self.faults.pause:.0f} s"
            self.events.emit("retried", number, text)
            return True
        if failure.kind == "crashed" and candidate.crashes < CRASH_RETRIES:
            candidate.crashes += 1
            self.store.end_attempt(number, attempt, failure)
            self.events.emit("retried", number, failure.message)
            self._guarded(candidate, self._start)
            return True
        return False

    def _hold(self, candidate: Candidate, evaluation: Evaluation) -> bool:
        """Hold a crashed candidate until another one shows that workers live; False if it fails."""
        assert evaluation.failure is not None
        earlier = self.store.failed_attempts(candidate.number, "crashed")
        if earlier >= 2 * (CRASH_RETRIES + 1):  # it was held in two earlier runs
            return False
        self.store.end_attempt(candidate.number, evaluation.attempt, evaluation.failure)
        self.crashed.hold(candidate, evaluation)
        return True

    def _record_crashed(self) -> bool:
        """Record the crashed candidates that are held; say whether there were any."""
        held = self.crashed.release()
        for candidate, evaluation in held:
            self._record(candidate, evaluation)
        return bool(held)

    def _stop(self, candidates: Sequence[Candidate]) -> None:
        """Record that early stopping has stopped candidates."""
        for candidate in candidates:
            evaluation = self.paused.stopped(candidate)
            stored = self.session.record(candidate, evaluation, "stopped", candidate.summary)
            self._after(candidate, stored)

    def _promote(self, *, at_end: bool = False) -> bool:
        """Continue a paused candidate; False if none trains on, or a budget is used up."""
        if self.session.budget.used_up or (paused := self.paused.next(at_end=at_end)) is None:
            return False
        self._guarded(paused, self._start)
        return True

    def _end_pauses(self) -> bool:
        """Continue or stop the paused candidates of a study that draws no more; say if any."""
        if self._promote(at_end=True):
            return True
        rest = self.paused.rest()
        self._stop(rest)
        return bool(rest)

    def _record(self, candidate: Candidate, evaluation: Evaluation) -> None:
        """Record the evaluation of a candidate that a worker has tried."""
        reused = evaluation.reused_from is not None and evaluation.status == "complete"
        kind: Kind = "reused" if reused else "finished"
        text = candidate.summary_with_source if reused else candidate.summary
        with self.session.uncommitted.holding(evaluation):
            stored = self.session.record(candidate, evaluation, kind, text)
        self._after(candidate, stored)

    def _fail(self, candidate: Candidate, failure: Failure) -> None:
        """Record a failure that no worker has sent."""
        number = candidate.number
        if not self.store.has_candidate(number):
            self.store.add_candidate(number, "", {}, {})
        evaluation = candidate.evaluation(
            self.session.name,
            self.store.attempts(number),
            "failed",
            failure=failure,
            seed=self.session.space.search.seed,
        )
        self.session.draws.add({})
        stored = self.session.record(candidate, evaluation, "finished", failure.message)
        self._after(candidate, stored)

    def _after(self, candidate: Candidate, evaluation: Evaluation) -> None:
        """Dispatch the candidates of the same model that waited, then apply the stop rule."""
        for waiting in self.session.duplicates.release(candidate):
            self._guarded(waiting, self._dispatch)
        self.failures.add(evaluation, bool(self.session.progress.counts["complete"]))
