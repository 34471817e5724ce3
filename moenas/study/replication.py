"""Replicates: members of the front trained again with further seeds, after the search."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from moenas.errors import EnvironmentFaultError
from moenas.grammar.summary import counted
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Failure, Job
from moenas.store import replicates
from moenas.study.stop_rules import CRASH_RETRIES, ENVIRONMENT, TRIES
from moenas.workers.pool import Pool, Result

if TYPE_CHECKING:
    from moenas.store.heartbeat import StudyLease
    from moenas.study.jobs import Jobs
    from moenas.study.session import Session

POLL_S = 0.5
"""Seconds between looks at the lease of the study."""

Replicate = tuple[int, int]
"""A trial and a seed."""


def missing_replicates(session: Session) -> list[Replicate]:
    """Return what is to be trained: every member of the front with one seed, then with the next."""
    search, store, name = session.space.search, session.store.store, session.name
    if search.replicates < 2:
        return []
    known = {(row.trial, row.seed) for row in store.replicates(name)}
    seeds = range(search.seed + 1, search.seed + search.replicates)
    front = store.front(name)
    return [(trial, seed) for seed in seeds for trial in front if (trial, seed) not in known]


class Replication:
    """Trains each member of the front of a finished search with `search.replicates` - 1 seeds.

    The seeds follow the seed of the study. A seed decides the initial weights and the order of the
    data; everything else is as in the search. Each replicate is a row of its own as soon as it is
    finished, so an interrupted run goes on with those that are missing. The front and the values of
    its members stay as the search left them.
    """

    def __init__(self, session: Session, jobs: Jobs) -> None:
        self._session, self._jobs = session, jobs
        self._store, self._space = session.store, session.space
        self._faults: Counter[Replicate] = Counter()
        self._crashes: Counter[Replicate] = Counter()

    def run(self, pool: Pool, lease: StudyLease) -> None:
        """Train what is missing.

        Raises:
            EnvironmentFaultError: if the machine fails one replicate again and again.
        """
        waiting = deque(missing_replicates(self._session))
        total, running = len(waiting), 0
        if waiting:
            verb = "is" if total == 1 else "are"
            text = f"{counted(total, 'replicate')} of the front {verb} trained with further seeds"
            self._session.events.emit("replicating", None, text)
        while waiting or running:
            if waiting and running < pool.capacity:
                one = waiting.popleft()
                if not self._reused(one):
                    pool.submit(self._job(pool, one))
                    running += 1
                continue
            for result in pool.wait(POLL_S):
                running -= 1
                again = self._handle(result)
                waiting += [again] if again is not None else []
            lease.check()
            self._session.budget.report()
            self._session.events.raise_error()

    def _job(self, pool: Pool, one: Replicate) -> Job:
        """Return the job of a replicate, whose weights are not kept."""
        trial, seed = one
        job = self._jobs.job(
            trial,
            self._store.attempts(trial),
            self._store.architecture(trial),
            device=pool.device,
            sharers=pool.sharers,
            keeps_weights=False,
            train_tokens=self._timed_tokens(trial),
        )
        return replace(job, seed=seed)

    def _timed_tokens(self, trial: int) -> int | None:
        """Return the training tokens of a trial under a budget of seconds; else None."""
        known = self._store.evaluation(trial)
        if known is None or not self._space.train.has_time_budget:
            return None
        return int(known.metrics["train_tokens"])

    def _handle(self, result: Result) -> Replicate | None:
        """Record a result; return its replicate if it is to be tried again."""
        job, outcome = result.job, result.outcome
        one = (job.trial, job.seed)
        failure = outcome if isinstance(outcome, Failure) else outcome.failure
        if failure is not None and failure.kind == ENVIRONMENT:
            self._faults[one] += 1
            if self._faults[one] >= TRIES:
                raise EnvironmentFaultError(
                    f"study '{self._store.name}': trial {job.trial} with seed {job.seed}:"
                    f" {failure.message}"
                )
            return one
        if failure is not None and failure.kind == "crashed":
            self._crashes[one] += 1
            if self._crashes[one] <= CRASH_RETRIES:
                return one
        known = self._store.evaluation(job.trial)
        assert known is not None
        if isinstance(outcome, Failure):
            outcome = replace(known, status="failed", values={}, measurements={}, failure=outcome)
        elif outcome.status == "complete":
            outcome = self._session.results.judged(Architecture.parse(job.architecture), outcome)
        self._record(
            replace(outcome, fingerprint=known.fingerprint, cost=known.cost, seed=job.seed)
        )
        return None

    def _reused(self, one: Replicate) -> bool:
        """Take a replicate from another study of the database, if there is one that holds."""
        trial, seed = one
        known = self._store.evaluation(trial)
        assert known is not None
        tokens = self._timed_tokens(trial)
        source = self._session.cache.find(known.fingerprint, seed, tokens)
        if source is None:
            return False
        names = [objective.name for objective in self._space.objectives]
        replicate = replace(
            source,
            study=self._store.name,
            trial=trial,
            values={name: source.values[name] for name in names},
            measurements={k: v for k, v in source.measurements.items() if k in names},
            cost=known.cost,
            seconds={},
            weights_sha256=None,
            reused_from={"study": source.study, "trial": source.trial},
        )
        judged = self._session.results.judged(None, replicate)
        if judged.status == "complete":
            self._record(judged)
        return judged.status == "complete"

    def _record(self, replicate: Evaluation) -> None:
        """Store a replicate and tell the listeners."""
        replicates.add(self._store.store, replace(replicate, weights_sha256=None))
        text = f"seed {replicate.seed}"
        if replicate.reused_from is not None:
            text += f", reused from trial {replicate.reused_from['trial']}"
            text += f" of study '{replicate.reused_from['study']}'"
        self._session.events.emit("replicated", replicate.trial, text, replicate)
