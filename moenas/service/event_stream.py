"""Events of studies as server-sent events: what is stored, then what is added, each once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from moenas.errors import MoenasError
from moenas.store import study_events
from moenas.store.store import Store
from moenas.store.study_events import MOST, StudyEvent
from moenas.terminal import to_json

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Seconds between two looks at the counters of events."""
KEEP_ALIVE_S = 15.0
"""Seconds without an event after which a comment is sent, so that no proxy ends the stream."""
RETRY_MS = 1000
"""Milliseconds after which a browser connects again."""


class EventHub:
    """Tells waiting streams of new events: one query serves all of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._newest: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.is_closed = False

    def start(self) -> None:
        """Begin to look; needs a running event loop."""
        self._task = asyncio.create_task(self._poll())

    async def close(self) -> None:
        """End all streams."""
        self.is_closed = True
        if self._task is not None:
            self._task.cancel()
        async with self._changed:
            self._changed.notify_all()

    async def _poll(self) -> None:
        while True:
            try:
                newest = await run_in_threadpool(self._store.query, study_events.newest)
            except MoenasError as error:
                log.warning("the events wait for the database: %s", error)
                newest = self._newest
            if newest != self._newest:
                self._newest = newest
                async with self._changed:
                    self._changed.notify_all()
            await asyncio.sleep(POLL_S)

    async def wait(self, study: str, last: int) -> None:
        """Wait for an event newer than `last`, for KEEP_ALIVE_S at most."""

        def is_due() -> bool:
            return self.is_closed or self._newest.get(study, 0) > last

        try:
            async with asyncio.timeout(KEEP_ALIVE_S), self._changed:
                await self._changed.wait_for(is_due)
        except TimeoutError:
            pass


def as_text(event: StudyEvent) -> str:
    """Return an event in the form of the HTML standard (section server-sent events)."""
    return f"id: {event.id}\nevent: {event.kind}\ndata: {to_json(event.plain(), None)}\n\n"


async def stream(
    hub: EventHub, store: Store, study: str, last: int, *, follow: bool
) -> AsyncIterator[str]:
    """Yield the events of a study that are newer than `last`; with `follow`, also later ones.

    It ends with the event `deleted`, and when the server or its database ends.
    """
    yield f"retry: {RETRY_MS}\n\n"
    while not hub.is_closed:
        after = last
        try:
            new_events = await run_in_threadpool(
                store.query, lambda connection, a=after: study_events.after(connection, study, a)
            )
        except MoenasError as error:
            log.warning("a stream of '%s' ends: %s", study, error)
            return
        for event in new_events:
            yield as_text(event)
            last = event.id
        if any(event.kind == "deleted" for event in new_events):
            return
        if len(new_events) == MOST:
            continue
        if not follow:
            return
        await hub.wait(study, last)
        yield ": keep-alive\n\n"
