"""Records as rows of the tables, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from sqlalchemy import Row, Table

from moenas.records import Evaluation, Failure, ObjectiveInfo, Plain, StudyRecord
from moenas.store.tables import curve, evaluation, objective, reuse, routing, study, value

KEYS = {"study", "trial", "position", "layer", "extra"}
"""Columns of the curve and the routing that are not facts of a row by themselves."""

MESSAGE = 4_000
"""Characters of the message of a failure that are stored."""
TRACEBACK = 32_000
"""Characters of a traceback that are stored: its end, which names the error."""
DETAILS = 64_000
"""Characters of JSON that are stored of how one value was measured, or of one row of a curve."""
TEXT = 1_000
"""Characters of one text that are stored of details that are too long."""
CURVE_ROWS = 10_000
"""Rows of a curve that are stored, evenly spread."""
CUT = "... cut"
LATER = ("curve", "routing")
"""Parts of an evaluation that are read when they are asked for."""


def storable(plain: Any) -> Any:
    """Return plain data as every database takes it.

    A number that is not finite becomes None. Bytes that are not Unicode text and the character NUL
    are spelt as escapes, so that every message of a failure can be stored.
    """
    if isinstance(plain, dict):
        return {storable(key): storable(entry) for key, entry in plain.items()}
    if isinstance(plain, list | tuple):
        return [storable(entry) for entry in plain]
    if isinstance(plain, float) and not math.isfinite(plain):
        return None
    if isinstance(plain, str):
        text = plain.encode("utf-8", "backslashreplace").decode("utf-8")
        return text.replace("\0", "\\x00")
    return plain


def failure_of(stored: Plain | None) -> Failure | None:
    """Return a stored failure."""
    return None if stored is None else Failure.parse(stored)


def failure_json(failure: Failure | None) -> Plain | None:
    """Return a failure as it is stored: its texts are cut where they are too long."""
    if failure is None:
        return None
    plain: Plain = storable(failure.plain())
    del plain["cause"]
    message, trace = plain["message"], plain["traceback"]
    if len(message) > MESSAGE:
        plain["message"] = f"{message[:MESSAGE]}{CUT} ({len(message):,} characters)"
    if len(trace) > TRACEBACK:
        plain["traceback"] = f"({len(trace):,} characters) {CUT}\n{trace[-TRACEBACK:]}"
    return plain


def details(plain: Any) -> Any:
    """Return details as they are stored: as they are, or what of them is short, and so said."""
    length = len(json.dumps(plain))
    if length <= DETAILS:
        return plain
    short: Plain = {"cut": f"{length:,} characters of details{CUT}"}
    room = DETAILS - 200
    for key, entry in plain.items() if isinstance(plain, dict) else ():
        text = json.dumps(entry)
        if len(text) > TEXT:
            entry = text[:TEXT] + CUT
        size = len(json.dumps({key: entry}))
        if size <= room:
            short[key] = entry
            room -= size
    return short


def thinned(curve: list[Any]) -> list[Any]:
    """Return at most CURVE_ROWS rows of a curve, the first and the last among them."""
    if len(curve) <= CURVE_ROWS:
        return curve
    step = (len(curve) - 1) / (CURVE_ROWS - 1)
    return [curve[round(i * step)] for i in range(CURVE_ROWS)]


def study_rows(record: StudyRecord) -> dict[Table, list[Plain]]:
    """Return the rows of a study, all but when it was created."""
    row = {name: entry for name, entry in record.plain().items() if name in study.c}
    objectives = [
        {"study": record.name, "position": position, **info}
        for position, info in enumerate(record.objectives)
    ]
    return {study: [storable(row)], objective: storable(objectives)}


def study_record(row: Row[Any], objectives: Iterable[Row[Any]]) -> StudyRecord:
    """Build the record of a study; its objectives come in order."""
    infos, corner = [], {}
    for info in objectives:
        infos.append({field.name: getattr(info, field.name) for field in fields(ObjectiveInfo)})
        if info.reference is not None:
            corner[info.name] = info.reference
    return StudyRecord.parse(dict(row._mapping) | {"objectives": infos, "reference_point": corner})


def evaluation_rows(record: Evaluation, recorded_at: str) -> dict[Table, list[Plain]]:
    """Return the rows of an evaluation."""
    key: Plain = {"study": record.study, "trial": record.trial}
    plain = storable(record.plain())
    plain["failure"] = failure_json(record.failure)
    names = dict.fromkeys((*plain["values"], *plain["measurements"]))
    source = record.reused_from
    return {
        evaluation: [
            {name: entry for name, entry in plain.items() if name in evaluation.c}
            | {"recorded_at": recorded_at}
        ],
        value: [
            key
            | {
                "objective": name,
                "value": plain["values"].get(name),
                "measurement": details(plain["measurements"].get(name)),
            }
            for name in names
        ],
        curve: [
            key | {"position": position} | _facts(curve, row)
            for position, row in enumerate(thinned(plain["curve"]))
        ],
        routing: [key | {"layer": row["layer"]} | _facts(routing, row) for row in plain["routing"]],
        reuse: []
        if source is None
        else [key | {"from_study": source["study"], "from_trial": source["trial"]}],
    }


def _facts(table: Table, row: Plain) -> Plain:
    """Sort what a row says into the columns of a table; the rest goes into `extra`."""
    columns = [column.name for column in table.columns if column.name not in KEYS]
    rest = {k: v for k, v in row.items() if k not in columns and k not in KEYS}
    return {name: row.get(name) for name in columns} | {"extra": details(rest) if rest else None}


def _said(row: Row[Any], key: str = "") -> Plain:
    """Return what a row of the curve or the routing says; what is NULL is not said."""
    facts = {
        name: entry
        for name, entry in zip(row._fields, row, strict=True)
        if entry is not None and (name not in KEYS or name == key)
    }
    return facts | row.extra if row.extra else facts


class Stored(Evaluation):
    """An evaluation whose curve and routing are read from the database when they are asked for.

    It equals the evaluation that was stored. Once read, they stay.
    """

    _later: Callable[[str, int], list[Plain]]

    @classmethod
    def of(cls, plain: Plain, later: Callable[[str, int], list[Plain]]) -> Stored:
        """Build an evaluation of all but its curve and routing, which `later` reads by name."""
        evaluation = cls.parse({**plain, "curve": [], "routing": []})
        for name in LATER:
            del evaluation.__dict__[name]
        evaluation.__dict__["_later"] = later
        return evaluation

    def __getattr__(self, name: str) -> Any:
        if name not in LATER or "_later" not in self.__dict__:
            raise AttributeError(name)
        self.__dict__[name] = self._later(name, self.trial)
        return self.__dict__[name]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Evaluation):
            return NotImplemented
        names = [field.name for field in fields(Evaluation)]
        return all(getattr(self, name) == getattr(other, name) for name in names)

    __hash__ = None  # type: ignore[assignment]


def part(name: str, rows: Iterable[Row[Any]]) -> list[Plain]:
    """Return the `curve` or the `routing` that rows of the table hold."""
    return [_said(row, "layer" if name == "routing" else "") for row in rows]


def evaluations(
    rows: Iterable[Row[Any]], values: Iterable[Row[Any]], reused: Iterable[Row[Any]] = ()
) -> list[Plain]:
    """Return evaluations as plain data, without curves and routing, in the order of `rows`."""
    plain_by_trial: dict[int, Plain] = {}
    for row in rows:
        plain_by_trial[row.trial] = dict(row._mapping) | {"values": {}, "measurements": {}}
    for row in values:
        if row.value is not None:
            plain_by_trial[row.trial]["values"][row.objective] = row.value
        if row.measurement is not None:
            plain_by_trial[row.trial]["measurements"][row.objective] = row.measurement
    for row in reused:
        if row.trial in plain_by_trial:
            plain_by_trial[row.trial]["reused_from"] = {
                "study": row.from_study,
                "trial": row.from_trial,
            }
    return list(plain_by_trial.values())
