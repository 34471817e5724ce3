"""Rows of the replicates: trials that were trained again with other seeds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, insert, select

from moenas.records import Evaluation, Plain
from moenas.store import mapping, statements, study_events, tables
from moenas.store.store import Store


def add(store: Store, replicate: Evaluation) -> None:
    """Store a replicate, without its curve and its routing; its seed names it.

    A row of the same seed is replaced.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    plain = replace(replicate, curve=[], routing=[]).plain()
    plain["failure"] = mapping.failure_json(replicate.failure)
    row: Plain = {"study": replicate.study, "trial": replicate.trial, "seed": replicate.seed}
    row |= {"recorded_at": now, "status": replicate.status, "evaluation": mapping.storable(plain)}
    table = tables.replicate
    same = statements.of_trial(table, replicate.study, replicate.trial) & (
        table.c.seed == replicate.seed
    )

    def change(connection: Connection) -> None:
        if connection.scalar(select(table.c.recorded_at).where(same)) == now:
            return  # this transaction was committed before its answer was lost
        connection.execute(delete(table).where(same))
        connection.execute(insert(table), row)
        told: Plain = {"trial": replicate.trial, "seed": replicate.seed, "status": replicate.status}
        told["values"] = statements.finite(replicate.values)
        study_events.append(connection, replicate.study, "trial_replicated", told)

    store.apply(replicate.study, change)


def drop(connection: Connection, study: str) -> None:
    """Remove the replicates of a study whose objectives have changed."""
    connection.execute(delete(tables.replicate).where(tables.replicate.c.study == study))


def of_model(
    connection: Connection, studies: Collection[str], fingerprint: str, seed: int
) -> list[Evaluation]:
    """Return complete replicates of a model with a seed in some studies."""
    table, candidate = tables.replicate, tables.candidate.c
    same = (candidate.study == table.c.study) & (candidate.trial == table.c.trial)
    wanted = (
        select(table.c.evaluation)
        .join(tables.candidate, same)
        .where(
            candidate.fingerprint == fingerprint,
            table.c.study.in_(studies),
            table.c.seed == seed,
            table.c.status == "complete",
        )
        .order_by(table.c.recorded_at)
    )
    return [Evaluation.parse(plain) for plain in connection.scalars(wanted)]
