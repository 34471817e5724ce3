"""Streams of events: each has every event once, and the database is asked once for all of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from moenas.service import event_stream
from moenas.service.event_stream import HELD, EventHub, stream
from moenas.store import study_events, submissions
from moenas.store.store import Store
from moenas.store.submissions import Submission

LAST = "last"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "POLL_S", 0.02)


def append(store: Store, study: str, count: int, kind: str = "tick") -> None:
    def change(connection: sqlalchemy.Connection) -> None:
        for number in range(count):
            study_events.append(connection, study, kind, {"number": number})

    store.transact(change)


@contextmanager
def counted(store: Store) -> Iterator[list[str]]:
    """The statements that read events, as they are executed."""
    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        if "FROM moenas_event " in statement or statement.endswith("FROM moenas_event"):
            seen.append(statement)

    sqlalchemy.event.listen(store.engine, "before_cursor_execute", note)
    yield seen
    sqlalchemy.event.remove(store.engine, "before_cursor_execute", note)


async def ids(chunks: AsyncIterator[str], pause: float = 0.0) -> list[int]:
    """Read a stream to its last event, with a pause after each chunk."""
    ids_seen: list[int] = []
    async for chunk in chunks:
        ids_seen += [int(number) for number in re.findall(r"^id: (\d+)$", chunk, re.MULTILINE)]
        if f"event: {LAST}\n" in chunk or "event: deleted\n" in chunk:
            break
        await asyncio.sleep(pause)
    return ids_seen


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_streams_have_every_event_once_and_share_the_queries(store: Store) -> None:
    append(store, "one", 3)
    append(store, "two", 3)

    async def follow() -> None:
        hub = EventHub(store)
        hub.start()
        studies = ["one", "two"] * 20
        streams = [
            asyncio.create_task(ids(stream(hub, store, study, 1, follow=True))) for study in studies
        ]
        await until(lambda: sum(hub._followers.values()) == 40 and len(hub._waiting) == 2)
        await asyncio.sleep(0.2)
        with counted(store) as statements:
            for _ in range(20):
                await asyncio.to_thread(append, store, "one", 2)
                await asyncio.to_thread(append, store, "two", 2)
                await asyncio.sleep(0.03)
            for study in ("one", "two"):
                await asyncio.to_thread(append, store, study, 1, LAST)
            read = await asyncio.gather(*streams)
        assert all(each == list(range(2, 45)) for each in read)
        # Each look reads the events of both studies at once: one for each of the appends at most.
        assert len(statements) <= 42 + 2
        assert not hub._followers
        assert not hub._recent
        await hub.close()

    asyncio.run(follow())


def test_a_slow_stream_misses_nothing_that_is_held_no_more(store: Store) -> None:
    append(store, "one", 1)

    async def follow() -> None:
        hub = EventHub(store)
        hub.start()
        slow = asyncio.create_task(ids(stream(hub, store, "one", 0, follow=True), pause=0.3))
        quick = asyncio.create_task(ids(stream(hub, store, "one", 0, follow=True)))
        for _ in range(12):
            await asyncio.to_thread(append, store, "one", HELD // 3)
            await asyncio.sleep(0.03)
        await asyncio.to_thread(append, store, "one", 1, LAST)
        expected = list(range(1, 3 + 12 * (HELD // 3)))
        assert await quick == expected
        assert await slow == expected
        await hub.close()

    asyncio.run(follow())


def test_a_burst_of_one_look_is_read_in_parts(store: Store) -> None:
    append(store, "one", 1)

    async def follow() -> None:
        hub = EventHub(store)
        hub.start()
        followed = asyncio.create_task(ids(stream(hub, store, "one", 0, follow=True)))
        await until(lambda: hub._waiting)
        count = 2 * study_events.MOST + HELD
        await asyncio.to_thread(append, store, "one", count)
        await asyncio.to_thread(append, store, "one", 1, LAST)
        assert await followed == list(range(1, count + 3))
        await hub.close()

    asyncio.run(follow())


def test_a_stream_of_a_former_name_waits_for_its_end(store: Store) -> None:
    """A rename takes the events away and leaves the counter, which is ahead of the stream then."""
    append(store, "old", 5)

    async def follow() -> None:
        hub = EventHub(store)
        hub.start()
        followed = asyncio.create_task(ids(stream(hub, store, "old", 5, follow=True)))
        await until(lambda: hub._waiting)

        def rename(connection: sqlalchemy.Connection) -> None:
            study_events.append(connection, "old", "tick", {})
            study_events.move(connection, "old", "new")

        await asyncio.to_thread(store.transact, rename)
        with counted(store) as statements:
            await until(lambda: hub.newest("old") == 6)
            await asyncio.sleep(0.5)
        assert len(statements) <= 3, "the stream asks again and again"
        await asyncio.to_thread(append, store, "old", 1, "deleted")
        assert await followed == [7]
        await hub.close()

    asyncio.run(follow())


def test_the_events_of_more_studies_than_one_query_reads(store: Store) -> None:
    studies = [f"study-{number:03}" for number in range(study_events.STUDIES + 50)]
    for study in studies:
        append(store, study, 3)
    events = store.query(lambda c: study_events.after_each(c, dict.fromkeys(studies, 1)))
    assert [(event.study, event.id) for event in events] == [
        (study, number) for study in studies for number in (2, 3)
    ]
    assert store.query(lambda c: study_events.after_each(c, {})) == []


def test_the_events_of_a_deleted_study_end_with_its_name(store: Store) -> None:
    """A new study of the name has a stream of its own; ids go on."""
    append(store, "s", 2)
    append(store, "s", 1, "deleted")
    submission = Submission("s", "ann", "name: s\n", [], trials=1, priority=0, state="queued")
    store.transact(lambda c: submissions.submit(c, submission, key=None, request_sha256="0"))
    append(store, "s", 2)
    events = store.query(lambda connection: study_events.after(connection, "s", 0))
    assert [event.id for event in events] == [4, 5, 6]
    assert [event.kind for event in events] == ["submitted", "tick", "tick"]
