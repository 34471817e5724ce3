"""Statements that several methods of the store share, each inside a transaction of its caller."""

from __future__ import annotations

import math
import unicodedata
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Connection, Engine, Row, Table, func, insert, inspect, select
from sqlalchemy.dialects import postgresql, sqlite

from moenas import terminal
from moenas.errors import InputError, NotFoundError, suggestion
from moenas.records import Evaluation, Plain, StudyRecord
from moenas.store import tables

_THERE: WeakKeyDictionary[Engine, set[str]] = WeakKeyDictionary()
"""Tables that a database is known to have; none is ever dropped."""


def exists(connection: Connection, table: Table) -> bool:
    """Whether the database has a table; one of an older schema lacks the newest tables."""
    known = _THERE.setdefault(connection.engine, set())
    if table.name not in known and inspect(connection).has_table(table.name):
        known.add(table.name)
    return table.name in known


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON can hold them: None replaces one that is not finite."""
    return {name: x if math.isfinite(x) else None for name, x in values.items()}


def upsert(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT whose `on_conflict_do_update` changes an existing row."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement: postgresql.Insert | sqlite.Insert = dialect.insert(table)
    return statement


def insert_rows(connection: Connection, rows_by_table: dict[Table, list[Plain]]) -> None:
    """Store the rows of each table."""
    for table, entries in rows_by_table.items():
        if entries:
            connection.execute(insert(table), entries)


def of_trial(table: Table, name: str, trial: int) -> ColumnElement[bool]:
    """Return the condition that a row belongs to a trial."""
    return (table.c.study == name) & (table.c.trial == trial)


def normal_study_name(name: str) -> str:
    """Return the name of a study in Unicode's form NFC, in which space files are read, too.

    Raises:
        InputError: if the text cannot be the name of a study.
    """
    normal = unicodedata.normalize("NFC", name)
    check_study_name(normal)
    return normal


def check_study_name(name: str) -> None:
    """Raise InputError if a text cannot be the name of a study."""
    if not (name.strip() and name.isprintable() and len(name) <= tables.NAME_LENGTH):
        raise InputError(
            f"study name {name[:40]!r}: 1 to {tables.NAME_LENGTH} printable characters"
        )


def known_study(connection: Connection, name: str, *, lock: bool = False) -> None:
    """Raise NotFoundError if there is no such study; with `lock`, let no other one change it."""
    wanted = select(tables.study.c.name).where(tables.study.c.name == name)
    if connection.execute(wanted.with_for_update() if lock else wanted).first() is None:
        if (present := renamed_to(connection, name)) is not None:
            raise NotFoundError(f"no study '{name}': {reserved_text(name, present)}")
        names = connection.scalars(select(tables.study.c.name).order_by(tables.study.c.name)).all()
        there = f"There are: {', '.join(names)}." if names else "There is none yet."
        raise NotFoundError(f"no study '{name}'.{suggestion(name, names)} {there}")


def renamed_to(connection: Connection, name: str) -> str | None:
    """Return the present name of the study that had a name; None if the name is not reserved."""
    if not exists(connection, tables.reservation):  # a database of an older schema
        return None
    wanted = select(tables.reservation.c.renamed_to).where(tables.reservation.c.name == name)
    present: str | None = connection.scalar(wanted)
    return present


def reserved_text(name: str, present: str) -> str:
    """Say why a name is reserved, and which command frees it."""
    words = terminal.command(["rename", name, present])
    return f"it is being renamed to '{present}'; if that process was killed, `{words}` finishes it"


def candidate(connection: Connection, name: str, trial: int) -> Row[Any] | None:
    """Return what a trial is to evaluate, or None."""
    wanted = select(tables.candidate).where(of_trial(tables.candidate, name, trial))
    return connection.execute(wanted).first()


def known_trial(connection: Connection, name: str, trial: int) -> Row[Any]:
    """Return what a trial is to evaluate; raise NotFoundError if it was never asked for."""
    row = candidate(connection, name, trial)
    if row is None:
        numbers = tables.candidate.c.trial
        count, last = connection.execute(
            select(func.count(), func.max(numbers)).where(tables.candidate.c.study == name)
        ).one()
        there = f"it has {count}, up to trial {last}" if count else "it has none yet"
        raise NotFoundError(f"study '{name}' has no trial {trial}; {there}")
    return row


def is_finished(connection: Connection, name: str, trial: int) -> bool:
    """Whether a trial has an evaluation."""
    wanted = select(tables.evaluation.c.trial).where(of_trial(tables.evaluation, name, trial))
    return connection.execute(wanted).first() is not None


def newest_attempt(connection: Connection, name: str, trial: int) -> int:
    """Return how many times a trial was started."""
    this = of_trial(tables.attempt, name, trial)
    return connection.execute(select(func.max(tables.attempt.c.attempt)).where(this)).scalar() or 0


def started_at(connection: Connection, name: str, trial: int, number: int) -> str | None:
    """Return when an attempt began, or None if there is no such attempt."""
    attempt = tables.attempt.c
    this = of_trial(tables.attempt, name, trial) & (attempt.attempt == number)
    return connection.execute(select(attempt.started_at).where(this)).scalar()


def is_stored(connection: Connection, record: StudyRecord, created: str) -> bool:
    """Whether the study of this name is this one, stored at this moment."""
    study = tables.study.c
    wanted = select(study.space_sha256, study.created_at).where(study.name == record.name)
    row = connection.execute(wanted).first()
    return row is not None and tuple(row) == (record.space_sha256, created)


def point(record: StudyRecord, evaluation: Evaluation) -> list[float]:
    """Return the values of a complete evaluation in the order of the study's objectives."""
    values = [evaluation.values.get(name, math.nan) for name in record.directions]
    for name, number in zip(record.directions, values, strict=True):
        if not math.isfinite(number):
            raise InputError(
                f"study '{record.name}', trial {evaluation.trial}: complete, but {name} is"
                f" {evaluation.values.get(name)}; a complete trial has a finite value of each"
                " objective"
            )
    return [float(number) for number in values]


def reference_ms(connection: Connection, name: str) -> dict[str, float]:
    """Return device and workload -> time of the reference model there, in ms."""
    reference = tables.reference.c
    wanted = select(reference.key, reference.ms).where(reference.study == name)
    return {row.key: row.ms for row in connection.execute(wanted)}
