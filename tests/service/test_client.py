"""The client against a listening server: the same answers as a local study, and lost connections."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import made_up_views
import pandas
import pytest
import stored_studies
from served import SMALL, Served, listening, served

import moenas
from moenas.errors import (
    ConflictError,
    InputError,
    MoenasError,
    NotFoundError,
    SpaceError,
    StudyStoppedError,
)
from moenas.service import client, connection
from moenas.service.event_stream import EventHub
from moenas.service.state import ServiceState
from moenas.store import leases, study_events, submissions
from moenas.store.study_events import StudyEvent
from moenas.store.submissions import Submission
from moenas.study.launch import load_study

pytestmark = pytest.mark.integration

VIEW = made_up_views.view(9, 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("client")
    stored_studies.shelve(folder, VIEW)
    with served(folder, requests_per_s=1e6, burst=10**6) as server:
        yield server


@pytest.fixture(scope="module")
def address(one: Served) -> Iterator[str]:
    with listening(replace_hub(one)) as url:
        yield url


def replace_hub(one: Served) -> ServiceState:
    """A state with events of its own: the fixture's events belong to another event loop."""
    return replace(one.service, hub=EventHub(one.service.store))


@pytest.fixture
def remote(one: Served, address: str) -> Iterator[client.Server]:
    with moenas.connect(address, one.tokens["submitter"]) as connected:
        yield connected


def put(one: Served, name: str) -> None:
    new = Submission(name, "submitter", SMALL, [], trials=2, priority=0, state="queued")
    one.service.store.transact(
        lambda c: submissions.submit(c, new, key=None, request_sha256="0" * 64)
    )


def move(one: Served, name: str, state: str, reason: str | None = None) -> None:
    """Bring a submitted study through a driver to a state."""
    store, runner = one.service.store, one.service.runner.id
    claimed = store.transact(lambda c: submissions.claim_next(c, runner, leases.clock(c)))
    assert claimed is not None
    assert claimed.study == name
    changes = {"state": state, "reason": reason}
    store.transact(lambda c: submissions.driver_ended(c, name, runner, lambda _: changes))


def test_a_remote_study_reads_like_the_local_one(one: Served, remote: client.Server) -> None:
    local = load_study("made_up", one.service.store.url)
    study = remote.study("made_up")
    assert study.front() == local.front()
    pandas.testing.assert_frame_equal(study.dataframe(), local.dataframe(), check_dtype=False)
    assert study.history() == one.service.store.history("made_up")
    mine, theirs = local.evaluation(0), study.evaluation(0)
    assert (theirs.values, theirs.curve, theirs.routing) == (mine.values, mine.curve, mine.routing)
    assert study.finished == local.store.ended("made_up")


def test_errors_are_those_of_the_server_with_the_users_file(
    remote: client.Server, tmp_path: Path, address: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(SMALL.replace("kind: dense", "kind: dens"))
    with pytest.raises(SpaceError, match=r"bad\.yaml:8:19: architecture.*Did you mean 'dense'"):
        remote.check(path)
    with pytest.raises(SpaceError, match=r"bad\.yaml:8:19"):
        remote.submit(path)
    with pytest.raises(NotFoundError, match="Did you mean 'made_up'"):
        remote.study("made_ip")
    with pytest.raises(ConflictError, match="was started by a command"):
        remote.study("made_up").pause()
    with pytest.raises(InputError, match="Bearer TOKEN"):
        moenas.connect(address, "wrong")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9: "):
        moenas.connect("http://127.0.0.1:9", "x")
    with pytest.raises(InputError, match="begins with http"):
        moenas.connect("localhost:8321")


def test_a_study_is_submitted_under_the_name_of_its_file(
    one: Served, remote: client.Server, tmp_path: Path
) -> None:
    path = tmp_path / "unnamed.yaml"
    path.write_text(SMALL.replace("name: small\n", ""))
    assert remote.check(path)["name"] == "unnamed"
    study = remote.submit(path, ["search.trials=3"], key="k")
    assert (study.name, study.state) == ("unnamed", "queued")
    assert remote.submit(path, ["search.trials=3"], key="k").name == "unnamed"
    assert [row["name"] for row in remote.studies(state="queued")] == ["unnamed"]
    study.extend(5)
    study.pause()
    assert (study.state, study.detail()["trials"]) == ("paused", 5)
    study.resume()
    study.cancel()
    with pytest.raises(StudyStoppedError, match="cancelled"):
        study.wait()
    study.delete()
    with pytest.raises(NotFoundError):
        study.detail()


def test_wait_gives_each_event_once_and_ends_with_the_study(
    one: Served, remote: client.Server
) -> None:
    put(one, "waited")
    study, seen = remote.study("waited"), list[StudyEvent]()
    timer = threading.Timer(0.5, move, (one, "waited", "finished"))
    timer.start()
    assert study.wait(seen.append) is study
    timer.join()
    assert [event.kind for event in seen] == ["started", "finished"]
    assert study.wait() is study


def test_wait_tells_why_a_study_failed(one: Served, remote: client.Server) -> None:
    put(one, "fails")
    timer = threading.Timer(0.3, move, (one, "fails", "failed", "out of luck"))
    timer.start()
    with pytest.raises(StudyStoppedError, match="out of luck"):
        remote.study("fails").wait()
    timer.join()


def test_events_go_on_after_the_server_was_gone(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.05)
    put(one, "lost")
    store = one.service.store

    def tick(number: int) -> None:
        store.transact(lambda c: study_events.append(c, "lost", "tick", {"n": number}))

    with listening(replace_hub(one)) as address:
        port = int(address.rpartition(":")[2])
        remote = moenas.connect(address, one.tokens["viewer"])
        study = remote.study("lost")
        events = study.events()
        tick(1)
        assert [next(events).kind for _ in range(2)] == ["submitted", "tick"]
    tick(2)  # while no server is there
    got: list[StudyEvent] = []
    reader = threading.Thread(target=lambda: got.extend(next(events) for _ in range(2)))
    reader.start()
    answer: list[str] = []
    asker = threading.Thread(target=lambda: answer.append(study.state))
    asker.start()
    with listening(replace_hub(one), port):
        tick(3)
        reader.join(30)
        asker.join(30)
        events.close()
        remote.close()
    assert [event.data["n"] for event in got] == [2, 3]
    assert answer == ["queued"]


@pytest.mark.parametrize("body", ["<html>log in</html>", "[1]"])
def test_another_server_is_no_moenas_server(body: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if body.startswith("<") else 500)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(MoenasError, match=r"no moenas server|status 500"):
            moenas.connect(url, "token").studies()
        server.shutdown()
