"""One run of a study: ask, check, evaluate, store, tell; any step may be its last."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from moenas.describe import one_line
from moenas.errors import (
    InputError,
    MoenasError,
    NoCandidateError,
    SpaceError,
    StorageLostError,
    StudyBusyError,
)
from moenas.heartbeat import Lease
from moenas.objective import rebase
from moenas.pool import Pool, Result
from moenas.records import Evaluation, Failure, Job, Plain, Status
from moenas.samplers import Asker
from moenas.store import Store
from moenas.weights import copy_weights, write_weights

if TYPE_CHECKING:
    from optuna.trial import Trial

    from moenas.space import Space

VALID = "the architecture is valid"
"""The constraint that a draw breaks whose fields do not go together."""
RETRIES = 2
"""Times that a candidate is tried again after its worker process died."""
CRASHES = 5
"""Models in a row that use up their retries before the run stops: the fault is not theirs."""
SAME_FAILURES = 5
"""First candidates that all fail for one reason before the run stops."""
BARREN = 1000
"""Draws in a row that break a requirement before the run stops."""
POLL = 0.5
"""Seconds between looks at the lease and the figures."""
FINAL = ("diverged", "acausal", "collapsed")
"""Kinds of failure that another candidate of the same model would end with, too."""
PUBLISH = 60.0
"""Seconds between updates of the dashboard's figures."""

Kind = Literal[
    "resumed", "started", "finished", "infeasible", "copied", "retried", "warning", "done"
]


class Interrupted(MoenasError):
    """The run was stopped by Ctrl-C or SIGTERM; the same call resumes the study."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Tally:
    """How far a study is."""

    total: int
    """Trials that it is to have."""
    running: int
    complete: int
    failed: int
    infeasible: int
    best: dict[str, float]
    """Objective -> the best value so far."""
    front: int
    """Members of the front."""
    hypervolume: float | None
    eta_s: float | None
    """Seconds to the end at the pace of this run; None before its first result."""

    @property
    def finished(self) -> int:
        """Trials that are over."""
        return self.complete + self.failed + self.infeasible


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


@dataclass
class _Candidate:
    """A trial between ask and tell."""

    trial: Trial
    fingerprint: str
    architecture: Plain
    cost: dict[str, int]
    crashes: int = 0
    """How often its worker process died in this run."""

    @property
    def number(self) -> int:
        return self.trial.number


class Driver:
    """The one process that asks and tells a study's sampler and writes its rows.

    Order of writes for a result: the weights' file, our rows in one transaction, then Optuna's.
    So a trial that Optuna holds for RUNNING at the start of a run has either an evaluation of ours
    to be told from, or is evaluated again under its own number: it keeps its parameters, for
    Optuna stored them when they were drawn.
    """

    def __init__(self, store: Store, space: Space, data_sha256: str, listener: Listener) -> None:
        self.store, self.space, self.name = store, space, space.name
        self.data_sha256, self.listener = data_sha256, listener
        self.directions = {o.name: o.direction for o in space.objectives}
        self.asker = Asker(store, space)
        self.flying: dict[int, _Candidate] = {}
        self.twins: dict[str, list[_Candidate]] = {}
        """Fingerprint -> trials that wait for one in flight, which is the same model."""
        self.known: dict[str, int] = {}
        """Fingerprint -> a trial that was trained, or failed for good: another one ends alike."""
        self.timed: dict[str, str] = {}
        """Objective -> the key of the reference time that all its values share."""
        self.counts: Counter[str] = Counter()
        self.best: dict[str, float] = {}
        self.broken: Counter[str] = Counter()
        """Requirement -> how many of the draws since the last feasible one broke it."""
        self.barren = 0
        self.dead: set[str] = set()
        """Fingerprints that died for good since a worker last gave a result."""
        self.failures: list[str] = []

    def take_up(self, total: int) -> None:
        """Load the study as it is; it is to have `total` trials."""
        stored = {e.trial: e for e in self.store.evaluations(self.name)}
        for evaluation in stored.values():
            self._count(evaluation)
        self.total = self.asker.take_up(total, stored)
        self.store.set_trials(self.name, self.total)
        self.finished_before = len(stored)
        self.began = self.published = time.monotonic()

    def end(self) -> str:
        """Say that the study is over and return why; raise NoCandidateError if it has no value."""
        why = self.asker.finished
        assert why is not None
        if self.counts["complete"]:
            texts = {
                "trials": f"all {self.total} trials of study '{self.name}' are finished",
                "exhausted": f"every point of the space of study '{self.name}' was drawn",
            }
            self._emit("done", None, texts[why])
            return why
        reasons = Counter(_reason(e) for e in self.store.evaluations(self.name))
        most, times = reasons.most_common(1)[0]
        raise NoCandidateError(
            f"study '{self.name}': none of its {reasons.total()} trials is complete; {times} of"
            f" them: {most}"
        )

    def work(self, pool: Pool, lease: Lease) -> None:
        """Bring the study to its end."""
        self.pool = pool
        if self.finished_before:
            text = f"{self.finished_before} finished trials of study '{self.name}' are there"
            self._emit("resumed", None, text)
        while True:
            trial = self.asker.next() if len(self.flying) < pool.capacity else None
            if trial is not None:
                self._draw(trial)
            elif not self.flying:
                break
            for result in pool.wait(0.0 if trial else POLL):
                self._land(result)
            lease.check()
            if time.monotonic() - self.published > PUBLISH:
                self._publish()
        self._publish()

    # --- from a trial to a candidate -----------------------------------------------------------

    def _draw(self, trial: Trial) -> None:
        """Fill the holes, and see whether what comes out may be built."""
        plain = self.asker.draw(trial)
        try:
            architecture = self.space.architecture(plain)
        except SpaceError as error:
            candidate = _Candidate(trial, "", plain, {})
            violations, text = {VALID: 1.0}, str(error)
        else:
            cost = self.space.cost(architecture).plain()
            candidate = _Candidate(trial, architecture.fingerprint, architecture.plain(), cost)
            violations = {VALID: 0.0, **self.space.violations(architecture)}
            text = one_line(candidate.architecture)
        self.store.asked(
            self.name, trial.number, candidate.fingerprint, candidate.architecture, candidate.cost
        )
        self.asker.constrain(trial, violations)
        broken = {name: value for name, value in violations.items() if value > 0}
        if broken:
            self._reject(candidate, broken, text)
            return
        self.barren = 0
        self.broken.clear()
        self._place(candidate)

    def _reject(self, candidate: _Candidate, broken: dict[str, float], text: str) -> None:
        """Record a draw that must not be built."""
        evaluation = self._row(candidate, "infeasible", violations=broken)
        self._finish(candidate, evaluation, "infeasible", text)
        self.barren += 1
        self.broken.update(broken.keys())
        if self.barren >= BARREN:
            most, times = self.broken.most_common(1)[0]
            raise NoCandidateError(
                f"study '{self.name}': {BARREN} draws in a row broke a requirement, {times} of"
                f" them '{most}'; loosen it, or take the options out of the space that break it"
            )

    def _place(self, candidate: _Candidate) -> None:
        """Evaluate a candidate, unless the same model is evaluated already, or is right now."""
        same = candidate.fingerprint
        if same in self.known:
            self._copy(candidate, self.known[same])
        elif any(other.fingerprint == same for other in self.flying.values()):
            self.twins.setdefault(same, []).append(candidate)
        else:
            self._start(candidate)

    def _start(self, candidate: _Candidate) -> None:
        """Send a candidate to the pool."""
        space = self.space
        job = Job(
            study=self.name,
            trial=candidate.number,
            attempt=self.store.start_attempt(self.name, candidate.number),
            architecture=candidate.architecture,
            objectives={o.name: o.source if o.guest else None for o in space.objectives},
            data=space.data,
            data_sha256=self.data_sha256,
            train=space.train.plain(),
            measure=space.measure.plain(),
            seed=space.search.seed,
            use={guest.path: guest.source for guest in space.use},
            time_limit_s=space.search.time_limit,
            reference_ms=self.store.reference_ms(self.name),
        )
        self.pool.submit(job)
        self.flying[candidate.number] = candidate
        self._emit("started", candidate.number, one_line(candidate.architecture))

    # --- from a result to an evaluation --------------------------------------------------------

    def _land(self, result: Result) -> None:
        """Take a result: retry it if its process died, else record and tell it."""
        candidate, outcome = self.flying.pop(result.job.trial), result.outcome
        died = isinstance(outcome, Failure) and outcome.kind == "crashed"
        if isinstance(outcome, Failure) and died and candidate.crashes < RETRIES:
            candidate.crashes += 1
            self._emit("retried", candidate.number, outcome.message)
            self._start(candidate)
            return
        self.dead = self.dead | {candidate.fingerprint} if died else set()
        evaluation = self._evaluated(candidate, result)
        self._finish(candidate, evaluation, "finished", one_line(candidate.architecture))
        if len(self.dead) >= CRASHES:
            raise MoenasError(
                f"study '{self.name}': the worker processes of {CRASHES} candidates in a row died,"
                f" {RETRIES + 1} of each, the last: {_reason(evaluation)}; if memory is short, run"
                " it again with fewer --workers"
            )
        for twin in self.twins.pop(candidate.fingerprint, []):
            self._place(twin)
        self._check_first_failures(evaluation)

    def _evaluated(self, candidate: _Candidate, result: Result) -> Evaluation:
        """Return what is to be stored of a result; write the weights if there are any."""
        outcome, attempt = result.outcome, result.job.attempt
        if isinstance(outcome, Failure):
            return self._row(candidate, "failed", attempt=attempt, failure=outcome.plain())
        found = replace(outcome, fingerprint=candidate.fingerprint, cost=candidate.cost)
        if found.status != "complete":
            return found
        bad = [n for n in self.directions if not math.isfinite(found.values.get(n, math.nan))]
        if bad:
            return _failed(found, "error", f"no finite value for {', '.join(bad)}")
        found = self._as_required(candidate, self._on_one_reference(found))
        if found.status == "complete" and result.weights is not None:
            with self._writing():
                digest = write_weights(self.store.runs, self.name, candidate.number, result.weights)
            found = replace(found, weights_sha256=digest)
        return found

    def _on_one_reference(self, found: Evaluation) -> Evaluation:
        """Express latencies by the study's reference times; refuse those of another device."""
        keys = {
            name: (details["reference_key"], details["reference_ms"])
            for name, details in found.measurements.items()
            if "reference_key" in details
        }
        for name, (key, _) in keys.items():
            if (first := self.timed.get(name, key)) != key:
                text = f"'{name}' was timed on [{key}], and those of this study on [{first}]"
                return _failed(found, "refused", text)
        fixed = {key: self.store.set_reference_ms(self.name, key, ms) for key, ms in keys.values()}
        return rebase(found, fixed)

    def _as_required(self, candidate: _Candidate, found: Evaluation) -> Evaluation:
        """Make an evaluation infeasible if the trained model breaks a requirement."""
        if found.status != "complete":
            return found
        architecture = self.space.architecture(candidate.architecture)
        violations = self.space.trained_violations(architecture, found.routing)
        broken = {name: value for name, value in violations.items() if value > 0}
        if not broken:
            return found
        return replace(found, status="infeasible", violations=broken, weights_sha256=None)

    def _copy(self, candidate: _Candidate, source: int) -> None:
        """Give a trial the evaluation of an earlier one of the same model."""
        original = self.store.evaluation(self.name, source)
        assert original is not None
        digest = original.weights_sha256
        if digest is not None:
            try:
                with self._writing():
                    copy_weights(self.store.runs, self.name, source, candidate.number, digest)
            except InputError as error:
                self._emit("warning", candidate.number, f"its weights are not copied: {error}")
                digest = None
        evaluation = replace(
            original,
            trial=candidate.number,
            attempt=self.store.attempts(self.name, candidate.number),
            seconds={},
            metrics={**original.metrics, "copied_from": float(source)},
            weights_sha256=digest,
        )
        self._finish(candidate, evaluation, "copied", f"the same model as trial {source}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say that the storage is lost if a file cannot be written."""
        try:
            yield
        except OSError as error:
            raise StorageLostError(
                f"{error.filename or self.store.runs}: cannot be written: {error.strerror}"
            ) from error

    def _row(self, candidate: _Candidate, status: Status, **known: Any) -> Evaluation:
        """Return an evaluation of which only the architecture and `known` are known."""
        known.setdefault("attempt", self.store.attempts(self.name, candidate.number))
        return Evaluation(
            study=self.name,
            trial=candidate.number,
            status=status,
            fingerprint=candidate.fingerprint,
            cost=candidate.cost,
            seed=self.space.search.seed,
            **known,
        )

    # --- what is over --------------------------------------------------------------------------

    def _finish(self, candidate: _Candidate, found: Evaluation, kind: Kind, text: str) -> None:
        """Store what came of a trial, then tell Optuna, then the listener."""
        if not self.store.record(found):
            raise StudyBusyError(
                f"study '{self.name}': another process has evaluated trial {found.trial} meanwhile"
            )
        self._count(found)
        self.asker.tell(candidate.trial, found)
        self._emit(kind, candidate.number, text, found)

    def _count(self, found: Evaluation) -> None:
        """Take a finished trial into the figures that this run keeps."""
        self.counts[found.status] += 1
        # The recipe, the data and the seed are those of the study, so that a model diverges again.
        trained = found.status != "failed" and bool(found.values)
        if trained or (found.failure or {}).get("kind") in FINAL:
            self.known.setdefault(found.fingerprint, found.trial)
        if found.status != "complete":
            return
        for name, details in found.measurements.items():
            if "reference_key" in details:
                self.timed.setdefault(name, details["reference_key"])
        for name, direction in self.directions.items():
            better = min if direction == "minimize" else max
            self.best[name] = better(self.best.get(name, found.values[name]), found.values[name])

    def _check_first_failures(self, found: Evaluation) -> None:
        """Stop if the first candidates all fail for one reason: the fault is not theirs."""
        if self.counts["complete"] or found.status != "failed":
            return
        self.failures.append(re.sub(r"\d+", "#", _reason(found)))
        if len(self.failures) == SAME_FAILURES and len(set(self.failures)) == 1:
            raise MoenasError(
                f"study '{self.name}': the first {SAME_FAILURES} candidates all failed for one"
                f" reason: {_reason(found)}; put that right and run it again"
            )

    def _emit(
        self, kind: Kind, trial: int | None, text: str, found: Evaluation | None = None
    ) -> None:
        self.listener(Event(kind, trial, text, found, self._tally()))

    def _tally(self) -> Tally:
        size, hypervolume = self.store.standing(self.name)
        finished = self.counts.total()
        here = finished - self.finished_before
        pace = (time.monotonic() - self.began) / here if here else None
        return Tally(
            total=self.total,
            running=len(self.flying),
            complete=self.counts["complete"],
            failed=self.counts["failed"],
            infeasible=self.counts["infeasible"],
            best=dict(self.best),
            front=size,
            hypervolume=hypervolume,
            eta_s=None if pace is None else pace * (self.total - finished),
        )

    def _publish(self) -> None:
        """Update the dashboard's figures; a fault there does not stop the study."""
        from moenas.dashboard import publish

        try:
            publish(self.store, self.name)
        except Exception as error:
            text = f"the dashboard's figures were not updated: {type(error).__name__}: {error}"
            self._emit("warning", None, text)
        self.published = time.monotonic()


def _failed(found: Evaluation, kind: str, message: str) -> Evaluation:
    """Turn an evaluation into a failed one."""
    failure = Failure(kind, message).plain()
    return replace(found, status="failed", failure=failure, weights_sha256=None)


def _reason(found: Evaluation) -> str:
    """Say in one line why a trial has no values."""
    if found.failure:
        return f"{found.failure['kind']}: {found.failure['message']}"
    return "breaks " + ", ".join(found.violations)
