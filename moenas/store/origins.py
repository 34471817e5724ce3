"""Where the architectures of enqueued trials are from."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from moenas.store import statements, tables
from moenas.store.reader import StoreReader
from moenas.store.store import Store


def add_source(store: Store, study: str, trial: int, source: str) -> None:
    """Store where the architecture of a trial is from; a source that is stored stays."""
    row = {"study": study, "trial": trial, "source": source}

    def change(connection: Connection) -> None:
        if _source(connection, study, trial) is None:
            connection.execute(insert(tables.enqueued), row)

    store.apply(study, change)


def source(store: StoreReader, study: str, trial: int) -> str | None:
    """Return where the architecture of a trial is from; None if a sampler drew it."""

    def wanted(connection: Connection) -> str | None:
        if not statements.exists(connection, tables.enqueued):
            return None  # a reader does not change a database of an older schema
        return _source(connection, study, trial)

    return store.read(study, wanted)


def _source(connection: Connection, study: str, trial: int) -> str | None:
    this = statements.of_trial(tables.enqueued, study, trial)
    return connection.scalar(select(tables.enqueued.c.source).where(this))
