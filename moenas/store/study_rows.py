"""All rows of one study, ours and Optuna's, as plain data: read, checked, and written elsewhere.

Our tables and Optuna's have different names, so one mapping from table names to rows holds both.
The rows of a process or a server stay where they are: the lease, the queue, the events, the audit.
Every other column is kept bit for bit. Optuna's ids, which each database counts itself, are read
as 1, 2, 3 ... in their order, so that equal studies of two databases have equal rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from typing import Any, TypeAlias

from optuna.storages._rdb import models
from sqlalchemy import Column, Connection, Row, Table, delete, insert, inspect, select, types
from sqlalchemy.exc import DataError, IntegrityError

from moenas.errors import ConflictError, InputError
from moenas.records import Plain
from moenas.store import reservations, statements, study_events, tables

STUDY: Any = models.StudyModel.__table__
TRIAL: Any = models.TrialModel.__table__

StudyRows: TypeAlias = dict[str, list[Plain]]
"""Table name -> its rows of one study, as column -> JSON value."""

OWN: tuple[Table, ...] = (
    tables.study,
    tables.objective,
    tables.ended,
    tables.run,
    tables.change,
    tables.reference,
    tables.study_calibration,
    tables.hypervolume,
    tables.candidate,
    tables.enqueued,
    tables.attempt,
    tables.evaluation,
    tables.reuse,
    tables.rung,
    tables.replicate,
    tables.value,
    tables.curve,
    tables.routing,
    tables.front,
)
"""Our tables of a study; each comes after those that it refers to."""

OF_STUDY: tuple[Any, ...] = (
    models.StudyDirectionModel.__table__,
    models.StudyUserAttributeModel.__table__,
    models.StudySystemAttributeModel.__table__,
)
OF_TRIAL: tuple[Any, ...] = (
    models.TrialParamModel.__table__,
    models.TrialValueModel.__table__,
    models.TrialIntermediateValueModel.__table__,
    models.TrialUserAttributeModel.__table__,
    models.TrialSystemAttributeModel.__table__,
)
"""Optuna's tables. Heartbeats of trials are left out: they belong to a living process."""

TRIAL_NOTE = re.compile(r"dashboard:(\d+):(note_.*)", re.DOTALL)
"""Key of a note of the Optuna dashboard; it holds the id of the trial."""
CHUNK = 1000
"""Rows of one statement."""


def every_table() -> dict[str, Any]:
    """Return table name -> table, in an order in which rows can be written."""
    return {table.name: table for table in (*OWN, STUDY, *OF_STUDY, TRIAL, *OF_TRIAL)}


def name_of(rows: StudyRows) -> str:
    """Return the name of the study that the rows belong to."""
    return str(rows[tables.study.name][0]["name"])


# --- read ----------------------------------------------------------------------------------------


def read(connection: Connection, name: str) -> StudyRows:
    """Return all rows of a study in one state.

    Raises:
        NotFoundError: if there is no such study.
    """
    statements.known_study(connection, name)
    rows_by_table: StudyRows = {}
    for table in OWN:
        own = table.c.name if table is tables.study else table.c.study
        # A database of an older schema lacks the newest tables.
        there = statements.exists(connection, table)
        rows_by_table[table.name] = _plain_rows(connection, table, own == name) if there else []
    if not inspect(connection).has_table(STUDY.name):
        return rows_by_table | {table: [] for table in every_table() if table not in rows_by_table}
    ids = select(STUDY.c.study_id).where(STUDY.c.study_name == name).scalar_subquery()
    trials = select(TRIAL.c.trial_id).where(TRIAL.c.study_id == ids)
    rows_by_table[STUDY.name] = _plain_rows(connection, STUDY, STUDY.c.study_name == name)
    for table in (*OF_STUDY, TRIAL):
        rows_by_table[table.name] = _plain_rows(connection, table, table.c.study_id == ids)
    for table in OF_TRIAL:
        rows_by_table[table.name] = _plain_rows(connection, table, table.c.trial_id.in_(trials))
    return _counted(rows_by_table)


def _counted(rows: StudyRows) -> StudyRows:
    """Return rows with Optuna's ids counted from 1 in each table."""
    trials = {row["trial_id"]: i for i, row in enumerate(rows[TRIAL.name], start=1)}
    for table in (STUDY, *OF_STUDY, TRIAL, *OF_TRIAL):
        own = _own_key(table)
        for i, row in enumerate(rows[table.name], start=1):
            row |= {"study_id": 1} if "study_id" in row else {}
            row |= {"trial_id": trials[row["trial_id"]]} if "trial_id" in row else {}
            row |= {"key": _key(row["key"], trials)} if table in OF_STUDY and "key" in row else {}
            row[own] = i
    return rows


def _plain_rows(connection: Connection, table: Any, condition: Any) -> list[Plain]:
    wanted = select(table).where(condition).order_by(*table.primary_key.columns)
    columns = list(table.columns)
    return [_plain(row, columns) for row in connection.execute(wanted)]


def _plain(row: Row[Any], columns: list[Column[Any]]) -> Plain:
    return {column.name: _to_plain(value) for column, value in zip(columns, row, strict=True)}


def _to_plain(value: Any) -> Any:
    """Return a value as JSON holds it: the name of an Enum, the ISO form of a time."""
    if isinstance(value, Enum):
        return value.name
    return value.isoformat() if isinstance(value, datetime) else value


# --- changed and checked -------------------------------------------------------------------------


def renamed(rows: StudyRows, name: str) -> StudyRows:
    """Return the rows of a study under another name."""
    rows_by_table: StudyRows = {}
    for table, entries in rows.items():
        own = {tables.study.name: "name", STUDY.name: "study_name"}.get(table)
        if own is None and table in tables.metadata.tables:
            own = "study"
        rows_by_table[table] = [{**row, own: name} if own else dict(row) for row in entries]
    for row in [*rows_by_table[tables.rung.name], *rows_by_table[tables.replicate.name]]:
        if row["evaluation"] is not None:  # an Evaluation names its study
            row["evaluation"] = {**row["evaluation"], "study": name}
    return rows_by_table


def check(rows: StudyRows) -> None:
    """Check rows from a file: tables, columns, types, and that they belong to one study.

    A table that is left out has no rows.

    Raises:
        InputError: naming the table and the row.
    """
    known = every_table()
    for name in rows:
        if name not in known:
            raise InputError(f"table '{name}': not one that this moenas knows; upgrade moenas")
    for name, table in known.items():
        columns = {column.name: column for column in table.columns}
        for i, row in enumerate(rows.setdefault(name, []), start=1):
            _check_row(f"table '{name}', row {i}", row, columns)
    if len(rows[tables.study.name]) != 1 or len(rows[STUDY.name]) > 1:
        raise InputError(f"table '{tables.study.name}': holds not exactly one study")
    _check_owner(rows, name_of(rows))
    _check_sections(rows[tables.study.name][0])


def _check_sections(row: Plain) -> None:
    """Refuse a study whose space or corpus is no JSON object, or has a section that is none."""
    sections = {"space": row["space"], "data": row["data"]}
    if isinstance(row["space"], dict):
        named = ("architecture", "train", "measure", "search")
        sections |= {f"space.{n}": row["space"][n] for n in named if n in row["space"]}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise InputError(f"table '{tables.study.name}': '{name}' is no object: {section!r:.60}")


def _check_row(place: str, row: Any, columns: dict[str, Any]) -> None:
    if not isinstance(row, dict) or set(row) != set(columns):
        raise InputError(f"{place}: its columns are not {', '.join(columns)}; upgrade moenas")
    for name, column in columns.items():
        value = row[name]
        if value is None:
            if not column.nullable:
                raise InputError(f"{place}: '{name}' is null")
        elif not _is_of(column.type, value):
            raise InputError(f"{place}: '{name}' is no {type(column.type).__name__}: {value!r:.60}")


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a column can hold a JSON value; SQLite itself takes any value anywhere."""
    if isinstance(kind, types.JSON):  # every one of ours is an object or a list
        return isinstance(value, dict | list)
    if isinstance(kind, types.Enum):  # a kind of String
        return value in (kind.enums or ())
    if isinstance(kind, types.String):
        return isinstance(value, str) and len(value) <= (kind.length or math.inf)
    if isinstance(kind, types.DateTime):
        return isinstance(value, str) and _is_time(value)
    if isinstance(value, bool):
        return False
    if isinstance(kind, types.Integer):
        return isinstance(value, int) and abs(value) < 2**63
    return isinstance(value, int | float) and math.isfinite(value)


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is None
    except ValueError:
        return False


def _check_owner(rows: StudyRows, name: str) -> None:
    """Refuse rows that belong to another study than the one of the rows."""
    for table in OWN:
        own = "name" if table is tables.study else "study"
        for row in rows[table.name]:
            if row[own] != name:
                raise InputError(f"table '{table.name}': a row of another study than '{name}'")
    studies = {row["study_id"] for row in rows[STUDY.name] if row["study_name"] == name}
    if len(studies) != len(rows[STUDY.name]):
        raise InputError(f"table '{STUDY.name}': a row of another study than '{name}'")
    trials = {row["trial_id"] for row in rows[TRIAL.name]}
    for table, known, key in [
        *((table, studies, "study_id") for table in (*OF_STUDY, TRIAL)),
        *((table, trials, "trial_id") for table in OF_TRIAL),
    ]:
        if any(row[key] not in known for row in rows[table.name]):
            raise InputError(f"table '{table.name}': a row without its {key}")


# --- written -------------------------------------------------------------------------------------


def write(connection: Connection, rows: StudyRows) -> None:
    """Insert the rows of a study that is not there, inside the transaction of the caller.

    Raises:
        ConflictError: if another process has just made a study of this name.
        InputError: if the rows contradict one another.
    """
    write_own(connection, rows)
    with _plain_refusals(rows):
        _write_optuna(connection, rows)


def write_own(connection: Connection, rows: StudyRows) -> None:
    """Insert the rows of our own tables; as `write`.

    The row of the study is the first. So if there are two writers, one waits and fails.
    """
    try:
        _insert(connection, tables.study, rows[tables.study.name])
    except IntegrityError as error:
        raise ConflictError(f"study '{name_of(rows)}' already exists") from error
    reservations.require_free(connection, name_of(rows))
    study_events.forget_deleted(connection, name_of(rows))
    with _plain_refusals(rows):
        for table in OWN[1:]:
            _insert(connection, table, rows[table.name])


@contextmanager
def _plain_refusals(rows: StudyRows) -> Iterator[None]:
    """Turn the refusal of rows by the database into one line."""
    try:
        yield
    except (IntegrityError, DataError) as error:
        said = str(error.orig).splitlines()[0]
        raise InputError(f"study '{name_of(rows)}': rows cannot be stored: {said}") from error


def _write_optuna(connection: Connection, rows: StudyRows) -> None:
    """Insert the rows of Optuna under new ids, in the order of the old ones."""
    if not rows[STUDY.name]:
        return
    (row,) = rows[STUDY.name]
    _insert(connection, STUDY, rows[STUDY.name], drop="study_id")
    by_name = select(STUDY.c.study_id).where(STUDY.c.study_name == row["study_name"])
    study_id = connection.execute(by_name).scalar_one()
    of_study = {"study_id": study_id}
    trials = sorted(rows[TRIAL.name], key=lambda trial: int(trial["trial_id"]))
    _insert(connection, TRIAL, trials, drop="trial_id", change=of_study)
    by_order = select(TRIAL.c.trial_id).where(TRIAL.c.study_id == study_id)
    new = connection.scalars(by_order.order_by(TRIAL.c.trial_id)).all()
    ids = {old["trial_id"]: now for old, now in zip(trials, new, strict=True)}
    for table in OF_STUDY:
        entries = rows[table.name]
        entries = [
            {**entry, "key": _key(entry["key"], ids)} if "key" in entry else entry
            for entry in entries
        ]
        _insert(connection, table, entries, drop=_own_key(table), change=of_study)
    for table in OF_TRIAL:
        entries = [{**entry, "trial_id": ids[entry["trial_id"]]} for entry in rows[table.name]]
        _insert(connection, table, entries, drop=_own_key(table))


def _own_key(table: Any) -> str:
    return str(next(iter(table.primary_key.columns)).name)


def _key(key: str, ids: dict[int, int]) -> str:
    """Return the key of a study's attribute, with the new id of the trial that it names."""
    matched = TRIAL_NOTE.fullmatch(key)
    if matched is None or int(matched[1]) not in ids:
        return key
    return f"dashboard:{ids[int(matched[1])]}:{matched[2]}"


def _insert(
    connection: Connection,
    table: Any,
    entries: list[Plain],
    *,
    drop: str | None = None,
    change: Plain | None = None,
) -> None:
    columns = {column.name: column.type for column in table.columns if column.name != drop}
    values = [
        {name: _from_plain(columns[name], {**row, **(change or {})}[name]) for name in columns}
        for row in entries
    ]
    for chunk in _chunks(values):
        connection.execute(insert(table), chunk)


def _chunks(rows: list[Plain]) -> Iterator[list[Plain]]:
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def _from_plain(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(kind, types.DateTime):
        return datetime.fromisoformat(value)
    if isinstance(kind, types.Enum) and kind.enum_class is not None:
        return kind.enum_class[value]
    return value


def forget(connection: Connection, name: str) -> None:
    """Delete our rows of a study inside the transaction of the caller."""
    connection.execute(delete(tables.study).where(tables.study.c.name == name))


# --- as text -------------------------------------------------------------------------------------


def to_lines(entries: list[Plain]) -> bytes:
    """Write rows as JSON, one row a line; a float is written so that it is read back exactly."""
    dumps = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in entries)
    return "".join(f"{line}\n" for line in dumps).encode()


def from_lines(data: bytes) -> list[Plain]:
    """Read rows that `to_lines` wrote.

    Raises:
        ValueError: if they are not JSON.
    """
    lines = data.decode().split("\n")
    return [json.loads(line, parse_constant=_refuse_constant) for line in lines if line]


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
