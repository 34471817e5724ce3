"""A study on its way into a database: it appears whole or not at all.

Its files are gathered in a folder of their own. One transaction then inserts the rows and gives the
folder its name; while it lasts, no other process can make a study of that name. A process that is
killed before the commit leaves a folder that the next one removes. An object store has no lock for
that: there the draft is removed by a later copy, LONGEST_COPY_S after its start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from sqlalchemy import Connection, select

from moenas.errors import ConflictError, InputError, MachineError
from moenas.resources import sha256
from moenas.store import optuna_rows, reservations, statements, submissions, tables
from moenas.store.checkpoints import checkpoint_path, read_checkpoint
from moenas.store.files import make_folder, remove_tree, sync_folder
from moenas.store.object_path import ObjectPath, StorePath
from moenas.store.store import Store
from moenas.store.study_rows import StudyRows
from moenas.store.weights import find_weights, study_folder, weights_path

DRAFT = ".incoming-"
"""How the name of a folder begins whose study is not there yet."""
OBJECT_DRAFT = re.compile(re.escape(DRAFT) + r"([0-9a-f]{8,10})-[0-9a-f]{16}")
"""The name of a draft in an object store: when it began, in seconds since 1970."""
LONGEST_COPY_S = 7 * 24 * 3600.0
"""Seconds after which a draft in an object store counts as left by a process that was killed."""
PIECE = 1 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class StudyFile:
    """A file that the rows of a study name: weights, or the checkpoint of a paused trial."""

    trial: int
    rung: int | None
    """The rung of a checkpoint; None for weights."""
    sha256: str

    def path(self, runs: StorePath, study: str) -> StorePath:
        """Return where the file lies in a folder of weights."""
        if self.rung is None:
            return weights_path(runs, study, self.trial)
        return checkpoint_path(runs, study, self.trial, self.rung)

    def find(self, store: Store, study: str) -> StorePath:
        """Return where the file of a stored study lies, after a check of its digest.

        Raises:
            InputError: if it is not there, cannot be read, or is another file.
        """
        if self.rung is None:
            return find_weights(store.runs, study, self.trial, self.sha256)
        read_checkpoint(store.runs, study, self.trial, self.rung, self.sha256)
        return self.path(store.runs, study)


def named_files(rows: StudyRows) -> list[StudyFile]:
    """Return the files that the rows of a study name."""
    weights = [
        StudyFile(row["trial"], None, row["weights_sha256"])
        for row in rows[tables.evaluation.name]
        if row["weights_sha256"] is not None
    ]
    return weights + [
        StudyFile(row["trial"], row["rung"], row["checkpoint_sha256"])
        for row in rows[tables.rung.name]
        if row["checkpoint_sha256"] is not None
    ]


class IncomingStudy:
    """A new study of a database: its files are added, then `commit` lets it appear.

    Without a `commit`, nothing is left of it.
    """

    def __init__(self, store: Store, name: str) -> None:
        """Name the study.

        Raises:
            InputError: if the text cannot be the name of a study.
            ConflictError: if the database has a study of this name.
        """
        statements.check_study_name(name)
        self._store, self.name = store, name
        store.ensure_identity()
        store.optuna_storage().engine.dispose()  # makes Optuna's tables
        store.query(self._require_free)
        self._folder: StorePath | None = None
        self._lock = -1
        self._added: dict[str, StorePath] = {}
        """Digest -> the first file that has it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._folder is not None:
            remove_tree(self._folder)
        if self._lock >= 0:
            os.close(self._lock)

    def _require_free(self, connection: Connection) -> None:
        if self._is_stored(connection):
            raise ConflictError(
                f"study '{self.name}' already exists in {self._store.place}; give another name"
            )
        reservations.require_free(connection, self.name)
        if submissions.find(connection, self.name) is not None:
            raise ConflictError(
                f"study '{self.name}' waits in the queue of {self._store.place}; give another name"
            )
        if optuna_rows.has_study(connection, self.name):
            raise ConflictError(
                f"study '{self.name}': Optuna's tables in {self._store.place} hold a study of that"
                " name which moenas did not make; give another name"
            )

    def _is_stored(self, connection: Connection) -> bool:
        wanted = select(tables.study.c.name).where(tables.study.c.name == self.name)
        return connection.execute(wanted).first() is not None

    # --- files -----------------------------------------------------------------------------------

    def add(self, file: StudyFile, source: BinaryIO) -> None:
        """Copy a file; it is on the disk when this returns.

        Raises:
            InputError: if its SHA-256 differs from the SHA-256 in the rows. MachineError: if the
            disk refuses.
        """
        try:
            if file.sha256 in self._added:
                self._link(file, self._added[file.sha256])
                return
            path = self._place(file)
            digest = _write(path, source)
        except OSError as error:
            raise MachineError(f"study '{self.name}': a file cannot be written: {error}") from None
        if digest != file.sha256:
            raise InputError(
                f"trial {file.trial}: a file with the SHA-256 {digest[:12]}..., stored"
                f" was {file.sha256[:12]}...; restore the file"
            )
        self._added[file.sha256] = path

    def link(self, file: StudyFile, source: StorePath) -> None:
        """Give a file of this database, whose digest was checked, a second name.

        It is copied where the file system has no hard links.
        """
        try:
            self._link(file, source)
        except OSError as error:
            raise MachineError(f"study '{self.name}': a file cannot be written: {error}") from None

    def _link(self, file: StudyFile, source: StorePath) -> None:
        path = self._place(file)
        if isinstance(path, ObjectPath):
            if isinstance(source, ObjectPath):
                source.copy(path)
            else:
                path.write_bytes(source.read_bytes())
            return
        if isinstance(source, ObjectPath):
            with source.open() as opened:
                _write(path, opened)
            return
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)
            with path.open("rb") as written:
                os.fsync(written.fileno())

    def _place(self, file: StudyFile) -> StorePath:
        """Return the path of a file in the folder of the draft, which is made if necessary."""
        if self._folder is None:
            self._folder = self._make_draft()
        final = file.path(Path(), self.name)
        path = self._folder / final.parent.name / final.name
        if isinstance(path, Path):
            path.parent.mkdir(exist_ok=True)
        return path

    def _make_draft(self) -> StorePath:
        """Make a folder that is locked while this process lives; remove folders of dead
        processes."""
        root = self._store.runs
        if isinstance(root, ObjectPath):
            _sweep_objects(root)
            return root / f"{DRAFT}{int(time.time()):x}-{secrets.token_hex(8)}"
        runs = Path(root)
        make_folder(runs)
        while True:
            folder = Path(tempfile.mkdtemp(dir=runs, prefix=DRAFT))
            self._lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if folder.exists():  # another process may have taken it for one of a dead process
                break
            os.close(self._lock)
        for other in runs.glob(f"{DRAFT}*"):
            if other != folder:
                _remove_if_dead(other)
        return folder

    # --- the end ---------------------------------------------------------------------------------

    def commit(self, write: Callable[[Connection], None]) -> None:
        """Let the study appear: `write` inserts its rows, the row of moenas_study first.

        Raises:
            ConflictError: if another process has made a study of this name meanwhile.
        """
        if isinstance(self._folder, Path):
            for folder in (*self._folder.iterdir(), self._folder):
                sync_folder(folder)
        named = False

        def change(connection: Connection) -> None:
            nonlocal named
            if named and self._is_stored(connection):
                return  # the answer of the first commit was lost
            self._require_free(connection)
            write(connection)
            if self._folder is None or named:
                return
            final = study_folder(self._store.runs, self.name)
            # No study has this name: a folder there is a rest of a deleted or an unfinished one.
            remove_tree(final)
            try:
                _rename(self._folder, final)
            except OSError as error:
                raise MachineError(f"{final}: cannot be made: {error.strerror}") from None
            named = True

        self._store.transact(change)


def _write(path: StorePath, source: BinaryIO) -> str:
    """Write a new file, which is on the disk when this returns; return its SHA-256."""
    if isinstance(path, ObjectPath):
        data = source.read()
        path.write_bytes(data)
        return sha256(data)
    digest = hashlib.sha256()
    with path.open("xb") as target:
        while piece := source.read(PIECE):
            digest.update(piece)
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def _rename(folder: StorePath, final: StorePath) -> None:
    """Give a folder of files its name; objects are renamed one after another."""
    if isinstance(folder, ObjectPath):
        for path in list(folder.glob("*/*")):
            path.replace(ObjectPath(str(final / path.parent.name / path.name)))
        return
    os.rename(folder, str(final))
    sync_folder(final.parent)


def _sweep_objects(root: ObjectPath) -> None:
    """Remove the drafts of killed processes: those that began longer ago than any copy takes."""
    with contextlib.suppress(OSError):  # the next one removes what is left
        for draft in root.children():
            began = OBJECT_DRAFT.fullmatch(draft.name)
            if began is not None and int(began[1], 16) < time.time() - LONGEST_COPY_S:
                draft.remove_tree()


def _remove_if_dead(folder: Path) -> None:
    """Remove the folder of a draft if the process that made it is gone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
