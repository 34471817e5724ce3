"""A cluster of our own ends with its run, whatever happens to either; its loss is noticed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moenas.errors import InputError, StorageLostError
from moenas.processes import descendants, state
from moenas.space.sections import Search
from moenas.workers import ray_cluster
from moenas.workers.pool import Pool, open_pool

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool() -> Iterator[Pool]:
    pytest.importorskip("ray")
    import test_pool
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(test_pool)  # type: ignore[no-untyped-call]
    pool = open_pool(1, Search(), evaluate=test_pool.evaluate)
    yield pool
    pool.close()


def head() -> ray_cluster.Head:
    assert ray_cluster._shared is not None
    assert ray_cluster._shared.head is not None
    return ray_cluster._shared.head


def kill(name: str) -> Callable[[], None]:
    return lambda: os.kill(head().pids[name], signal.SIGKILL)


def stop(name: str) -> Callable[[], None]:
    return lambda: os.kill(head().pids[name], signal.SIGSTOP)


def kill_head() -> None:
    os.kill(head()._process.pid, signal.SIGKILL)


def remove_folder() -> None:
    shutil.rmtree(head()._folder)


LOSSES = {
    "raylet killed": (kill("raylet"), "raylet .* died"),
    "gcs killed": (kill("gcs_server"), "gcs_server .* died"),
    "raylet stopped": (stop("raylet"), "raylet .* has been stopped"),
    "head killed": (kill_head, "died"),
    "folder removed": (remove_folder, "was removed"),
}


def wait_for_a_result(pool: Pool) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert pool.wait(1.0) == []


FAST = ("raylet killed", "folder removed")


@pytest.mark.parametrize(
    "loss",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES],
)
def test_a_lost_cluster_is_told_and_leaves_nothing(
    pool: Pool, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_pool import job

    monkeypatch.setattr(ray_cluster, "STOPPED_S", 2.0)
    lose, words = LOSSES[loss]
    top = head()._process.pid
    processes = [p for p in [top, *descendants(top)] if state(p)]
    folder = head()._folder
    pool.submit(job(1, "sleep"))
    assert pool.wait(1.0) == []
    lose()
    began = time.monotonic()
    with pytest.raises(StorageLostError, match=f"the Ray cluster went away: .*{words}"):
        wait_for_a_result(pool)
    assert time.monotonic() - began < 15
    with pytest.raises(StorageLostError):
        pool.submit(job(2, "fine"))
    with pytest.raises(StorageLostError):
        open_pool(1, Search(), evaluate=lambda job: None)  # type: ignore[arg-type, return-value]
    pool.close()
    assert time.monotonic() - began < 40
    assert not folder.exists()
    assert not [pid for pid in processes if state(pid)]


def test_a_process_has_one_connection(pool: Pool) -> None:
    with pytest.raises(InputError, match="this process is connected to a Ray cluster of its own"):
        open_pool(1, Search(), address="127.0.0.1:6399")
    other = open_pool(1, Search(), address="")
    pool.close()
    assert head().trouble() is None
    other.close()
    assert ray_cluster._shared is None


DRIVER = """
import sys
sys.path[:0] = {tests!r}
import test_pool as t
from ray import cloudpickle
cloudpickle.register_pickle_by_value(t)
pool = t.open_pool(1, t.Search(), evaluate=t.evaluate)
pool.submit(t.job(1, "child", folder={folder!r}))
print(t.head()._folder, flush=True)
while True:
    pool.wait(1.0)
"""


@pytest.mark.parametrize("moment", ["while Ray starts", "in a job"])
def test_nothing_outlives_a_killed_driver(tmp_path: Path, moment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": "/tmp"}
    script = DRIVER.format(
        tests=[str(ROOT / "tests" / "workers"), str(ROOT / "tests")], folder=str(tmp_path)
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 60
        assert driver.stdout is not None
        if moment == "in a job":
            folder = Path(driver.stdout.readline().strip())
            assert folder.is_dir()
            while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < end:
                time.sleep(0.1)
        else:
            while len(descendants(driver.pid)) < 3 and time.monotonic() < end:
                time.sleep(0.02)
        below = descendants(driver.pid)
        assert len(below) >= (6 if moment == "in a job" else 3)
    finally:
        driver.kill()
        driver.communicate()
    end = time.monotonic() + 15
    while any(state(pid) for pid in below):
        assert time.monotonic() < end
        time.sleep(0.05)
    if moment == "in a job":
        while folder.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
