"""Errors of a database: whether they pass, and the way out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import sqlalchemy
from sqlalchemy.exc import DBAPIError

from moenas.errors import StorageError

log = logging.getLogger(__name__)

BUSY_S = 0.25
"""How long a statement waits inside SQLite for another process to let go of the file.

Python hears no signal meanwhile; what is longer is waited for by `retry.Retry`.
"""

TROUBLES = {
    "no such table": "; a table of moenas is missing: restore a copy, or give another database",
    "relation": "; a table of moenas is missing: restore a copy, or give another database",
    "file is not a database": "; it is another kind of file, or damaged: give another one",
    "malformed": "; the file is damaged: restore a copy of it, or give another one",
    "readonly": "; make the file and its directory writable, or give another one",
    "read-only": "; connect as a user who may write, or give another one",
    "is locked": "; another program holds it: end that one, then run the same command again",
    "is full": "; free some space, then run the same command again",
    "no space left": "; free some space, then run the same command again",
    "does not exist": "; create it on the server, or correct the URL",
    "permission denied": "; the user of the URL needs the right to create and write tables",
    "authentication failed": "; correct the user or the password of the URL",
    "connect": "; check that the server runs and that host and port are right",
}
"""What the database says -> what to do about it."""

PASSING_TEXTS = ("is locked", "is full", "disk i/o error", "unable to open database file")
"""What SQLite says of a trouble that may pass."""
PASSING_STATES = ("08", "53", "57P", "40001", "40P01", "55P03")
"""Beginnings of PostgreSQL's codes of troubles that may pass: connection, resources, restart,
conflicts of transactions and locks."""
LASTING_TEXTS = ("authentication", "does not exist", "no pg_hba.conf", "not permitted")
"""What a PostgreSQL server says when it refuses a connection permanently."""


def passes(error: BaseException | None) -> bool:
    """Whether the same statement may succeed a little later."""
    if isinstance(error, sqlalchemy.exc.TimeoutError | sqlalchemy.exc.PendingRollbackError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    said = str(error.orig).lower()
    state = getattr(error.orig, "sqlstate", None)
    if state:
        return str(state).startswith(PASSING_STATES)
    if type(error.orig).__module__.startswith("psycopg"):
        broken = isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
        return broken and not any(text in said for text in LASTING_TEXTS)
    return any(text in said for text in PASSING_TEXTS)


def is_lock(error: BaseException | None) -> bool:
    """Whether another process holds what a statement needs, or makes the same tables."""
    said = str(getattr(error, "orig", error)).lower()
    return isinstance(error, DBAPIError) and any(
        text in said for text in ("is locked", "already exists", "starting up")
    )


def needs_writing(error: BaseException | None) -> bool:
    """Whether SQLite failed because it may write neither the file nor beside it."""
    said = str(getattr(error, "orig", "")).lower()
    return any(text in said for text in ("unable to open", "readonly", "disk i/o", "permission"))


def first_line(error: BaseException | None) -> str:
    """Return the first line of what the driver of a database said."""
    said = getattr(error, "orig", None) or error
    lines = str(said).strip().splitlines()
    return lines[0] if lines else type(said).__name__


def advice(said: str, path: Path | None = None) -> str:
    """Add to what a database said what to do about it."""
    if path is not None and "unable to open" in said:
        if not path.parent.is_dir():
            return f"there is no directory {path.parent}; make it, or give another file"
        return (
            f"cannot be opened ({said}); give a file in a directory that you may write by"
            " --storage sqlite:///PATH or MOENAS_STORAGE"
        )
    return said + next((a for needle, a in TROUBLES.items() if needle in said.lower()), "")


def check_creatable(path: Path, place: str) -> None:
    """Raise StorageError if an SQLite file cannot be made at `path`."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{place}: {advice('unable to open database file', path)}")


def remove_empty(path: Path | None) -> None:
    """Remove an SQLite file that was just made and holds nothing."""
    if path is not None and path.is_file() and not path.stat().st_size:
        path.unlink()


def warn_of_log(path: Path | None, place: str) -> None:
    """Say so if a file is read without the changes that lie in its write-ahead log."""
    log_file = Path(f"{path}-wal")
    if log_file.is_file() and log_file.stat().st_size:
        log.warning(
            "%s: the latest changes lie in %s, which cannot be read where nobody may write, and"
            " are not shown; copy both files to a folder that you may write",
            *(place, log_file),
        )
