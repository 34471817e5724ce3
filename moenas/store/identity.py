"""The identity of a database: its uuid, its file, and the folder of its weights."""

from __future__ import annotations

import os
import sqlite3
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from sqlalchemy import Connection, Text, func, literal_column, select, update
from sqlalchemy.exc import DBAPIError

from moenas.errors import InputError, StorageLostError
from moenas.store.files import Root, root_at
from moenas.store.object_path import ObjectPath, StorePath, is_url
from moenas.store.tables import database
from moenas.store.urls import sqlite_url

FOLDER = "moenas_runs"
"""Name of the folder of weights, where nobody names another."""

FileId: TypeAlias = tuple[int, int]
"""Device and inode of a file."""


class ReplacedError(StorageLostError):
    """Another database, or none, is where one was opened."""


@dataclass(frozen=True)
class Identity:
    """What a database says of itself."""

    uuid: str
    """Empty for a database of the first schema."""
    place: str | None = None
    weights: str | None = None
    former: tuple[str, ...] = ()


UNKNOWN = Identity("")


def read(connection: Connection) -> Identity:
    """Return the identity of a database."""
    row = connection.execute(select(database).where(database.c.id == 1)).first()
    if row is None:
        return UNKNOWN
    return Identity(row.uuid, row.place, row.weights, tuple(row.former or ()))


def file_id(path: Path) -> FileId:
    """Return what names the file itself rather than its place."""
    file_stat = os.stat(path)
    return file_stat.st_dev, file_stat.st_ino


def check_file(path: Path | None, opened: FileId | None, place: str) -> None:
    """Raise ReplacedError if another file, or none, lies where an SQLite file was opened."""
    if path is None or opened is None:
        return
    try:
        now = file_id(path)
    except OSError:
        raise ReplacedError(
            f"{place}: the file was moved or deleted while it was in use; what was stored since"
            f" is not at {path}"
        ) from None
    if now != opened:
        raise ReplacedError(
            f"{place}: the file was replaced by another one while it was in use; what was stored"
            f" since is not at {path}"
        )


def check_row(connection: Connection, known: Identity, place: str) -> None:
    """Raise ReplacedError if a database has another uuid than it had."""
    if not known.uuid:
        return
    now = connection.execute(select(database.c.uuid).where(database.c.id == 1)).scalar()
    if now != known.uuid:
        raise ReplacedError(f"{place}: is another database than the one that was opened")


# --- at the start of a run -----------------------------------------------------------------------


def ensure_identity(
    connection: Connection, path: Path | None, wanted: str | None, folder: Path
) -> Identity:
    """Write down where a database lies and where its weights go; return its identity.

    A copy of a database gets a uuid of its own, so that its weights do not replace the weights of
    the original. It still finds the weights that it was copied with.

    Raises:
        InputError: if $MOENAS_RUNS, `wanted`, would split the weights over two folders.
    """
    known, here = read(connection), place(connection, path)
    name, former = known.uuid or uuid.uuid4().hex, list(known.former)
    root = known.weights
    if known.place not in (None, here):
        before = root_at(root, folder) if root else Path(str(known.place)).parent / FOLDER
        if _is_copy(known, path):
            name = uuid.uuid4().hex
            former += [known.uuid, str(before / known.uuid)]
        elif path is not None and root is None and _was_left(known, Path(str(before)), path):
            root = str(before)
    if wanted:
        root = wanted.rstrip("/") if is_url(wanted) else str(folder / wanted)
        _check_whole(known, name, root_at(root, folder))
    elif path is None:
        root = root or str(folder / FOLDER)
    now = Identity(name, here, root, tuple(former))
    if now != known:
        changes = {"uuid": name, "place": here, "weights": root, "former": former}
        connection.execute(update(database).where(database.c.id == 1).values(changes))
    return now


def _was_left(known: Identity, before: Path, path: Path) -> bool:
    """Whether an SQLite file was moved without the folder of its weights."""
    beside = path.parent / FOLDER / known.uuid
    return (before / known.uuid).is_dir() and not beside.is_dir()


def place(connection: Connection, path: Path | None) -> str:
    """Name where a database lies: the file; or the server, the database and the schema."""
    if path is not None:
        return str(path.resolve())
    where = select(func.current_database(), func.current_schema())
    name = "/".join(map(str, connection.execute(where).one()))
    system = select(literal_column("system_identifier", Text)).select_from(func.pg_control_system())
    try:
        with connection.begin_nested():
            return f"{connection.execute(system).scalar()}/{name}"
    except DBAPIError:  # the server keeps its identity to itself
        return name


def _is_copy(known: Identity, path: Path | None) -> bool:
    """Whether a database that lay elsewhere is still there too.

    Of another place on a PostgreSQL server it is not known, and a new uuid harms nothing.
    """
    if path is None:
        return True
    other = Path(str(known.place))
    try:
        if os.path.samefile(other, path):
            return False
        url = sqlite_url(other, mode="ro")
        connection = sqlite3.connect(f"{url.database}?mode=ro", uri=True, timeout=1)
    except (OSError, sqlite3.Error):
        return False
    try:
        row = connection.execute("SELECT uuid FROM moenas_database").fetchone()
    except sqlite3.Error:
        return False
    finally:
        connection.close()
    return bool(row and row[0] == known.uuid)


def _check_whole(known: Identity, name: str, root: StorePath) -> None:
    """Refuse another root while weights lie in the one that is written down."""
    if not known.weights:
        return
    written = root_at(known.weights, Path.cwd())
    before = written / known.uuid
    try:
        if written == root or not before.is_dir() or (root / name).is_dir():
            return
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    raise InputError(
        f"MOENAS_RUNS={root}: the weights of this database lie in {written}; move the folder"
        f" {before.name} from there, or leave MOENAS_RUNS out"
    )


# --- where weights lie ---------------------------------------------------------------------------


def runs(known: Identity, path: Path | None, wanted: str | None, folder: Path) -> Root | ObjectPath:
    """Return the root of the weights of a database, and those where they may also lie.

    It is in $MOENAS_RUNS, a folder or a URL, or else in the root that the database names. Without
    both it is in moenas_runs beside the SQLite file, or in the folder that this process began in.
    """
    beside = (path.parent if path else folder) / FOLDER
    base: Root | ObjectPath = Root(beside)
    if wanted:
        base = root_at(wanted, folder)
    elif known.weights:
        written = root_at(known.weights, folder)
        if path is None or isinstance(written, ObjectPath) or written.is_dir():
            base = written
    if not known.uuid:
        return base
    bases: list[StorePath] = [base, beside]
    if path is not None and known.place:
        bases.append(Path(known.place).parent / FOLDER)
    # A former one may be a whole path; the first schema had no uuid.
    names = [known.uuid, *reversed(known.former), ""]
    places = dict.fromkeys(_former(each, name) for each in bases for name in names)
    root = _inside(base, known.uuid)
    root.older = tuple(place for place in places if place != root)
    return root


def _former(base: StorePath, name: str) -> StorePath:
    """Return a folder of a base; a name that is a URL or an absolute path is the whole of it."""
    if is_url(name):
        return ObjectPath(name)
    return Path(name) if os.path.isabs(name) else base / name


def _inside(base: Root | ObjectPath, name: str) -> Root | ObjectPath:
    """Return the root of one database below the root of several."""
    if isinstance(base, ObjectPath):
        return base / name
    root = Root(base / name)
    root.shared = base.shared
    return root
