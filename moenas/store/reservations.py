"""Names that are taken by no study: the former name of a study, until its former files are gone."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, delete, insert, select, update

from moenas.errors import ConflictError
from moenas.store import statements
from moenas.store.tables import reservation


def reserve(connection: Connection, name: str, renamed_to: str) -> None:
    """Keep a name from new studies, inside the transaction that renames its study.

    Names that are reserved for the study already follow it to its new name.
    """
    of_study = reservation.c.renamed_to == name
    connection.execute(update(reservation).where(of_study).values(renamed_to=renamed_to))
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    row = {"name": name, "renamed_to": renamed_to, "reserved_at": now}
    connection.execute(insert(reservation), row)


def of_study(connection: Connection, name: str) -> list[str]:
    """Return the names that are reserved for a study."""
    wanted = select(reservation.c.name).where(reservation.c.renamed_to == name)
    return list(connection.scalars(wanted.order_by(reservation.c.name)))


def require_free(connection: Connection, name: str) -> None:
    """Refuse a name for a new study while it is reserved.

    A transaction that inserts the row of a study asks after that. The row waits for a transaction
    that renames a study of this name, whose reservation is seen then.

    Raises:
        ConflictError: naming the command that frees the name.
    """
    present = statements.renamed_to(connection, name)
    if present is not None:
        reason = statements.reserved_text(name, present)
        raise ConflictError(f"study '{name}': the name is not free; {reason}")


def free(connection: Connection, name: str) -> bool:
    """End the reservation of a name; say whether there was one."""
    gone = connection.execute(delete(reservation).where(reservation.c.name == name))
    return bool(gone.rowcount)
