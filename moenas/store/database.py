"""Open a database by its URL, tune it and migrate its schema; an error is one plain line."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from moenas.errors import MoenasError, StorageError, StorageLostError
from moenas.passwords import hide
from moenas.store import faults, identity
from moenas.store.faults import BUSY_S
from moenas.store.migrations import REVISIONS, VERSION_TABLE
from moenas.store.retry import Retry, patience
from moenas.store.urls import file_of, is_uri, shown, sqlite_url, storage_url

CONNECT_S = 5
"""Most seconds for connecting to a PostgreSQL server."""
READ_S = 10.0
"""Most seconds that a read-only command waits for a locked or restarting database."""
LOCK_KEY = 0x6D6F656E6173
"""Key of our advisory lock on a PostgreSQL database: "moenas" in ASCII."""

VERSION = sqlalchemy.table(VERSION_TABLE, sqlalchemy.column("version_num"))


def engine_arguments(url: URL) -> dict[str, Any]:
    """Return the arguments of every engine on this URL, Optuna's included."""
    if url.drivername == "sqlite":
        return {"connect_args": {"timeout": BUSY_S}}
    seconds = url.query.get("connect_timeout", CONNECT_S)
    return {"connect_args": {"connect_timeout": seconds}, "pool_pre_ping": True}


def tune_sqlite(engine: Engine, synchronous: str) -> None:
    """Make each transaction of an SQLite engine take its lock at its beginning.

    Python's driver begins a transaction at the first change. Two processes could read the same
    state and both act on it, because SQLite has no SELECT FOR UPDATE. A transaction of an engine
    with the option `reads` takes no lock and sees one snapshot of the database.

    With `synchronous` NORMAL, a power failure can lose the last commits, but the death of a process
    cannot. With FULL no commit is lost.
    """

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA synchronous = {synchronous}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


class Database:
    """An open database that has our tables in a version that this moenas knows."""

    def __init__(self, url: URL, mode: str) -> None:
        self.url = url
        self.place = shown(url)
        """The URL without its secrets."""
        self.path = file_of(url)
        """The absolute path of an SQLite file, which os.chdir does not change; else None."""
        self.version: str | None = None
        """The version of our schema."""
        self.identity = identity.UNKNOWN
        """Identity of the database at its opening or its latest check."""
        self.runs_wanted, self.folder = os.environ.get("MOENAS_RUNS"), Path.cwd()
        self.file_id: identity.FileId | None = None
        self._trouble: type[MoenasError] = StorageError
        self._connect(mode)
        self.again = Retry(READ_S, self._passes, self._waiting_for)
        """Runs one transaction, and repeats it after a transient failure."""

    def _connect(self, mode: str) -> None:
        """Make the engine; `mode` is a mode of SQLite, or `immutable`."""
        self.mode = mode
        self.engine_url = self.url
        if self.path is not None and not is_uri(self.url):
            only = {"mode": "ro", "immutable": "1"} if mode == "immutable" else {"mode": mode}
            self.engine_url = sqlite_url(self.path, **only)
        dumps = partial(json.dumps, ensure_ascii=False, allow_nan=False)
        try:
            self.engine = sqlalchemy.create_engine(
                self.engine_url, json_serializer=dumps, **engine_arguments(self.url)
            )
        except ImportError:
            raise StorageError(
                f"{self.place}: needs psycopg; `pip install 'moenas[postgres]'`"
            ) from None
        except SQLAlchemyError as error:
            raise StorageError(f"{self.place}: {hide(str(error))}") from None
        if self.path is None:
            event.listen(self.engine, "connect", self._check_encoding, insert=True)
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ")
        else:
            tune_sqlite(self.engine, "FULL")
            self._reader = self.engine.execution_options(reads=True)

    @classmethod
    def open(cls, url: str | None, *, create: bool) -> Database:
        """Open a database; with `create`, make missing files and tables.

        Without `create` nothing is written, and files in read-only folders can be read.

        Raises:
            StorageError: naming the URL and the way out. The database cannot be opened, or with
                `create` not be written, or it has none of our tables, or tables of a newer moenas.
                Nothing was written then.
        """
        given = storage_url(url)
        path = file_of(given)
        if path is None or is_uri(given):
            return cls(given, "rw")._opened(create)
        if create:
            return cls(given, "rw" if path.exists() else "rwc")._opened(create)
        if not path.exists():
            raise StorageError(
                f"{shown(given)}: no such file ({path}); `moenas run SPACE` makes it, or give"
                " another one by --storage or MOENAS_STORAGE"
            )
        refused: StorageError | None = None
        for mode in _reading_modes(path):
            database = cls(given, mode)
            try:
                return database._opened(create=False)
            except StorageError as error:
                database.engine.dispose()
                if not faults.needs_writing(error.__cause__):
                    raise
                refused = refused or error
        assert refused is not None
        raise refused

    @classmethod
    def peek(cls, url: str | None) -> Database | None:
        """Open a database that a run is to write, without writing: None if there is none of ours.

        Raises:
            StorageError: as `open` does.
        """
        given = storage_url(url)
        path = file_of(given)
        if path is not None and not path.exists():
            faults.check_creatable(path, shown(given))
            return None
        database = cls(given, "rw")
        if database.again(database._read_version) is None:
            database.engine.dispose()
            return None
        return database._opened(create=False)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection whose reads see one snapshot of the database."""
        with self.plainly(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield a connection in one transaction, which an exception rolls back."""
        with self.plainly(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Exclude other processes of moenas while tables are created on a PostgreSQL server.

        On SQLite each writing transaction excludes all others, and the second one is repeated.
        """
        if self.path is not None:
            yield
            return
        options = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        with self.plainly(), options.connect() as connection:
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(LOCK_KEY)))
            try:
                yield
            finally:
                unlock = sqlalchemy.func.pg_advisory_unlock(LOCK_KEY)
                connection.execute(sqlalchemy.select(unlock))

    # --- identity ------------------------------------------------------------------------------

    def check_identity(self, connection: Connection | None = None) -> None:
        """Raise ReplacedError if another database has taken the place of this one."""
        identity.check_file(self.path, self.file_id, self.place)
        if connection is not None:
            identity.check_row(connection, self.identity, self.place)

    def verify(self) -> None:
        """Raise StorageLostError if the database is another one, or damaged."""
        self.engine.dispose()  # a cache can hold an intact copy of a damaged page
        with self.reading() as connection:
            self.check_identity(connection)
            if self.path is None:
                return
            said = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if said != "ok":
            raise StorageLostError(f"{self.place}: {faults.advice(f'malformed: {said}')}")

    def ensure_identity(self, connection: Connection) -> None:
        """Check or set the identity of this database (see `identity.ensure_identity`)."""
        self.check_identity()
        self.identity = identity.ensure_identity(
            connection, self.path, self.runs_wanted, self.folder
        )

    # --- opening -------------------------------------------------------------------------------

    def _opened(self, create: bool) -> Database:
        """Prepare the database for use. Later failures raise StorageLostError."""
        limit = patience() if create else READ_S
        self.again = Retry(min(limit, READ_S), self._passes, self._waiting_for)
        made = self.mode == "rwc"
        try:
            self.version = self.again(self._read_version)
            self._check_version(create)
            if create:
                self.again(self._make)
                self.version = REVISIONS[-1]
        except BaseException:
            if made:
                self.engine.dispose()
                faults.remove_empty(self.path)
            raise
        if made:
            self.engine.dispose()
            self._connect("rw")  # a file that is removed later is not created again
        if self.path is not None:
            self.file_id = identity.file_id(self.path)
        if self.version != REVISIONS[0]:
            with self.reading() as connection:
                self.identity = identity.read(connection)
        self._trouble = StorageLostError
        self.again = Retry(limit, self._passes, self._waiting_for)
        return self

    def _read_version(self) -> str | None:
        if self.mode == "immutable":
            faults.warn_of_log(self.path, self.place)
        with self.reading() as connection:
            return _version(connection)

    def _check_version(self, create: bool) -> None:
        if self.version not in (None, *REVISIONS):
            raise StorageError(
                f"{self.place}: holds studies of a newer moenas (schema {self.version}, this one"
                f" knows {REVISIONS[-1]}); `pip install -U moenas`"
            )
        if self.version is None and not create:
            raise StorageError(
                f"{self.place}: holds no study of moenas; `moenas run SPACE` makes one, or give"
                " another database by --storage or MOENAS_STORAGE"
            )

    def _make(self) -> None:
        """Migrate our tables to the newest version, in one transaction.

        It always writes, so a read-only database fails at the start and not during a study.
        """
        with self.setting_up():
            with self.writing() as connection:
                version = _version(connection)
                if version != REVISIONS[-1]:
                    _upgrade(connection)
                connection.execute(sqlalchemy.update(VERSION).values(version_num=REVISIONS[-1]))
            if self.path is not None:
                with self.plainly(), self.engine.connect() as connection:
                    raw: Any = connection.connection.dbapi_connection
                    # The file stores the mode. If another process is at work, that one sets it.
                    with suppress(sqlite3.OperationalError):
                        raw.execute("PRAGMA journal_mode = WAL")

    # --- errors of the database ----------------------------------------------------------------

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Convert errors of the database to one line; programming errors are raised unchanged."""
        try:
            yield
        except (IntegrityError, DataError):
            raise
        except SQLAlchemyError as error:
            if not isinstance(error, DBAPIError | sqlalchemy.exc.TimeoutError):
                raise
            raise self.lost(error) from error

    def lost(self, error: BaseException | None) -> MoenasError:
        """Return the exception for an error of the database: one line with advice."""
        said = hide(faults.first_line(error))
        return self._trouble(f"{self.place}: {faults.advice(said, self.path)}")

    def _waiting_for(self, error: Exception) -> str:
        return f"{self.place}: {hide(faults.first_line(error.__cause__))}"

    def _passes(self, error: Exception) -> bool:
        """Whether an error is transient. Raises ReplacedError if the database was replaced."""
        cause = error.__cause__
        if self._trouble is StorageError:
            return faults.is_lock(cause)
        if faults.passes(cause):
            self.check_identity()
            return True
        return False

    def _check_encoding(self, connection: Any, _: Any) -> None:
        """Refuse a PostgreSQL database whose encoding cannot store all text."""
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise StorageError(
                f"{self.place}: its encoding is {encoding}; moenas needs UTF8: make it by"
                " `createdb -E UTF8 -T template0 NAME`"
            )


def _reading_modes(path: Path) -> list[str]:
    """Return the modes for reading an SQLite file, best first."""
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    return ["rw", "ro", "immutable"] if writable else ["ro", "immutable"]


def _version(connection: Connection) -> str | None:
    """Return the version of our schema in a database, or None if it has none."""
    if not sqlalchemy.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(sqlalchemy.select(VERSION.c.version_num)).scalar()


def _upgrade(connection: Connection) -> None:
    """Run the missing migrations in the transaction of `connection`."""
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "moenas.store:migrations")
    command.upgrade(config, REVISIONS[-1])
