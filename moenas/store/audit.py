"""The audit: who changed what of which study, a row for each change."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, insert, select

from moenas.records import Plain
from moenas.store.tables import audit


@dataclass(frozen=True)
class AuditEntry:
    """One change that a user made."""

    id: int
    at: str
    user_name: str
    action: str
    study: str | None
    detail: Plain


def write(
    connection: Connection, user_name: str, action: str, study: str | None, detail: Plain
) -> None:
    """Add a row inside the transaction of the change."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    row = {"at": now, "user_name": user_name, "action": action, "study": study, "detail": detail}
    connection.execute(insert(audit), row)


def entries(connection: Connection, *, before: int | None, limit: int) -> list[AuditEntry]:
    """Return at most `limit` rows with ids below `before`, newest first."""
    wanted = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        wanted = wanted.where(audit.c.id < before)
    return [AuditEntry(*row) for row in connection.execute(wanted)]
