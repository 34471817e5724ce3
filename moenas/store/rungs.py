"""Rows of the rungs: results of candidates in training, and their checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, insert, select, update

from moenas.errors import StudyBusyError
from moenas.records import Evaluation, Plain, RungResult
from moenas.store import mapping, statements, study_events, tables
from moenas.store.reader import StoreReader
from moenas.store.store import Store

PAUSED = "paused"
"""Status of an attempt that ended at a rung."""


@dataclass(frozen=True)
class Pause:
    """A candidate that can continue from the checkpoint of its latest rung."""

    result: RungResult
    evaluation: Evaluation
    """The evaluation so far; its `weights_sha256` is the digest of the checkpoint."""


def add(store: Store, result: RungResult, evaluation: Evaluation) -> None:
    """Store the result of a candidate at a rung, and end its attempt.

    Raises:
        StudyBusyError: if another process has started or evaluated the trial meanwhile.
    """
    study, trial = evaluation.study, result.trial
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    row: Plain = {"study": study, **mapping.storable(result.plain())}
    del row["promoted"]
    row |= {
        "recorded_at": now,
        "evaluation": mapping.storable(evaluation.plain()),
        "checkpoint_sha256": evaluation.weights_sha256,
    }
    this = statements.of_trial(tables.rung, study, trial)
    attempt = tables.attempt.c

    def change(connection: Connection) -> None:
        newest = statements.newest_attempt(connection, study, trial)
        if evaluation.attempt < newest or statements.is_finished(connection, study, trial):
            raise StudyBusyError(
                f"study '{study}': another process has evaluated trial {trial} meanwhile"
            )
        same = this & (tables.rung.c.rung == result.rung)
        if connection.scalar(select(tables.rung.c.recorded_at).where(same)) != now:
            told: Plain = {"trial": trial, "rung": result.rung, "tokens": result.tokens}
            told |= statements.finite({"val_loss": result.val_loss})
            study_events.append(connection, study, "trial_paused", told)
        connection.execute(delete(tables.rung).where(same))
        connection.execute(
            update(tables.rung).where(this).values(evaluation=None, checkpoint_sha256=None)
        )
        connection.execute(insert(tables.rung), row)
        connection.execute(
            update(tables.attempt)
            .where(statements.of_trial(tables.attempt, study, trial), attempt.attempt == newest)
            .values(finished_at=now, status=PAUSED)
        )

    store.apply(study, change)


def promote(store: Store, study: str, trial: int, rung: int) -> None:
    """Store that a candidate trains on from a rung."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    this = statements.of_trial(tables.rung, study, trial) & (tables.rung.c.rung == rung)

    def change(connection: Connection) -> None:
        known = connection.scalar(select(tables.rung.c.promoted_at).where(this))
        connection.execute(update(tables.rung).where(this).values(promoted_at=now))
        if known != now:
            told = {"trial": trial, "rung": rung}
            study_events.append(connection, study, "trial_promoted", told)

    store.apply(study, change)


def forget(connection: Connection, study: str, trial: int) -> None:
    """Remove the rungs of a trial that is trained again from its start."""
    connection.execute(delete(tables.rung).where(statements.of_trial(tables.rung, study, trial)))


def drop(connection: Connection, study: str, objectives: Collection[str]) -> None:
    """Remove the values of objectives that have changed from the rungs of finished trials.

    Other trials lose their rungs: the next run trains them again from the start.
    """
    this, rung = tables.rung, tables.rung.c
    rows = connection.execute(select(this).where(rung.study == study)).all()
    unfinished = {row.trial for row in rows if row.checkpoint_sha256 is not None}
    for trial in unfinished:
        forget(connection, study, trial)
    for row in rows:
        known = {name: value for name, value in row.known.items() if name not in objectives}
        if row.trial not in unfinished and known != row.known:
            where = statements.of_trial(this, study, row.trial) & (rung.rung == row.rung)
            connection.execute(update(this).where(where).values(known=known))


def final_losses(store: StoreReader, study: str) -> dict[int, float]:
    """Return trial -> final validation loss, of the complete trials that are no copies."""
    evaluation = tables.evaluation.c
    wanted = select(evaluation.trial, evaluation.metrics).where(
        evaluation.study == study, evaluation.status == "complete"
    )
    rows = store.read(study, lambda connection: connection.execute(wanted).all())
    return {
        row.trial: row.metrics["val_loss"]
        for row in rows
        if "val_loss" in row.metrics and "copied_from" not in row.metrics
    }


def results(store: StoreReader, study: str) -> list[RungResult]:
    """Return the results of a study at all rungs, in order of rungs and trials."""
    return store.rung_results(study)


def pauses(store: StoreReader, study: str) -> dict[int, Pause]:
    """Return trial -> pause, of the trials without an evaluation that have a checkpoint."""
    rung = tables.rung.c
    wanted = select(tables.rung).where(rung.study == study, rung.checkpoint_sha256.is_not(None))

    def read(connection: Connection) -> dict[int, Pause]:
        if not statements.exists(connection, tables.rung):
            return {}
        pauses_by_trial = {}
        for row in connection.execute(wanted):
            plain = dict(row._mapping) | {"promoted": row.promoted_at is not None}
            evaluation = Evaluation.parse(row.evaluation)
            pauses_by_trial[row.trial] = Pause(RungResult.parse(plain), evaluation)
        return pauses_by_trial

    return store.read(study, read)
