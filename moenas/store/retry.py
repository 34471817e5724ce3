"""Retries after passing errors, with growing pauses, for a limited time."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from moenas.errors import InputError

RETRY_S = 300.0
"""Seconds that a run waits for its database; $MOENAS_RETRY_S takes its place."""
RELEASE_S = 2.0
"""Seconds that the end of a run waits for it."""
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
QUIET_S = 1.0
"""Seconds of waiting before anything is said: a short lock is no news."""

T = TypeVar("T")
log = logging.getLogger(__name__)


def patience() -> float:
    """Return how many seconds a run waits for its database.

    Raises:
        InputError: if $MOENAS_RETRY_S is not a number of seconds.
    """
    given = os.environ.get("MOENAS_RETRY_S")
    if not given:
        return RETRY_S
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e6:
        raise InputError(f"MOENAS_RETRY_S={given}: give a number of seconds, from 0 to 1e6")
    return seconds


class Retry:
    """Repeats calls for up to `seconds`; says once in the log what a call waits for.

    Only an `Exception` is waited for, so that Ctrl-C ends a wait at once. A call inside another
    one is not repeated by itself.
    """

    def __init__(
        self,
        seconds: float,
        passes: Callable[[Exception], bool],
        describe: Callable[[Exception], str] = str,
    ) -> None:
        self.seconds = seconds
        self._passes, self._describe = passes, describe
        self._local = threading.local()

    def __call__(self, work: Callable[[], T], seconds: float | None = None) -> T:
        """Return what `work` returns; `work` must be safe to repeat.

        `seconds` takes the place of the usual limit.
        """
        if getattr(self._local, "inside", False):
            return work()
        self._local.inside = True
        try:
            return self._repeat(work, self.seconds if seconds is None else seconds)
        finally:
            self._local.inside = False

    def _repeat(self, work: Callable[[], T], limit: float) -> T:
        began, pause, said = time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                return work()
            except Exception as error:
                waited = time.monotonic() - began
                if waited + pause > limit or not self._passes(error):
                    raise
                if waited >= QUIET_S and not said and limit > RELEASE_S:
                    said = True
                    said_so = self._describe(error)
                    log.warning("%s; trying again for up to %.0f s", said_so, limit)
            # Processes that wait for one lock do not all come back at the same moment.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)
