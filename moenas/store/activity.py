"""When something last happened in each study of a database."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from moenas.store import statements, tables


def last_activity(connection: Connection) -> dict[str, str]:
    """Return study -> time of its newest row, UTC in ISO 8601.

    The rows belong to the study, its attempts, its evaluations and its end.
    """
    study, attempt = tables.study, tables.attempt
    sources = [
        (study, study.c.name, study.c.created_at),
        (attempt, attempt.c.study, attempt.c.started_at),
        (attempt, attempt.c.study, attempt.c.finished_at),
        (tables.evaluation, tables.evaluation.c.study, tables.evaluation.c.recorded_at),
        (tables.ended, tables.ended.c.study, tables.ended.c.ended_at),
    ]
    newest: dict[str, str] = {}
    for table, name, time in sources:
        if not statements.exists(connection, table):  # a database of an older schema
            continue
        wanted = select(name, func.max(time)).where(time.is_not(None)).group_by(name)
        for row in connection.execute(wanted):
            newest[row[0]] = max(newest.get(row[0], ""), row[1])
    return newest
