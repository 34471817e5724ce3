"""Files of the store, in a folder or an object store: written whole, linked and removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path, PosixPath
from urllib.parse import unquote, urlsplit

from moenas.errors import InputError, StorageLostError
from moenas.store.object_path import ObjectPath, StorePath, check_url, is_url


class Root(PosixPath):
    """The folder of a database's weights, and those in which it may have put them before."""

    older: tuple[StorePath, ...] = ()
    shared: bool = False
    """Whether a file:// URL named it: every node sees the folder at this path."""


def root_at(name: str, folder: Path) -> Root | ObjectPath:
    """Return the root that a setting names: a folder, relative to `folder`, or a URL."""
    if not is_url(name):
        return Root(folder / name)
    if not name.startswith("file://"):
        return ObjectPath(name)
    root = Root(unquote(urlsplit(name).path))
    root.shared = True
    return root


def check_wanted_root() -> None:
    """Check the root that MOENAS_RUNS names, if it is a URL; one object is written and removed.

    Raises:
        InputError: saying what is wrong with it.
    """
    wanted = os.environ.get("MOENAS_RUNS", "")
    if wanted.startswith("file://"):
        parts = urlsplit(wanted)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InputError(f"MOENAS_RUNS={wanted}: not an absolute path; write file:///FOLDER")
    elif is_url(wanted):
        check_url(wanted, "MOENAS_RUNS")


def path_at(name: str) -> StorePath:
    """Return the path that a job or a worker names: an absolute one, or a URL."""
    return ObjectPath(name) if is_url(name) else Path(name)


def matching(folder: StorePath, pattern: str) -> list[StorePath]:
    """Return what a pattern matches below a folder, sorted.

    Raises:
        StorageLostError: if an object store cannot be reached.
    """
    try:
        paths: list[StorePath] = list(folder.glob(pattern))
    except OSError as error:
        raise StorageLostError(f"{folder}: cannot be read: {error.strerror}") from error
    return sorted(paths, key=str)


def write_whole(path: StorePath, data: bytes) -> None:
    """Write a file by a draft beside it, whose name is a dot, the name of the file, and a suffix.

    An object store shows an object only once it is whole, and needs no draft.
    """
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    make_folder(path.parent)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
    sync_folder(path.parent)


def make_folder(folder: StorePath) -> None:
    """Make a folder and those above it, and bring their names to the disk."""
    if isinstance(folder, ObjectPath):
        return
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_folder(folder: StorePath) -> None:
    """Bring the names in a folder to the disk."""
    if isinstance(folder, ObjectPath):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_file(path: StorePath) -> None:
    """Remove a file, and its folder if nothing else is there; a failure is ignored."""
    with contextlib.suppress(OSError):
        path.unlink()
    if isinstance(path, Path):
        with contextlib.suppress(OSError):
            os.rmdir(path.parent)


def remove_tree(folder: StorePath) -> None:
    """Remove a folder with all that it holds; a failure is ignored."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        folder.remove_tree()
