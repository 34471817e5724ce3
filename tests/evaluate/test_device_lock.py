"""The device lease, held by real processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from moenas.errors import MachineError
from moenas.evaluate.device_lock import DeviceLock, lock_folders

WORKER = """
import random, sys, time
from moenas.evaluate.device_lock import DeviceLock

role, steps = sys.argv[1], int(sys.argv[2])
enter = getattr(DeviceLock("cpu"), role)
print("ready", flush=True)
sys.stdin.readline()
rows = []
for _ in range(steps):
    with enter():
        began = time.monotonic_ns()
        if steps == 1:
            print("inside", flush=True)
            sys.stdin.readline()
        time.sleep(random.uniform(0.005, 0.015))
        rows.append(f"{began} {time.monotonic_ns()}")
print(*rows, "done", sep="\\n", flush=True)
"""

Start = Callable[[str, int], "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the lease files of this test alone."""
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return lock_folders()[0]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes that hold the lease of this test; they go on when they read a line."""
    running: list[subprocess.Popen[str]] = []

    def begin(role: str, steps: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, role, str(steps)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, bufsize=1, **pipes)  # type: ignore[call-overload]
        running.append(process)
        return process  # type: ignore[no-any-return]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], word: str) -> None:
    """Wait until a process says a word, then let it go on."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline().strip() == word
    process.stdin.write("\n")
    process.stdin.flush()


def is_free(folder: Path, name: str, how: int) -> bool:
    """Whether a lock could be taken now."""
    handle = os.open(folder / name, os.O_RDWR)
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def test_no_step_of_four_trainers_runs_while_a_timer_has_the_device(
    start: Start,
) -> None:
    trainers = [start("shared", 100) for _ in range(4)]
    timed, waited = [], []
    for trainer in trainers:
        tell(trainer, "ready")
    with closing(DeviceLock("cpu")) as lease:
        for _ in range(8):
            asked = time.monotonic_ns()
            with lease.exclusive():
                began = time.monotonic_ns()
                time.sleep(0.005)
                timed.append((began, time.monotonic_ns()))
            waited.append((asked, began))
    steps: list[tuple[int, int]] = []
    for trainer in trainers:
        said = trainer.communicate()[0].split("\n")
        assert said[-2] == "done"
        rows = [line.split() for line in said[:-2]]
        steps += [(int(began), int(ended)) for began, ended in rows]
    assert len(steps) == 400
    assert any(timed[0][1] < began < timed[-1][0] for began, _ in steps)
    for began, ended in timed:
        assert all(step_end < began or step_start > ended for step_start, step_end in steps)
    # Not starved: the steps of four busy trainers overlap nearly always, so without the gate
    # the timer gets in after most of the 400, or when they are done.
    passed = [sum(asked < s < began for s, _ in steps) for asked, began in waited]
    assert max(passed) < 80


@pytest.mark.parametrize("role", ["shared", "exclusive"])
def test_a_killed_process_lets_go(start: Start, folder: Path, role: str) -> None:
    process = start(role, 1)
    tell(process, "ready")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "inside"
    assert not is_free(folder, "cpu.main", fcntl.LOCK_EX)
    assert is_free(folder, "cpu.main", fcntl.LOCK_SH) == (role == "shared")
    assert is_free(folder, "cpu.gate", fcntl.LOCK_EX) == (role == "shared")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with closing(DeviceLock("cpu")) as lease:
        with lease.exclusive():
            assert not is_free(folder, "cpu.main", fcntl.LOCK_SH)
        with lease.shared():
            assert is_free(folder, "cpu.main", fcntl.LOCK_SH)
            assert not is_free(folder, "cpu.main", fcntl.LOCK_EX)


@pytest.mark.parametrize("role", ["shared", "exclusive"])
def test_an_error_inside_lets_go(folder: Path, role: str) -> None:
    with closing(DeviceLock("cpu")) as lease:
        with pytest.raises(ZeroDivisionError), getattr(lease, role)():
            raise ZeroDivisionError
        assert is_free(folder, "cpu.main", fcntl.LOCK_EX)
        assert is_free(folder, "cpu.gate", fcntl.LOCK_EX)


@pytest.mark.parametrize("role", ["shared", "exclusive"])
def test_the_device_is_synchronized_before_others_use_it(folder: Path, role: str) -> None:
    seen = []

    def synchronize() -> None:
        seen.append(is_free(folder, "cuda-1.main", fcntl.LOCK_EX))

    with closing(DeviceLock("cuda:1", synchronize)) as lease:
        with getattr(lease, role)():
            assert seen == []
        assert seen == [False]


def test_the_lease_files_are_of_this_user_alone(folder: Path) -> None:
    DeviceLock("cpu").close()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def a_file(folder: Path) -> None:
    folder.touch()


def a_link(folder: Path) -> None:
    folder.symlink_to("/tmp")


def of_another_user(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


def with_a_link_in_it(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "cpu.main").symlink_to("/tmp/elsewhere")


@pytest.mark.parametrize("take", [open_to_all, a_file, a_link, of_another_user, with_a_link_in_it])
def test_a_folder_that_others_took_is_passed_over(take: Callable[[Path], None]) -> None:
    if take is of_another_user and os.geteuid():
        pytest.skip("only root can give a folder away")
    first, second, third = lock_folders()
    take(first)
    with closing(DeviceLock("cpu")) as lease, lease.exclusive():
        assert not is_free(second, "cpu.main", fcntl.LOCK_SH)
    shutil.rmtree(second)
    take(second)
    with closing(DeviceLock("cpu")) as lease, lease.exclusive():
        assert not is_free(third, "cpu.main", fcntl.LOCK_SH)
    shutil.rmtree(third)
    take(third)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineError, match="no folder for the locks of devices") as error:
        DeviceLock("cpu")
    assert all(str(folder) in str(error.value) for folder in (first, second, third))
    assert len(os.listdir("/proc/self/fd")) == before
