"""The runner with real drivers: those that die, that are paused, that cannot run, that are found again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from served import SMALL
from sqlalchemy import update

from moenas.processes import process_start
from moenas.service import runner as runner_module
from moenas.service.runner import Runner
from moenas.service.settings import ServerSettings
from moenas.store import runners, study_events, submissions, tables
from moenas.store.store import Store
from moenas.store.submissions import Submission

pytestmark = pytest.mark.integration

PATIENCE_S = 90.0
NEW = Submission("small", "ann", SMALL, [], trials=2, priority=0, state="queued")


@pytest.fixture
def settings(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    monkeypatch.setenv("MOENAS_RUNS", str(tmp_path / "runs"))
    return ServerSettings(
        storage=database_url,
        work_dir=tmp_path / "work",
        workers="inline",
        restart_limit=2,
        backoff_s=0.0,
    )


@pytest.fixture
def store(settings: ServerSettings) -> Store:
    return Store.open(settings.storage, create=True)


@pytest.fixture
def make(store: Store, settings: ServerSettings) -> Iterator[Callable[[], Runner]]:
    """Makes runners that do something only when they are ticked; at the end, no driver is left."""
    made: list[Runner] = []

    def one() -> Runner:
        runner = Runner(store, settings)
        runner.id = store.transact(runners.register)
        made.append(runner)
        return runner

    yield one
    for each in made:
        for runner in each._held():
            if (process := runner_module.process_of(runner)) is not None:
                each.drivers.kill(process)
                while each.drivers.is_alive(process):
                    time.sleep(0.02)


def submit(store: Store, name: str = "small", **changes: object) -> None:
    text = SMALL.replace("name: small", f"name: {name}")
    new = replace(NEW, **({"study": name, "space_text": text} | changes))  # type: ignore[arg-type]
    store.transact(lambda c: submissions.submit(c, new, key=None, request_sha256="0" * 64))


def submission_of(store: Store, name: str = "small") -> Submission:
    return store.query(lambda c: submissions.require(c, name))


def kinds(store: Store, name: str = "small") -> list[str]:
    return [event.kind for event in store.query(lambda c: study_events.after(c, name, 0))]


def tick_until(runner: Runner, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, runner.drivers.log_tail("small")
        runner.tick()
        time.sleep(0.05)


def kill_driver(store: Store, name: str = "small") -> None:
    process = runner_module.process_of(submission_of(store, name))
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while process_start(process.pid) == process.process_start and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_driver_that_dies_is_restarted_until_the_limit(
    store: Store, make: Callable[[], Runner]
) -> None:
    submit(store)
    runner = make()
    for times in range(3):
        tick_until(runner, lambda: submission_of(store).driver_pid is not None)
        assert (submission_of(store).state, submission_of(store).restarts) == ("running", times)
        kill_driver(store)
        pid = submission_of(store).driver_pid
        tick_until(runner, lambda p=pid: submission_of(store).driver_pid != p)  # type: ignore[misc]
    last = submission_of(store)
    assert (last.state, last.restarts, last.runner) == ("failed", 2, None)
    assert last.reason is not None
    assert last.reason.startswith("its driver was killed, 3 times in all; `resume` starts it again")
    assert kinds(store) == [
        "submitted", "started", "restarted", "started", "restarted", "started", "failed",
    ]  # fmt: skip
    store.transact(lambda c: submissions.resume(c, "small", "ann"))
    assert submission_of(store).restarts == 0


def test_a_restart_waits_longer_each_time(
    store: Store, settings: ServerSettings, make: Callable[[], Runner]
) -> None:
    runner = Runner(store, replace(settings, backoff_s=7.0, restart_limit=9))
    waits = []
    for restarts in range(8):
        after = runner._after(
            replace(NEW, restarts=restarts, driver_pid=1), code=None, clock=1000.0
        )
        waits.append(after["not_before"] - 1000.0)
    assert waits == [7.0, 14.0, 28.0, 56.0, 112.0, 224.0, 300.0, 300.0]


def test_a_space_that_is_not_valid_fails_at_once_with_the_reason(
    store: Store, make: Callable[[], Runner]
) -> None:
    submit(store, space_text=SMALL.replace("kind: dense", "kind: dens"))
    runner = make()
    tick_until(runner, lambda: submission_of(store).state == "failed")
    assert submission_of(store).restarts == 0
    reason = submission_of(store).reason
    assert reason is not None
    assert "small.yaml:8:19: architecture.blocks.0.ffn.kind: no ffn of kind 'dens'" in reason


def test_a_study_whose_name_is_no_folder_name_is_driven(
    store: Store, settings: ServerSettings, make: Callable[[], Runner]
) -> None:
    """Earlier versions renamed submitted studies to any text."""
    submit(store)
    name = "../small / second"
    renamed = {"study": name, "overrides": [f"name={json.dumps(name)}"]}
    store.transact(lambda c: c.execute(update(tables.submission).values(renamed)))
    runner = make()
    tick_until(runner, lambda: submission_of(store, name).state == "finished")
    assert [study.name for study in store.studies()] == [name]
    (folder,) = settings.work_dir.iterdir()
    assert (folder / "driver.log").is_file()


def test_two_servers_start_each_study_once(store: Store, make: Callable[[], Runner]) -> None:
    for name in ("a", "b", "c"):
        submit(store, name)
    first, second = make(), make()
    for _ in range(3):
        first.tick()
        second.tick()
    states = {name: submission_of(store, name) for name in ("a", "b", "c")}
    assert [states[name].state for name in "abc"] == ["running", "running", "queued"]
    assert {states["a"].runner, states["b"].runner} == {first.id, second.id}
    assert states["a"].driver_pid != states["b"].driver_pid
    assert kinds(store, "a") == kinds(store, "b") == ["submitted", "started"]


def test_a_study_is_paused_resumed_extended_and_finished(
    store: Store, make: Callable[[], Runner]
) -> None:
    submit(store)
    runner = make()
    tick_until(runner, lambda: "trial_finished" in kinds(store))
    store.transact(lambda c: submissions.pause(c, "small", "ann"))
    tick_until(runner, lambda: submission_of(store).runner is None)
    assert submission_of(store).state == "paused"
    assert submission_of(store).restarts == 0
    runner.tick()
    assert submission_of(store).driver_pid is None
    store.transact(lambda c: submissions.resume(c, "small", "ann"))
    store.transact(lambda c: submissions.extend(c, "small", "ann", 3))
    tick_until(runner, lambda: submission_of(store).state == "finished")
    complete = [e for e in store.evaluations("small") if not e.is_copy]
    assert len(complete) == 3
    # Each evaluation of the database is one event, in the order in which they were recorded.
    events = store.query(lambda c: study_events.after(c, "small", 0))
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    told = [event.data["trial"] for event in events if event.kind == "trial_finished"]
    assert sorted(told) == store.finished("small")


@pytest.mark.parametrize("state", ["paused", "cancelled"])
def test_a_driver_on_another_host_ends_by_itself(
    store: Store, make: Callable[[], Runner], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    text = SMALL.replace("d_ff: {int: [64, 128], step: 32}", "d_ff: {int: [64, 2000]}")
    submit(store, space_text=text, trials=500)
    runner = make()
    tick_until(runner, lambda: "trial_finished" in kinds(store))
    submission = submission_of(store)
    process = runner_module.process_of(submission)
    assert process is not None
    elsewhere = ("another host", process.pid, process.process_start)
    store.transact(lambda c: submissions.set_driver(c, "small", *elsewhere))
    monkeypatch.setattr(runner.drivers, "interrupt", lambda _: pytest.fail("signalled"))
    change = submissions.pause if state == "paused" else submissions.cancel
    store.transact(lambda c: change(c, "small", "ann"))
    tick_until(runner, lambda: submission_of(store).runner is None)
    assert submission_of(store).state == state
    deadline = time.monotonic() + 10
    while runner.drivers.is_alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert runner.drivers.exit_code("small") == 130
    assert f"study 'small' is {state} in the queue" in runner.drivers.log_tail("small")
    assert len(store.finished("small")) < 500
