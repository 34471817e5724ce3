"""Events of studies as rows: each is added in the transaction of the change that it tells of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from moenas.records import Evaluation, Plain
from moenas.store import mapping, statements, tables
from moenas.store.front_rows import FrontSummary

event, counter = tables.event, tables.event_counter

MOST = 500
"""Events that one query reads of one study."""
STUDIES = 200
"""Studies whose newer events one query reads: SQLite limits the depth of an expression."""


@dataclass(frozen=True)
class StudyEvent:
    """One change of a study."""

    study: str
    id: int
    """Counts from 1 without a gap."""
    at: str
    kind: str
    """Such as submitted, trial_started, trial_finished or finished."""
    data: Plain

    def plain(self) -> Plain:
        """Return the event as a JSON object."""
        return asdict(self)


def append(connection: Connection, study: str, kind: str, data: Plain) -> None:
    """Add an event inside the transaction of the change.

    The counter's row stays locked until the commit. So ids become visible in their order, and a
    reader that asks for what is newer than its last id misses none. A database of an older schema
    has no events.
    """
    if not statements.exists(connection, event):
        return
    first = statements.upsert(connection, counter).values(study=study, last=1)
    counted = first.on_conflict_do_update(
        index_elements=[counter.c.study], set_={"last": counter.c.last + 1}
    ).returning(counter.c.last)
    number = connection.execute(counted).scalar_one()
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    row = {"study": study, "id": number, "at": now, "kind": kind, "data": data}
    connection.execute(insert(event), row)


def append_once(connection: Connection, study: str, kind: str, data: Plain) -> bool:
    """Add an event unless the newest one of its kind has the same data; say whether it was added.

    The data names the request, so that a transaction that is repeated adds nothing.
    """
    this = (event.c.study == study) & (event.c.kind == kind)
    wanted = select(event.c.data).where(this).order_by(event.c.id.desc()).limit(1)
    if connection.scalar(wanted) == data:
        return False
    append(connection, study, kind, data)
    return True


def append_evaluation(connection: Connection, evaluation: Evaluation, front: FrontSummary) -> None:
    """Add the event of a finished trial, with its values and the front after it."""
    stored = mapping.failure_json(evaluation.failure)
    failure = None if stored is None else {key: stored[key] for key in ("kind", "message")}
    data = {
        "trial": evaluation.trial,
        "attempt": evaluation.attempt,
        "status": evaluation.status,
        "values": statements.finite(evaluation.values),
        "failure": failure,
        "front": front.size,
        "hypervolume": front.hypervolume,
    }
    append(connection, evaluation.study, "trial_finished", data)


def after(connection: Connection, study: str, last: int, limit: int = MOST) -> list[StudyEvent]:
    """Return at most `limit` events of a study that are newer than `last`, oldest first."""
    this = (event.c.study == study) & (event.c.id > last)
    wanted = select(event).where(this).order_by(event.c.id).limit(limit)
    return [StudyEvent(r.study, r.id, r.at, r.kind, r.data) for r in connection.execute(wanted)]


def after_each(connection: Connection, last: dict[str, int]) -> list[StudyEvent]:
    """Return the events of some studies that are newer than their ids, oldest first."""
    newer = [(event.c.study == study) & (event.c.id > known) for study, known in last.items()]
    events: list[StudyEvent] = []
    for first in range(0, len(newer), STUDIES):
        some = or_(*newer[first : first + STUDIES])
        rows = connection.execute(select(event).where(some).order_by(event.c.study, event.c.id))
        events += [StudyEvent(row.study, row.id, row.at, row.kind, row.data) for row in rows]
    return events


def newest(connection: Connection) -> dict[str, int]:
    """Return study -> id of its newest event."""
    return {row.study: row.last for row in connection.execute(select(counter))}


def forget(connection: Connection, study: str) -> None:
    """Delete the events of a study; the counter stays, so that no id is given twice."""
    connection.execute(delete(event).where(event.c.study == study))


def forget_deleted(connection: Connection, study: str) -> None:
    """Delete the events of a deleted study, in the transaction that gives its name to a new one.

    The events of a study end with `deleted`. The counter stays, so that no id is given twice.
    """
    if not statements.exists(connection, event):
        return
    former = (event.c.study == study) & (event.c.kind == "deleted")
    last = connection.scalar(select(func.max(event.c.id)).where(former))
    if last is not None:
        connection.execute(delete(event).where(event.c.study == study, event.c.id <= last))


def move(connection: Connection, study: str, new: str) -> None:
    """Give the events of a study to another name, behind those that name has had before.

    The counter of the former name stays, so that no id is given twice.
    """
    last = counter.c.last
    before = connection.scalar(select(last).where(counter.c.study == new)) or 0
    moved = connection.scalar(select(last).where(counter.c.study == study)) or 0
    if not moved:
        return
    connection.execute(delete(event).where(event.c.study == new))
    connection.execute(
        update(event).where(event.c.study == study).values(study=new, id=event.c.id + before)
    )
    connection.execute(delete(counter).where(counter.c.study == new))
    connection.execute(insert(counter).values(study=new, last=before + moved))
