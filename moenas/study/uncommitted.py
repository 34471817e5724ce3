"""Results that are not in the database yet: each lies in a file until it is committed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moenas.errors import StorageError, StorageLostError
from moenas.records import Evaluation
from moenas.store.files import matching, write_whole
from moenas.store.mapping import storable
from moenas.store.object_path import StorePath
from moenas.store.weights import study_folder

if TYPE_CHECKING:
    from moenas.store.store import Store

log = logging.getLogger(__name__)

FOLDER = "uncommitted"
"""Folder beside the folders of a study's trials."""


class UncommittedResults:
    """Files of one study's results that are not known to be committed."""

    def __init__(self, runs: StorePath, study: str) -> None:
        self._study = study
        self._folder = study_folder(runs, study) / FOLDER

    @contextlib.contextmanager
    def holding(self, evaluation: Evaluation) -> Iterator[None]:
        """Keep a result in a file until the block has ended without an exception.

        The commit is tried even if a file cannot be written, as on a full disk. The same holds for
        a result that is not JSON, which the commit will refuse. The folder stays for the next
        result, because a new folder costs one more wait for the disk.
        """
        path = self._folder / f"{evaluation.trial}-{evaluation.attempt}.json"
        with contextlib.suppress(OSError, TypeError, ValueError):
            write_whole(path, json.dumps(storable(evaluation.plain())).encode())
        yield
        self.drop(path)

    def close(self) -> None:
        """Remove the folder if nothing is in it."""
        if isinstance(self._folder, Path):
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def drop(self, path: StorePath) -> None:
        """Remove the file of a result; a failure is ignored."""
        with contextlib.suppress(OSError):
            path.unlink()

    def commit(self, store: Store) -> None:
        """Record the results of earlier runs, and remove their files; the study must be claimed.

        Whatever changes finished trials does this first, so that no older result comes after it.
        The trial of a result that cannot be recorded is evaluated again.

        Raises:
            StorageLostError: if the database cannot be reached; the files stay.
        """
        for path, evaluation in self.results():
            if evaluation is not None and store.attempts(self._study, evaluation.trial) > 0:
                try:
                    store.record(evaluation)
                except (StorageLostError, StorageError):
                    raise
                except Exception as error:
                    log.warning("%s: not recorded: %s: %s", path, type(error).__name__, error)
            self.drop(path)
        for draft in matching(self._folder, ".*"):
            self.drop(draft)
        self.close()

    def results(self) -> Iterator[tuple[StorePath, Evaluation | None]]:
        """Yield each file and its result; None for a file that holds no result of the study."""
        for path in matching(self._folder, "*.json"):
            try:
                evaluation = Evaluation.parse(json.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                yield path, None
                continue
            yield path, evaluation if evaluation.study == self._study else None
