"""The claim of this process on a study, kept fresh by a thread while the study runs."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Self

from moenas.errors import MoenasError, StudyBusyError
from moenas.store import submissions
from moenas.store.identity import ReplacedError
from moenas.store.leases import STALE_S
from moenas.store.store import Store

BEAT = 5.0
"""Seconds between the signs of life of this process."""


class StudyLease:
    """Holds the claim of this process on a study, with a sign of life every few seconds."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="moenas-lease", daemon=True)
        self._error: Exception | None = None
        self.wanted_end: submissions.State | None = None
        """`paused` or `cancelled` if a user of a server has asked for the end of the run."""

    def __enter__(self) -> Self:
        """Claim the study, or raise StudyBusyError."""
        self._store.claim(self._name)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        with suppress(MoenasError):
            self._store.release(self._name)

    def _beat(self) -> None:
        """Beat on through errors that pass, for as long as a run waits for its database.

        Another process may take over after STALE_S, if it reaches the database and this one does
        not. The next heartbeat says so then, and no result of this process counts any more.
        """
        good, limit = time.monotonic(), max(self._store.patience, STALE_S - BEAT)
        while not self._end.wait(BEAT):
            began = time.monotonic()
            try:
                self.wanted_end = self._store.renew(self._name)
                good = began
            except Exception as error:
                gone = isinstance(error, StudyBusyError | ReplacedError)
                if gone or time.monotonic() >= good + limit:
                    self._error = error
                    return

    def check(self) -> None:
        """Raise what went wrong with the lease since it was taken."""
        if self._error is not None:
            raise self._error
