"""The pace of a study: its running trials, and the candidates evaluated in an hour."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from moenas.records import Plain
from moenas.store import leases, mapping, row_readers, statements, tables
from moenas.store.counting import is_evaluated


@dataclass(frozen=True)
class Pace:
    """What the latest run of a study does."""

    running: list[Plain]
    """{trial, attempt, started_at} of each trial that a worker evaluates; UTC in ISO 8601. They
    belong to the latest run, also if it was killed."""
    candidates_per_hour: float | None
    """Of the latest run that evaluated a candidate, or of the run that is going on; None before
    its first evaluated candidate. Copies and reused evaluations do not count."""


def pace(connection: Connection, study: str) -> Pace:
    """Return the pace of a study, from rows alone."""
    if not statements.exists(connection, tables.run):  # a database of an older schema
        return Pace([], None)
    run = tables.run.c
    wanted = select(run.began_at, run.seconds).where(run.study == study)
    rows = connection.execute(wanted.order_by(run.began_at.desc())).all()
    if not rows:
        return Pace([], None)
    latest = rows[0].began_at
    running = _running_since(connection, study, latest)
    if leases.holder(connection, study) is not None:
        rows = rows[:1]
    until: str | None = None
    for row in rows:
        count = _evaluated_between(connection, study, row.began_at, until)
        if count and row.seconds > 0:
            return Pace(running, 3600 * count / row.seconds)
        until = row.began_at
    return Pace(running, None)


def _running_since(connection: Connection, study: str, began_at: str) -> list[Plain]:
    """Return the newest attempts of trials that began in a run and have not ended."""
    attempt, evaluation = tables.attempt.c, tables.evaluation.c
    newest = (
        select(attempt.trial, func.max(attempt.attempt).label("attempt"))
        .where(attempt.study == study)
        .group_by(attempt.trial)
        .subquery()
    )
    done = select(evaluation.trial).where(evaluation.study == study)
    rows = connection.execute(
        select(attempt.trial, attempt.attempt, attempt.started_at)
        .join(
            newest,
            (newest.c.trial == attempt.trial) & (newest.c.attempt == attempt.attempt),
        )
        .where(
            attempt.study == study,
            attempt.finished_at.is_(None),
            attempt.started_at >= began_at,
            attempt.trial.not_in(done),
        )
        .order_by(attempt.trial)
    )
    return [dict(row._mapping) for row in rows]


def _evaluated_between(connection: Connection, study: str, began_at: str, until: str | None) -> int:
    """Return how many candidates a run evaluated before the next one, without reused ones."""
    row = tables.evaluation.c
    reused = select(tables.reuse.c.trial).where(tables.reuse.c.study == study)
    wanted = select(row.trial, row.status, row.metrics, row.failure).where(
        row.study == study, row.recorded_at >= began_at, row.trial.not_in(reused)
    )
    rows = connection.execute(
        wanted if until is None else wanted.where(row.recorded_at < until)
    ).all()
    if not rows:
        return 0
    valued = row_readers.trials_with_values(connection, study)
    return sum(
        is_evaluated(r.status, r.metrics, mapping.failure_of(r.failure), r.trial in valued)
        for r in rows
    )
