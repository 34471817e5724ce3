"""The pace of a study: its running trials, and the candidates evaluated in an hour."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from moenas.records import Plain
from moenas.store import mapping, row_readers, statements, tables
from moenas.store.counting import is_evaluated


@dataclass(frozen=True)
class Pace:
    """What the latest run of a study does."""

    running: list[Plain]
    """{trial, attempt, started_at} of each trial that a worker evaluates; UTC in ISO 8601. They
    are those of the latest run, also if it was killed."""
    candidates_per_hour: float | None
    """None before its first evaluated candidate. Copies and reused evaluations do not count."""


def pace(connection: Connection, study: str) -> Pace:
    """Return the pace of the latest run of a study, from rows alone."""
    if not statements.exists(connection, tables.run):  # a database of an older schema
        return Pace([], None)
    run = tables.run.c
    latest = connection.execute(
        select(run.began_at, run.seconds)
        .where(run.study == study)
        .order_by(run.began_at.desc())
        .limit(1)
    ).first()
    if latest is None:
        return Pace([], None)
    count = _evaluated_since(connection, study, latest.began_at)
    per_hour = 3600 * count / latest.seconds if count and latest.seconds > 0 else None
    return Pace(_running_since(connection, study, latest.began_at), per_hour)


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


def _evaluated_since(connection: Connection, study: str, began_at: str) -> int:
    """Return how many candidates were evaluated since a run began, without reused ones."""
    row = tables.evaluation.c
    reused = select(tables.reuse.c.trial).where(tables.reuse.c.study == study)
    rows = connection.execute(
        select(row.trial, row.status, row.metrics, row.failure).where(
            row.study == study, row.recorded_at >= began_at, row.trial.not_in(reused)
        )
    ).all()
    valued = row_readers.trials_with_values(connection, study)
    return sum(
        is_evaluated(r.status, r.metrics, mapping.failure_of(r.failure), r.trial in valued)
        for r in rows
    )
