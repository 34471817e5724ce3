"""Events of studies as server-sent events: stored ones, then new ones, each once."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import Connection
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
HELD = 200
"""Events of a followed study that are held for its streams."""


@dataclass(frozen=True)
class EventText:
    """One event as it is sent."""

    id: int
    kind: str
    text: str
    """The form of the HTML standard (section server-sent events)."""

    @classmethod
    def of(cls, event: StudyEvent) -> EventText:
        """Write an event."""
        data = to_json(event.plain(), None)
        return cls(event.id, event.kind, f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n")


@dataclass
class _Recent:
    """The newest events of a followed study: all that are newer than `floor`."""

    floor: int
    events: deque[EventText] = field(default_factory=deque)

    def add(self, event: EventText) -> None:
        """Add a newer event; the oldest one goes where there are too many."""
        self.events.append(event)
        if len(self.events) > HELD:
            self.floor = self.events.popleft().id


class EventHub:
    """Reads new events of followed studies once, and wakes the streams that wait for them.

    All but `_read` runs in the event loop. Events and counters are read in one state of the
    database, so that no event is missed between two looks.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._newest: dict[str, int] = {}
        self._followers: Counter[str] = Counter()
        self._recent: dict[str, _Recent] = {}
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
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
        for study in list(self._waiting):
            self._wake(study)

    @contextmanager
    def follows(self, study: str) -> Iterator[None]:
        """Hold the new events of a study while a stream sends them."""
        self._followers[study] += 1
        try:
            yield
        finally:
            self._followers[study] -= 1
            if not self._followers[study]:
                del self._followers[study]
                self._recent.pop(study, None)

    def newest(self, study: str) -> int:
        """Return the id of the newest event of a study at the last look."""
        return self._newest.get(study, 0)

    async def wait(self, study: str, last: int) -> bool:
        """Wait for an event newer than `last`, KEEP_ALIVE_S at most; say whether there is one."""
        if self.is_closed or self.newest(study) > last:
            return True
        woken = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(study, set())
        waiting.add(woken)
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await woken
        except TimeoutError:
            return False
        finally:
            waiting.discard(woken)
            if not waiting and self._waiting.get(study) is waiting:
                del self._waiting[study]
        return True

    def held(self, study: str, last: int) -> list[EventText]:
        """Return the held events newer than `last`; none if one between may not be held."""
        recent = self._recent.get(study)
        if recent is None or last < recent.floor:
            return []
        return [event for event in recent.events if event.id > last]

    # --- the looks -------------------------------------------------------------------------------

    async def _poll(self) -> None:
        while True:
            try:
                await self._look()
            except MoenasError as error:
                log.warning("the events wait for the database: %s", error)
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        """Read the counters and the new events of followed studies, and wake who waits."""
        known = {study: self.newest(study) for study in self._followers}
        newest, texts = await run_in_threadpool(self._read, known)
        before, self._newest = self._newest, newest
        for study, last in known.items():
            if study not in self._followers:
                continue
            if newest.get(study, 0) > last + HELD:  # each stream reads them in parts
                self._recent[study] = _Recent(newest[study])
            for event in texts.get(study, ()):
                self._recent.setdefault(study, _Recent(last)).add(event)
        for study in list(self._waiting):
            if newest.get(study, 0) > before.get(study, 0):
                self._wake(study)

    def _read(self, known: dict[str, int]) -> tuple[dict[str, int], dict[str, list[EventText]]]:
        """Return the newest ids of all studies, and the newer events of those in `known`.

        A study with more than HELD of them is left out.
        """

        def read(connection: Connection) -> tuple[dict[str, int], list[StudyEvent]]:
            newest = study_events.newest(connection)
            counts = {study: newest.get(study, 0) - last for study, last in known.items()}
            due = {study: known[study] for study, count in counts.items() if 0 < count <= HELD}
            return newest, study_events.after_each(connection, due)

        newest, events = self._store.query(read)
        texts: dict[str, list[EventText]] = {}
        for event in events:
            texts.setdefault(event.study, []).append(EventText.of(event))
        return newest, texts

    def _wake(self, study: str) -> None:
        for woken in self._waiting.pop(study, ()):
            if not woken.done():
                woken.set_result(None)


async def stream(
    hub: EventHub, store: Store, study: str, last: int, *, follow: bool
) -> AsyncIterator[str]:
    """Yield the events of a study that are newer than `last`; with `follow`, also later ones.

    It ends with the event `deleted`, and when the server or its database ends.
    """
    yield f"retry: {RETRY_MS}\n\n"
    with hub.follows(study):
        while not hub.is_closed:
            counted = hub.newest(study)
            try:
                events = hub.held(study, last) if follow else []
                events = events or await _stored(store, study, last)
            except MoenasError as error:
                log.warning("a stream of '%s' ends: %s", study, error)
                return
            if events:
                last = events[-1].id
                yield "".join(event.text for event in events)
            else:  # a rename has taken away the counted events
                last = max(last, counted)
            if any(event.kind == "deleted" for event in events):
                return
            if len(events) == MOST:
                continue
            if not follow:
                return
            while not await hub.wait(study, last):
                yield ": keep-alive\n\n"


async def _stored(store: Store, study: str, last: int) -> list[EventText]:
    """Return the stored events newer than `last`, MOST at most."""

    def read(connection: Connection) -> list[StudyEvent]:
        return study_events.after(connection, study, last)

    events = await run_in_threadpool(store.query, read)
    return [EventText.of(event) for event in events]
