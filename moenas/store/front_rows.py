"""Who is on the front of a study since when, and the hypervolume: kept up to date as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from moenas import pareto
from moenas.records import FrontPoint, Plain, StudyRecord
from moenas.store.tables import front as member
from moenas.store.tables import hypervolume, objective, value


@dataclass(frozen=True)
class FrontSummary:
    """The front of a study after its latest complete trial."""

    size: int
    """Members of the front."""
    hypervolume: float | None
    """None without a complete trial."""


def summary(connection: Connection, name: str) -> FrontSummary:
    """Return the size of the front and its hypervolume."""
    row = last(connection, name)
    return FrontSummary(row.size, row.hypervolume) if row else FrontSummary(0, None)


def members(connection: Connection, record: StudyRecord) -> list[int]:
    """Return the trials on the front in order of the first objective, best first."""
    points = _points(connection, record, member.c.left_seq.is_(None))
    sign = 1 if next(iter(record.directions.values())) == "minimize" else -1
    return sorted(points, key=lambda trial: (sign * points[trial][0], trial))


def history(connection: Connection, name: str) -> list[FrontPoint]:
    """Return the front after each complete trial in the order in which they were recorded."""
    entered: set[int] = set()
    left: dict[int, list[int]] = {}
    for row in connection.execute(
        select(member).where(member.c.study == name).order_by(member.c.trial)
    ):
        entered.add(row.entered_seq)
        if row.left_seq is not None:
            left.setdefault(row.left_seq, []).append(row.trial)
    volumes = connection.execute(
        select(hypervolume).where(hypervolume.c.study == name).order_by(hypervolume.c.seq)
    )
    return [
        FrontPoint(r.trial, r.hypervolume, r.seq in entered, left.get(r.seq, []), r.size)
        for r in volumes
    ]


def advance(
    connection: Connection, record: StudyRecord, trial: int, point: list[float], *, copied: bool
) -> None:
    """Take a complete trial, whose values are stored already, into the front and its history.

    A trial that was `copied` from an earlier one of the same model changes nothing: a front holds
    each model once.
    The front needs its members alone. All hypervolumes are computed again only when the reference
    point moves: when a trial is the best or the worst so far in some objective.
    """
    name, directions = record.name, list(record.directions.values())
    known = _points(connection, record, member.c.left_seq.is_(None))
    trials, values = list(known), list(known.values())
    entered, rows = (False, []) if copied else pareto.insertion(values, point, directions)
    latest = last(connection, name)
    seq = latest.seq + 1 if latest else 1
    if entered:
        _leave(connection, name, [trials[row] for row in rows], seq)
        connection.execute(insert(member), {"study": name, "trial": trial, "entered_seq": seq})
    size = len(trials) - len(rows) + entered
    row = {"study": name, "seq": seq, "trial": trial, "hypervolume": 0.0, "size": size}
    corner = _widen(connection, record, point)
    moved = corner != record.reference_point
    if latest and not moved:
        gain = 0.0
        if entered:
            reference_point = list(corner.values())
            gain = pareto.hypervolume_improvement(values, point, reference_point, directions)
        row["hypervolume"] = min(latest.hypervolume + gain, pareto.LARGEST)
    connection.execute(insert(hypervolume), row)
    if moved:
        _measure(connection, record, corner, seq)


def last(connection: Connection, name: str) -> Row[Any] | None:
    """Return the row of the latest complete trial: seq, trial, hypervolume, size."""
    rows = select(hypervolume).where(hypervolume.c.study == name)
    return connection.execute(rows.order_by(hypervolume.c.seq.desc()).limit(1)).first()


def _leave(connection: Connection, name: str, trials: list[int], seq: int) -> None:
    if trials:
        gone = (member.c.study == name) & member.c.trial.in_(trials)
        connection.execute(update(member).where(gone).values(left_seq=seq))


def _widen(connection: Connection, record: StudyRecord, point: list[float]) -> dict[str, float]:
    """Take a point into the range of the complete trials; return their reference point.

    The rule needs no more of all points than the least and the greatest value of each objective.
    """
    columns = objective.c
    known = connection.execute(
        select(columns.lowest, columns.highest)
        .where(columns.study == record.name)
        .order_by(columns.position)
    ).all()
    seen = [[v for v in row if v is not None] for row in known]
    lowest = [min([*ends, new]) for ends, new in zip(seen, point, strict=True)]
    highest = [max([*ends, new]) for ends, new in zip(seen, point, strict=True)]
    corner = pareto.reference_point([lowest, highest], list(record.directions.values()))
    entries = zip(record.directions, known, lowest, highest, corner, strict=True)
    for name, ends, low, high, reference in entries:
        if (low, high) != tuple(ends):
            this = (columns.study == record.name) & (columns.name == name)
            changes = {"lowest": low, "highest": high, "reference": reference}
            connection.execute(update(objective).where(this).values(changes))
    return dict(zip(record.directions, corner, strict=True))


def _measure(
    connection: Connection, record: StudyRecord, corner: dict[str, float], end: int
) -> None:
    """Measure every hypervolume, up to row `end`, from another reference point.

    Only trials that entered the front raised it; the rows up to the next such trial are equal.
    """
    name, directions = record.name, list(record.directions.values())
    points = _points(connection, record)
    starts = connection.scalars(
        select(member.c.entered_seq).where(member.c.study == name).order_by(member.c.entered_seq)
    ).all()
    steps = pareto.history(list(points.values()), directions, list(corner.values()), list(points))
    spans: list[Plain] = [
        {"first": first, "after": after, "volume": step.hypervolume}
        for first, after, step in zip(starts, [*starts[1:], end + 1], steps, strict=True)
    ]
    rows = (
        (hypervolume.c.study == name)
        & (hypervolume.c.seq >= bindparam("first"))
        & (hypervolume.c.seq < bindparam("after"))
    )
    volumes = update(hypervolume).where(rows).values(hypervolume=bindparam("volume"))
    connection.execute(volumes, spans)


def _points(
    connection: Connection, record: StudyRecord, which: Any = True
) -> dict[int, list[float]]:
    """Return trial -> values of those that ever were on the front, in order of their entry.

    Every trial on a front has all values. One row for each trial costs a quarter of the time of one
    row for each value.
    """
    columns = []
    source: Any = member
    for name in record.directions:
        own = value.alias()
        same = (own.c.study == member.c.study) & (own.c.trial == member.c.trial)
        source = source.join(own, same & (own.c.objective == name))
        columns.append(own.c.value)
    rows = connection.execute(
        select(member.c.trial, *columns)
        .select_from(source)
        .where(member.c.study == record.name, which)
        .order_by(member.c.entered_seq)
    )
    return {trial: list(values) for trial, *values in rows}
