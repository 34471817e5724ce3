"""Paths below a URL: the part of pathlib's interface for weights, on file systems of fsspec."""

from __future__ import annotations

import errno
import io
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from moenas.errors import InputError
from moenas.failures import error_line

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of moenas that installs its file system."""


def is_url(text: str) -> bool:
    """Say whether a text names a URL rather than a folder."""
    return "://" in text


class ObjectPath:
    """A path of an object store, or the prefix of several; two of one URL are equal.

    Prefixes exist while an object has them, so no folder is made or removed. Methods of pathlib's
    names do what pathlib does. Every failure is an OSError with the URL as its `filename`.
    """

    older: tuple[StorePath, ...] = ()
    """Of a root: where else weights of its database may lie."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    # --- names -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"ObjectPath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: ObjectPath) -> bool:
        return self.url < other.url

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}" if name else self.url)

    @property
    def name(self) -> str:
        """The part behind the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def protocol(self) -> str:
        """The part before `://`; a copy inside a store is one between paths of one protocol."""
        return self.url.partition("://")[0]

    @property
    def parent(self) -> ObjectPath:
        """The URL without its last part."""
        return ObjectPath(self.url.rpartition("/")[0])

    @property
    def parents(self) -> tuple[ObjectPath, ...]:
        """The next two prefixes above."""
        return self.parent, self.parent.parent

    def with_name(self, name: str) -> ObjectPath:
        """Return the path with another last part."""
        return self.parent / name

    # --- what is there ---------------------------------------------------------------------------

    @cached_property
    def _system(self) -> tuple[Any, str]:
        """The file system of fsspec, and the path in it."""
        from fsspec.core import url_to_fs

        # A listing that is kept would hide what another process writes.
        opened: tuple[Any, str] = url_to_fs(self.url, use_listings_cache=False)
        return opened

    @contextmanager
    def _open_system(self) -> Iterator[tuple[Any, str]]:
        """Yield file system and path; whatever is raised becomes an OSError."""
        try:
            yield self._system
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "No such object", self.url) from None
        except OSError as error:
            text = error.strerror or error_line(error)
            raise OSError(error.errno or errno.EIO, text, self.url) from error
        except Exception as error:
            raise OSError(errno.EIO, error_line(error), self.url) from error

    def is_file(self) -> bool:
        """Say whether an object has this name."""
        with self._open_system() as (system, path):
            return bool(system.isfile(path))

    def is_dir(self) -> bool:
        """Say whether any object has this prefix."""
        return next(self._below(), None) is not None

    def size(self) -> int:
        """Return the bytes of the object."""
        with self._open_system() as (system, path):
            return int(system.info(path)["size"])

    def _below(self) -> Iterator[str]:
        """Yield the names of the objects below, without this prefix."""
        with self._open_system() as (system, path):
            try:
                paths = system.find(path)
            except FileNotFoundError:
                paths = []
            prefix = f"{path.rstrip('/')}/"
            names = [str(each) for each in paths if str(each).startswith(prefix)]
        yield from (name.removeprefix(prefix) for name in names)

    def children(self) -> list[ObjectPath]:
        """Return the objects and the prefixes directly below; what lies deeper is not listed."""
        with self._open_system() as (system, path):
            try:
                paths = system.ls(path, detail=False)
            except FileNotFoundError:
                paths = []
        names = {str(each).rstrip("/").rpartition("/")[2] for each in paths}
        return [self / name for name in sorted(names - {self.name, ""})]

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield the objects below whose parts match the parts of a pattern; `*` matches a dot
        too."""
        parts = pattern.split("/")
        for name in self._below():
            own = name.split("/")
            if len(own) == len(parts) and all(map(fnmatchcase, own, parts)):
                yield self / name

    def read_bytes(self) -> bytes:
        """Return the whole object."""
        with self._open_system() as (system, path):
            return bytes(system.cat_file(path))

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Open the object, which is read whole, for reading."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    # --- changes ---------------------------------------------------------------------------------

    def write_bytes(self, data: bytes) -> None:
        """Write the object; a reader finds the old one or the new one."""
        with self._open_system() as (system, path):
            system.pipe_file(path, data)

    def upload(self, file: str) -> None:
        """Write the object from a local file; a reader finds the old one or the new one."""
        with self._open_system() as (system, path):
            system.put_file(file, path)

    def download(self, file: str) -> None:
        """Write the object to a local file."""
        with self._open_system() as (system, path):
            system.get_file(path, file)

    def copy(self, target: ObjectPath) -> None:
        """Copy the object inside its store; no byte of it comes here."""
        with self._open_system() as (system, path):
            system.cp_file(path, target._system[1])

    def replace(self, target: ObjectPath) -> None:
        """Give the object another name."""
        self.copy(target)
        self.unlink()

    def unlink(self) -> None:
        """Remove the object, if it is there: most stores do not say whether it was."""
        with suppress(FileNotFoundError), self._open_system() as (system, path):
            system.rm_file(path)

    def remove_tree(self) -> None:
        """Remove all objects with this prefix."""
        for name in self._below():
            (self / name).unlink()


StorePath: TypeAlias = Path | ObjectPath
"""A path of a folder, or of an object store."""


def check_url(url: str, setting: str) -> None:
    """Check that objects can be written below a URL; one is written and removed.

    Raises:
        InputError: saying what is wrong with the URL, the installation or the store.
    """
    if "::" in url:
        raise InputError(f"{setting}: a chain of URLs; give one URL, PROTOCOL://PLACE")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{setting}={url}: {error}; write PROTOCOL://PLACE") from None
    if parts.password is not None:
        raise InputError(
            f"{setting}: the URL holds a password, and the database stores the URL; give"
            f" credentials by the variables or files of the {parts.scheme} client"
        )
    probe = ObjectPath(url) / f".moenas-{secrets.token_hex(8)}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, ImportError) and parts.scheme in EXTRAS:
            extra = EXTRAS[parts.scheme]
            raise InputError(
                f"{setting}={url}: its file system is not installed; `pip install"
                f" 'moenas[{extra}]'` here and on every node"
            ) from None
        if isinstance(cause, ImportError | ValueError):
            raise InputError(
                f"{setting}={url}: not a file system of fsspec: {cause}; give a folder, file://,"
                " s3:// or gs://"
            ) from None
        raise InputError(f"{setting}={url}: cannot be written: {error.strerror}") from None
