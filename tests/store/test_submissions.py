"""The queue in SQL: states, fair share, servers that take over, and events without a gap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy
from concurrency import append_events, claim_submissions, together

from moenas.errors import ConflictError, InputError, NotFoundError
from moenas.records import Evaluation, Failure, StudyRecord
from moenas.store import audit, leases, runners, study_events, submissions, tables
from moenas.store.store import Store
from moenas.store.submissions import StudyFilter, Submission

NEW = Submission("x", "ann", "name: x\n", [], trials=10, priority=0, state="queued")


@pytest.fixture
def store(database_url: str) -> Store:
    return Store.open(database_url, create=True)


def submit(store: Store, name: str, user: str = "ann", **more: Any) -> Submission:
    key, sha256 = more.pop("key", None), more.pop("sha256", "a" * 64)
    new = replace(NEW, study=name, user_name=user, **more)
    row, _ = store.transact(lambda c: submissions.submit(c, new, key=key, request_sha256=sha256))
    return row


def claim(store: Store, runner: str) -> str | None:
    row = store.transact(lambda c: submissions.claim_next(c, runner, leases.clock(c)))
    return None if row is None else row.study


def end(store: Store, name: str, runner: str, **changes: Any) -> None:
    store.transact(lambda c: submissions.driver_ended(c, name, runner, lambda _: changes))


def state(store: Store, name: str) -> str:
    return store.query(lambda c: submissions.require(c, name)).state


def kinds(store: Store, name: str) -> list[str]:
    rows = store.query(lambda c: study_events.after(c, name, 0))
    assert [event.id for event in rows] == list(range(1, len(rows) + 1))
    return [event.kind for event in rows]


def test_a_repeat_with_the_same_key_submits_nothing(store: Store) -> None:
    first = submit(store, "x", key="k")
    assert submit(store, "x", key="k") == first
    assert kinds(store, "x") == ["submitted"]
    with pytest.raises(ConflictError, match="was used for study 'x'"):
        submit(store, "y", key="k", sha256="b" * 64)
    with pytest.raises(ConflictError, match="already exists"):
        submit(store, "x", key="other")
    # The key of another user is another key.
    submit(store, "z", user="bob", key="k")
    rows = store.query(lambda c: audit.entries(c, before=None, limit=9))
    assert [(row.user_name, row.action, row.study) for row in rows] == [
        ("bob", "submitted", "z"),
        ("ann", "submitted", "x"),
    ]


def test_users_share_within_a_priority(store: Store) -> None:
    for i in range(4):
        submit(store, f"ann{i}")
    submit(store, "bob0", "bob")
    submit(store, "bob1", "bob")
    submit(store, "cid0", "cid", priority=-1)
    submit(store, "urgent", "ann", priority=5)
    runner = store.transact(runners.register)
    order = [claim(store, runner) for _ in range(9)]
    assert order == ["urgent", "bob0", "ann0", "bob1", "ann1", "ann2", "ann3", "cid0", None]


def test_a_user_whose_studies_ended_long_ago_comes_first(store: Store) -> None:
    for name, user in (("a0", "ann"), ("a1", "ann"), ("b0", "bob"), ("b1", "bob")):
        submit(store, name, user)
    runner = store.transact(runners.register)
    started = []
    for _ in range(4):
        claimed = claim(store, runner)
        assert claimed is not None
        started.append(claimed)
        end(store, claimed, runner, state="finished", reason=None)
    assert started == ["a0", "b0", "a1", "b1"]


def test_of_servers_that_claim_at_once_each_study_goes_to_one(
    store: Store, database_url: str
) -> None:
    for i in range(12):
        submit(store, f"s{i}")
    claims = together(claim_submissions, database_url, 3)
    assert sorted(name for names in claims for name in names) == sorted(f"s{i}" for i in range(12))


def test_events_of_many_writers_have_no_gap_and_none_twice(store: Store, database_url: str) -> None:
    together(append_events, database_url, 3, 15)
    rows = store.query(lambda c: study_events.after(c, "x", 0))
    assert [event.id for event in rows] == list(range(1, 46))
    told = [tuple(event.data["of"]) for event in rows]
    assert len(set(told)) == 45
    for writer in range(3):
        assert [i for w, i in told if w == writer] == list(range(15))


def test_states_change_as_users_ask(store: Store) -> None:
    submit(store, "x")
    runner = store.transact(runners.register)

    def move(change: Any, *more: Any) -> str:
        return str(store.transact(lambda c: change(c, "x", "ann", *more)).state)

    assert move(submissions.pause) == "paused"
    assert move(submissions.pause) == "paused"
    assert claim(store, runner) is None
    assert move(submissions.resume) == "queued"
    assert claim(store, runner) == "x"
    assert move(submissions.resume) == "running"
    assert move(submissions.extend, 12) == "running"
    with pytest.raises(ConflictError, match="give a larger number"):
        move(submissions.extend, 11)
    end(store, "x", runner, state="finished", reason=None)
    with pytest.raises(ConflictError, match="is finished"):
        move(submissions.cancel)
    with pytest.raises(ConflictError, match="is finished"):
        move(submissions.resume)
    assert move(submissions.extend, 20) == "queued"
    assert move(submissions.cancel) == "cancelled"
    assert store.query(lambda c: submissions.require(c, "x")).ended_at is not None
    assert move(submissions.resume) == "queued"
    assert kinds(store, "x") == [
        "submitted", "paused", "resumed", "started", "extended", "finished", "extended",
        "cancelled", "resumed",
    ]  # fmt: skip
    audited = store.query(lambda c: audit.entries(c, before=None, limit=50))
    assert len(audited) == 7  # the server's own changes have no row


def test_a_driver_that_ends_after_a_pause_leaves_it_paused(store: Store) -> None:
    submit(store, "x")
    runner = store.transact(runners.register)
    assert claim(store, runner) == "x"
    store.transact(lambda c: submissions.pause(c, "x", "ann"))
    end(store, "x", runner, state="failed", reason="must not be asked")
    rows = store.query(lambda c: submissions.require(c, "x"))
    assert (rows.state, rows.runner, rows.reason) == ("paused", None, None)
    assert kinds(store, "x")[-1] == "driver_ended"


def test_a_server_that_was_taken_over_changes_nothing(store: Store) -> None:
    submit(store, "x")
    old, new = store.transact(runners.register), store.transact(runners.register)
    assert claim(store, old) == "x"
    # Both lives: this process is there.
    assert store.transact(lambda c: runners.take_over(c, new)) == []
    with store.engine.begin() as connection:
        connection.execute(sqlalchemy.update(tables.runner).values(process_start="0", machine=""))
        connection.execute(sqlalchemy.update(tables.runner).values(heartbeat=0.0))
    assert store.transact(lambda c: runners.take_over(c, new)) == ["x"]
    assert not store.transact(lambda c: runners.renew(c, old))
    end(store, "x", old, state="finished", reason=None)
    assert state(store, "x") == "running"
    end(store, "x", new, state="finished", reason=None)
    assert state(store, "x") == "finished"


def test_a_killed_server_is_replaced_at_once(store: Store) -> None:
    submit(store, "x")
    old = store.transact(runners.register)
    assert claim(store, old) == "x"
    with store.engine.begin() as connection:
        this = tables.runner.c.id == old
        connection.execute(
            sqlalchemy.update(tables.runner).where(this).values(process_start="other")
        )
    new = store.transact(runners.register)
    assert store.transact(lambda c: runners.take_over(c, new)) == ["x"]


def test_pages_hold_each_study_once(store: Store) -> None:
    for i in range(7):
        submit(store, f"s{i}", "ann" if i % 2 else "bob")
    store.create_study(record("by-command"))
    seen: list[str] = []
    after = None
    while True:
        page = store.query(lambda c, a=after: submissions.page(c, StudyFilter(), after=a, limit=3))
        seen += [row.study for row in page]
        if len(page) < 3:
            break
        after = (page[-1].created_at, page[-1].study)
    assert sorted(seen) == sorted(["by-command", *(f"s{i}" for i in range(7))])

    def filtered(**wanted: Any) -> set[str]:
        rows = store.query(
            lambda c: submissions.page(c, StudyFilter(**wanted), after=None, limit=50)
        )
        return {each.study for each in rows}

    assert filtered(user_name="ann") == {"s1", "s3", "s5"}
    assert filtered(contains="COMM") == {"by-command"}
    assert filtered(contains="%") == set()
    assert filtered(state="paused") == set()
    assert len(filtered(state="queued")) == 7


def record(name: str) -> StudyRecord:
    objective = {"name": "loss", "direction": "minimize", "unit": "", "doc": "", "sha256": "0"}
    return StudyRecord(
        name, "", [], {}, "a" * 64, [objective], {}, {}, 3, created_at="2026-01-01T00:00:00+00:00"
    )


def test_unknown_studies_and_those_of_commands(store: Store) -> None:
    store.create_study(record("mine"))
    submit(store, "theirs")
    with pytest.raises(ConflictError, match="was started by a command"):
        store.transact(lambda c: submissions.pause(c, "mine", "ann"))
    with pytest.raises(NotFoundError, match="Did you mean 'theirs'"):
        store.transact(lambda c: submissions.pause(c, "theirz", "ann"))
    with pytest.raises(ConflictError, match="already exists"):
        submit(store, "mine")


def test_each_change_of_a_study_is_one_event(store: Store) -> None:
    store.create_study(record("x"))
    store.add_candidate("x", 0, "f0", {}, {})
    attempt = store.start_attempt("x", 0)
    evaluation = Evaluation("x", 0, attempt, "complete", "f0", values={"loss": 2.0})
    store.record(evaluation)
    store.record(evaluation)  # once more, as after a commit whose answer was lost
    store.add_candidate("x", 1, "f1", {}, {})
    failed = Failure("diverged", "loss is nan")
    attempt = store.start_attempt("x", 1)
    store.record(
        Evaluation("x", 1, attempt, "failed", "f1", values={"loss": float("nan")}, failure=failed)
    )
    store.set_ended("x", "trials")
    store.set_ended("x", "trials")
    assert kinds(store, "x") == [
        "study_created", "trial_started", "trial_finished", "trial_started", "trial_finished",
        "study_ended",
    ]  # fmt: skip
    events = store.query(lambda c: study_events.after(c, "x", 2, limit=1))
    assert events[0].data["values"] == {"loss": 2.0}
    assert events[0].data["front"] == 1
    last = store.query(lambda c: study_events.after(c, "x", 4))[0].data
    assert (last["failure"]["kind"], last["values"]) == ("diverged", {"loss": None})


def test_a_database_of_the_sixth_schema_has_no_events(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moenas.store import database, migrations

    monkeypatch.setattr(database, "REVISIONS", migrations.REVISIONS[:6])
    old = Store.open(database_url, create=True)
    monkeypatch.undo()
    store = Store.open(database_url)  # as a command that only maintains a study does
    store.create_study(record("x"))
    store.add_candidate("x", 0, "f0", {}, {})
    store.record(
        Evaluation("x", 0, store.start_attempt("x", 0), "complete", "f0", values={"loss": 1.0})
    )
    old.engine.dispose()
    new = Store.open(database_url, create=True)
    assert new.query(study_events.newest) == {}
    new.set_ended("x", "trials")
    assert kinds(new, "x") == ["study_ended"]


def test_names_of_tokens(store: Store) -> None:
    from moenas.store import access_tokens

    for name in ("", "a b", "-x", "x" * 101, "a\nb"):
        with pytest.raises(InputError, match="token name"):
            store.transact(lambda c, n=name: access_tokens.create(c, n, "viewer", None))


def test_rungs_and_what_is_added_once_are_events(store: Store) -> None:
    from moenas.records import RungResult
    from moenas.store import rungs

    store.create_study(record("x"))
    store.add_candidate("x", 0, "f0", {}, {})
    attempt = store.start_attempt("x", 0)
    paused = Evaluation("x", 0, attempt, "paused", "f0", weights_sha256="a" * 64)
    rungs.add(store, RungResult(0, 1, 512, 3.5), paused)
    rungs.promote(store, "x", 0, 1)
    told = {"request": "r1"}
    for expected in (True, False):
        added = store.transact(lambda c: study_events.append_once(c, "x", "enqueued", told))
        assert added is expected
    assert kinds(store, "x") == [
        "study_created", "trial_started", "trial_paused", "trial_promoted", "enqueued",
    ]  # fmt: skip
