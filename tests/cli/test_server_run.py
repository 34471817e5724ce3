"""Commands against a server: they write what the local ones write, and go on after it was gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Result, Run, runner
from served import SMALL, moenas_serve, token

pytestmark = pytest.mark.integration

TRIALS = 5
SPACE = SMALL.replace("[32, 64]", "[16, 32, 48]").replace("trials: 2", f"trials: {TRIALS}")
SLOW = SPACE.replace("tokens: 2048", "tokens: 40_000")
PATIENCE_S = 120.0


@dataclass
class Team:
    """A server with one study, which `moenas run --server` followed over a restart."""

    folder: Path
    address: str
    out: str
    err: str

    @property
    def storage(self) -> str:
        return f"sqlite:///{self.folder}/moenas.db"


def follow(folder: Path, address: str, *words: str) -> subprocess.Popen[str]:
    """Start `moenas run small.yaml --server` in a process of its own."""
    log = (folder / "err.txt").open("w")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "moenas", "run", "small.yaml", "--server", address, *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Wait until the stderr of a process has a line that fits a pattern."""
    deadline = time.monotonic() + PATIENCE_S
    while not re.search(pattern, (folder / "err.txt").read_text(), re.MULTILINE):
        assert process.poll() is None, (folder / "err.txt").read_text()
        assert time.monotonic() < deadline, (folder / "err.txt").read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOENAS_TOKEN", token(folder, "admin"))
        for name in ("MOENAS_STORAGE", "OPTUNA_STORAGE", "MOENAS_RUNS", "MOENAS_SERVER"):
            patch.delenv(name, raising=False)
        (folder / "small.yaml").write_text(SLOW)
        with moenas_serve(folder) as (server, address):
            run = follow(folder, address, "-o", "json")
            wait_for(folder, r"trial 0 val_loss", run)
            server.kill()
            server.wait()
            wait_for(folder, r"asks again for", run)
        with moenas_serve(folder, port=int(address.rpartition(":")[2])):
            out, _ = run.communicate(timeout=PATIENCE_S)
            assert run.returncode == 0, (folder / "err.txt").read_text()
            yield Team(folder, address, out, (folder / "err.txt").read_text())


@pytest.fixture
def moenas(
    team: Team, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    shutil.copy(team.folder / "small.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd)


def both(moenas: Run, team: Team, *words: object) -> tuple[Result, Result]:
    """Run a command on the database, then on the server."""
    return moenas(*words, "--storage", team.storage), moenas(*words, "--server", team.address)


def test_a_run_is_followed_over_a_restart_of_the_server(team: Team, moenas: Run) -> None:
    finished = re.findall(r"^\[\d/5\] trial (\d+) val_loss [\d.]+ .* front \d", team.err, re.M)
    assert list(map(int, finished)) == list(range(max(TRIALS, len(finished)))), team.err
    assert re.match(r"\[0/5\] state: (queued|running)\n", team.err)
    assert "[5/5] done: study 'small' is finished" in team.err
    local = moenas("front", "small", "-o", "json", "--storage", team.storage)
    assert json.loads(team.out) == json.loads(local.out)
    assert "next:" in team.err
    assert f"--server {team.address}" in team.err


@pytest.mark.parametrize("output", ["table", "json", "csv"])
@pytest.mark.parametrize(
    "words",
    [["status"], ["status", "small"], ["list"], ["front", "small"], ["show", "small", 1]],
    ids=" ".join(["{}"]).format,
)
def test_reading_commands_write_what_the_local_ones_write(
    moenas: Run, team: Team, words: list[object], output: str
) -> None:
    local, remote = both(moenas, team, *words, "-o", output)
    assert local.code == remote.code == 0, remote.err
    if output == "json":
        assert json.loads(remote.out) == json.loads(local.out)
    assert remote.out == local.out
    assert remote.err == local.err


def test_reports_and_checks_are_those_of_the_local_commands(moenas: Run, team: Team) -> None:
    for output in ("json", "table"):
        local, remote = both(moenas, team, "report", "small", "-o", output)
        assert (remote.code, remote.out) == (0, local.out), remote.err
    for output in ("json", "table", "csv"):
        local, remote = both(moenas, team, "check", "small.yaml", "-o", output)
        assert (remote.code, remote.out) == (0, local.out), remote.err
    remote = moenas("run", "small.yaml", "--dry-run", "--trials", 7, "--server", team.address)
    assert "estimate for 7 candidates" in remote.out


def test_an_export_holds_the_files_of_the_local_one(moenas: Run, team: Team) -> None:
    local = moenas("export", "small", 1, "here", "--storage", team.storage)
    remote = moenas("export", "small", 1, "there", "--server", team.address)
    assert local.code == remote.code == 0, remote.err
    assert (remote.out, remote.err) == (
        local.out.replace("here", "there"),
        local.err.replace("here", "there"),
    )
    names = sorted(path.name for path in Path("here").iterdir())
    assert names == sorted(path.name for path in Path("there").iterdir())
    for name in ("model.safetensors", "model.py"):
        assert Path("there", name).read_bytes() == Path("here", name).read_bytes()
    again = moenas("export", "small", 1, "there", "--server", team.address)
    assert (again.code, "in use" in again.err) == (2, True)


def test_architectures_are_enqueued_from_files_of_the_client(moenas: Run, team: Team) -> None:
    shown = json.loads(moenas("show", "small", 0, "-o", "json", "--server", team.address).out)
    Path("mine.yaml").write_text(json.dumps({"architecture": shown["architecture"]}))
    words = ["enqueue", "small", "mine.yaml", "study:small", "-o", "json"]
    local, remote = both(moenas, team, *words)
    assert local.code == remote.code == 0, remote.err
    assert json.loads(remote.out) == json.loads(local.out)
    assert json.loads(remote.out)[0]["source"] == "mine.yaml"
    Path("mine.yaml").write_text("architecture: {d_model: 7}")
    local, remote = both(moenas, team, "enqueue", "small", "mine.yaml")
    assert (remote.code, remote.err) == (local.code, local.err)
    assert remote.code == 2


def test_the_queue_is_changed_from_the_command_line(moenas: Run, team: Team) -> None:
    at = ("--server", team.address)
    slow = Path("waits.yaml")
    slow.write_text(SLOW.replace("tokens: 40_000", "tokens: 4_000_000").replace("small", "waits"))
    follower = subprocess.Popen(
        [sys.executable, "-m", "moenas", "run", "waits.yaml", *at],
        env={**os.environ, "CI": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stderr is not None
    assert "state: " in follower.stderr.readline()
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert "The study goes on; follow it with:" in said
    assert f"moenas run waits.yaml --server {team.address}" in said

    paused = json.loads(moenas("pause", "waits", *at, "-o", "json").out)
    assert paused == {"study": "waits", "state": "paused", "trials": TRIALS}
    extended = json.loads(moenas("extend", "waits", 9, *at, "-o", "json").out)
    assert extended["trials"] == 9
    assert "waits: paused; 0 of 9" in moenas("status", "waits", *at).out
    assert json.loads(moenas("resume", "waits", *at, "-o", "json").out)["state"] != "paused"
    other = moenas("run", "waits.yaml", "train.tokens=8192", *at)
    assert (other.code, "another space or other overrides" in other.err) == (2, True)
    assert json.loads(moenas("cancel", "waits", *at, "-o", "json").out)["state"] == "cancelled"
    asked = moenas("delete", "waits", *at)
    assert (asked.code, "--yes" in asked.err) == (2, True)
    deadline = time.monotonic() + PATIENCE_S
    while moenas("delete", "waits", *at, "--yes").code:  # its driver ends first
        assert time.monotonic() < deadline
        time.sleep(0.5)
    gone = moenas("status", "waits", *at)
    assert (gone.code, "no study 'waits'" in gone.err) == (2, True)


def test_what_is_wrong_is_one_line(
    moenas: Run, team: Team, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    local, remote = both(moenas, team, "front", "smal")
    assert remote.code == local.code == 2
    assert "Did you mean 'small'" in remote.err
    both_given = moenas("status", "--server", team.address, "--storage", team.storage)
    assert (both_given.code, "give one of them" in both_given.err) == (2, True)
    for words in (["run", "small.yaml", "--workers", 2], ["run", "small.yaml", "--fresh"]):
        refused = moenas(*words, "--server", team.address)
        assert (refused.code, "a server decides this" in refused.err) == (2, True)
    Path("bad.yaml").write_text(SPACE.replace("kind: dense", "kind: dens"))
    bad = moenas("run", "bad.yaml", "--server", team.address)
    assert (bad.code, "bad.yaml:8:19" in bad.err) == (2, True)
    nobody = moenas("status", "--server", "http://127.0.0.1:9")
    assert (nobody.code, "http://127.0.0.1:9: " in nobody.err) == (2, True)
    for url in ("http://[", "ftp://x", "http://a b"):
        wrong = moenas("status", "--server", url)
        assert (wrong.code, "Traceback" in wrong.err, "internal" in wrong.err) == (2, False, False)
    for secret in ("wrong", "\u00e9", "a\nb"):
        monkeypatch.setenv("MOENAS_TOKEN", secret)
        refused = moenas("status", "--server", team.address)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert moenas("pause", "small").code == 2  # no server is named


def test_a_command_that_needs_the_database_says_so(
    moenas: Run, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ["doctor", "small"],
        ["retry", "small"],
        ["remeasure", "small"],
        ["rename", "small", "other"],
        ["copy", "small", "--to", "sqlite:///x.db"],
        ["pack", "small", "x.zip"],
        ["unpack", "x.zip"],
        ["compare", "small", "small"],
        ["token", "list"],
        ["dashboard"],
    ):
        refused = moenas(*words, "--server", team.address)
        assert (refused.code, "needs a database, not the server" in refused.err) == (2, True), words
    monkeypatch.setenv("MOENAS_SERVER", team.address)
    assert "needs a database" in moenas("doctor", "small").err
    assert moenas("doctor", "small", "--storage", team.storage).code == 0
    assert moenas("token", "list", "--storage", team.storage).code == 0
    assert moenas("front", "small").code == 0
    assert not Path("moenas.db").exists()
