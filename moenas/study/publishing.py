"""The listener that keeps the figures of the Optuna dashboard up to date."""

from __future__ import annotations

import time
from collections.abc import Callable

from moenas.failures import one_line
from moenas.store.store import Store
from moenas.study.events import Event

INTERVAL_S = 60.0
"""Seconds between updates of the figures."""


class DashboardPublisher:
    """Draws the figures of a study again as its trials finish, at most once a minute."""

    def __init__(self, store: Store, name: str, warn: Callable[[str], None]) -> None:
        self._store, self._name, self._warn = store, name, warn
        self._published = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        if event.evaluation is not None and time.monotonic() - self._published > INTERVAL_S:
            self.publish()

    def publish(self) -> None:
        """Draw the figures now; an error there is a warning and does not stop the study."""
        try:
            from moenas.dashboard.server import publish

            publish(self._store, self._name)
        except Exception as error:
            self._warn(f"the dashboard's figures were not updated: {one_line(error)}")
        self._published = time.monotonic()
