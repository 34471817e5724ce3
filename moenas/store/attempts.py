"""Rows of a trial before its evaluation: the candidate and its attempts."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, func, select, update

from moenas.errors import FailureKind
from moenas.records import Failure
from moenas.store import mapping, row_readers, statements, tables
from moenas.store.store import Store

ENDED = "ended"
"""Status of an attempt that gave no evaluation."""


def end(store: Store, study: str, trial: int, attempt: int, failure: Failure) -> None:
    """Store why an attempt gave no evaluation; the trial stays without one."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    this = statements.of_trial(tables.attempt, study, trial)
    statement = (
        update(tables.attempt)
        .where(this, tables.attempt.c.attempt == attempt)
        .values(finished_at=now, status=ENDED, failure=mapping.failure_json(failure))
    )

    def change(connection: Connection) -> None:
        connection.execute(statement)

    store.apply(study, change)


def failed(store: Store, study: str, trial: int, kind: FailureKind) -> int:
    """Return how many attempts of a trial ended by a kind of failure, without an evaluation."""
    wanted = select(tables.attempt.c.failure).where(
        statements.of_trial(tables.attempt, study, trial), tables.attempt.c.status == ENDED
    )
    trials = store.read(study, lambda connection: connection.scalars(wanted).all())
    return sum(
        failure is not None and failure.kind == kind for failure in map(mapping.failure_of, trials)
    )


def has_candidate(store: Store, study: str, trial: int) -> bool:
    """Say whether a trial has a row of ours."""
    return store.read(study, lambda c: statements.candidate(c, study, trial) is not None)


def candidates(store: Store, study: str) -> set[int]:
    """Return the trials that have an architecture of ours."""
    candidate = tables.candidate.c
    wanted = select(candidate.trial).where(candidate.study == study, candidate.fingerprint != "")
    return store.read(study, lambda connection: set(connection.scalars(wanted)))


def trial_of(store: Store, study: str, fingerprint: str) -> int | None:
    """Return the first trial of a study that has an architecture, or None."""
    candidate = tables.candidate.c
    wanted = select(func.min(candidate.trial)).where(
        candidate.study == study, candidate.fingerprint == fingerprint
    )

    def first(connection: Connection) -> int | None:
        trial = connection.scalar(wanted)
        return None if trial is None else int(trial)

    return store.read(study, first)


def evaluated(store: Store, study: str) -> int:
    """Return how many candidates of a study were evaluated; see `counting.is_evaluated`."""
    return store.read(study, lambda connection: row_readers.evaluated(connection, study))
