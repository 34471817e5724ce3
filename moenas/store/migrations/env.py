"""Alembic's environment: it changes the schema over a given connection."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy.engine import Connection

from moenas.store.migrations import VERSION_TABLE
from moenas.store.tables import metadata


def ours(thing: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
    """Say whether a table is ours; whatever belongs to a table goes with it."""
    return kind != "table" or str(name).startswith("moenas_")


def migrate(connection: Connection) -> None:
    """Bring the schema to the version asked for, inside the transaction of `connection`."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        include_object=ours,
        transactional_ddl=True,
        render_as_batch=True,
    )
    context.run_migrations()


migrate(context.config.attributes["connection"])
