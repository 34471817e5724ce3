"""Jobs come back whatever happens to the process that works on them; a killed one is gone."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from moenas.errors import EnvironmentFaultError, InputError, StorageLostError
from moenas.records import Evaluation, Failure, Job
from moenas.space.sections import Search
from moenas.workers import ray_cluster, ray_pool
from moenas.workers.pool import Inline, Pool, Result, open_pool

pytestmark = pytest.mark.integration


class Unsendable(Exception):
    """An exception that cannot be rebuilt from its arguments in another process."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


ENDS = {
    "raise": "ValueError: the reason",
    "sys.exit": "SystemExit: 0",
    "interrupt": "KeyboardInterrupt",
    "generator": "GeneratorExit",
}
"""What a candidate raises, and how its failure begins."""
NO_EVALUATION = {
    "nothing": "not an evaluation but None",
    "another trial": "trial is 99",
    "a text": "give back a number",
    "unknown": "'other' is no objective",
    "missing": "without a value of pid",
    "weights": "weights are a str",
    "digest": "not those whose digest",
}
"""What a candidate gives back, and what its failure says."""


def other_things(how: str, evaluation: Evaluation) -> Any:
    """What is no evaluation."""
    changes: dict[str, dict[str, Any]] = {
        "another trial": {"trial": 99},
        "a text": {"values": {"pid": "fast"}},
        "unknown": {"values": {"pid": 1.0, "other": 1.0}},
        "missing": {"values": {}},
        "digest": {"weights_sha256": "0" * 64},
    }
    if how == "nothing":
        return None, None
    return replace(
        evaluation, **changes.get(how, {})
    ), "weights" if how == "weights" else b"weights"


def evaluate(job: Job) -> tuple[Evaluation, bytes | None]:
    """A stand-in for an evaluation: it does what the job's architecture says."""
    how = job.architecture["how"]
    if folder := job.architecture.get("folder"):
        Path(folder, str(os.getpid())).touch()
    if how == "raise":
        raise ValueError("the reason\nand more")
    if how == "sys.exit":
        sys.exit(0)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "generator":
        raise GeneratorExit
    if how == "print":
        print("hello from the objective")
        subprocess.run(["echo", "hello from a child"], check=True)
    if how == "thread":  # one that Python waits for at its end
        threading.Thread(target=time.sleep, args=(600,)).start()
    if how in ("child", "child of a crash"):
        command = f"touch {folder}/$$; exec sleep 600"
        subprocess.Popen(["setsid", "sh", "-c", command])
        fork_twice(str(folder))
        while len(os.listdir(str(folder))) < 3:
            time.sleep(0.01)
    if how == "child of a crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")
    if how == "long":
        raise ValueError("\x1b[31m" + "x" * 50_000_000)
    if how == "memory":
        raise RuntimeError("CUDA error: out of memory")
    if how == "gpu":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if how == "unsendable":
        raise Unsendable("a", "b")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "sleep":
        time.sleep(600)
    if how == "hang":
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock, like a hung C extension
    values = {"pid": float(os.getpid())}
    evaluation = Evaluation(job.study, job.trial, job.attempt, "complete", "", values=values)
    return other_things(how, evaluation)  # type: ignore[no-any-return]


def fork_twice(folder: str) -> None:
    """Leave a process with a session of its own, as a daemon does."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(folder, str(os.getpid())).touch()
            time.sleep(600)
        os._exit(0)


def job(trial: int, how: str, time_limit_s: float | None = None, **more: Any) -> Job:
    return Job(
        study="s",
        trial=trial,
        attempt=1,
        architecture={"how": how, **more},
        objectives={"pid": None},
        data={},
        data_sha256="",
        train={},
        measure={},
        seed=0,
        time_limit_s=time_limit_s,
    )


def wait(pool: Pool, n: int = 1) -> list[Result]:
    """The next n results, by trial."""
    results: list[Result] = []
    end = time.monotonic() + 120
    while len(results) < n and time.monotonic() < end:
        results += pool.wait(5.0)
    assert len(results) == n
    return sorted(results, key=lambda result: result.job.trial)


def pids(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- in this process ---------------------------------------------------------------------------


def test_inline_gives_results_one_by_one() -> None:
    pool = Inline(evaluate)
    assert pool.capacity == 1
    assert pool.wait(0.0) == []
    pool.submit(job(1, "fine"))
    pool.submit(job(2, "raise"))
    [first], [second] = pool.wait(0.0), pool.wait(0.0)
    assert isinstance(first.outcome, Evaluation)
    assert first.weights == b"weights"
    assert isinstance(second.outcome, Failure)
    assert (second.outcome.kind, second.outcome.message) == ("error", "ValueError: the reason")
    assert "in evaluate" in second.outcome.traceback


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("swallows", [False, True])
def test_inline_lets_an_interrupt_through(
    number: int, swallows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: Job) -> tuple[Evaluation, bytes | None]:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if not swallows:
                raise
        return evaluate(job)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        pool = open_pool("inline", Search(), evaluate=interrupted)
        pool.submit(job(1, "fine"))
        with pytest.raises(KeyboardInterrupt):
            pool.wait(1.0)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("how", ENDS)
def test_inline_takes_whatever_a_candidate_raises_for_its_failure(how: str) -> None:
    pool = Inline(evaluate)
    pool.submit(job(1, how))
    [result] = pool.wait(0.0)
    assert isinstance(result.outcome, Failure)
    assert result.outcome.kind == "error"
    assert result.outcome.message.startswith(ENDS[how])


def test_inline_prints_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    pool = Inline(evaluate)
    pool.submit(job(1, "print"))
    pool.wait(0.0)
    print("data")
    caught = capfd.readouterr()
    assert caught.out == "data\n"
    assert "hello from the objective" in caught.err
    assert "hello from a child" in caught.err


@pytest.mark.parametrize("how", NO_EVALUATION)
def test_inline_takes_no_other_thing_for_an_evaluation(how: str) -> None:
    pool = Inline(evaluate)
    pool.submit(job(1, how))
    [result] = pool.wait(0.0)
    assert isinstance(result.outcome, Failure)
    assert result.outcome.kind == "invalid"
    assert NO_EVALUATION[how] in result.outcome.message
    assert result.weights is None


def test_inline_does_not_evaluate_on_a_cpu_what_asks_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match=r"search\.gpus: a candidate asks for 1 GPU"):
        open_pool("inline", Search(gpus=1.0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let this process seem to see a GPU; what is in the list is wrong with it."""
    wrong: list[str] = []

    def synchronize(device: object) -> None:
        if wrong:
            raise torch.AcceleratorError(wrong[0])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return wrong


@pytest.mark.parametrize(
    ("gpus", "device"), [(None, "cuda"), (0.0, "cpu"), (0.25, "cuda"), (1.0, "cuda")]
)
def test_inline_evaluates_on_the_gpu_that_there_is(
    gpu: list[str], gpus: float | None, device: str
) -> None:
    pool = open_pool("inline", Search(gpus=gpus), evaluate=evaluate)
    assert (pool.device, pool.capacity, pool.sharers) == (device, 1, 1)


def test_inline_is_on_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_pool("inline", Search(), evaluate=evaluate).device == "cpu"


def test_inline_begins_nothing_on_a_gpu_that_is_lost(gpu: list[str]) -> None:
    pool = open_pool("inline", Search(), evaluate=evaluate)
    on_gpu = [replace(job(trial, "fine"), device="cuda") for trial in range(3)]
    pool.submit(on_gpu[0])
    assert isinstance(pool.wait(0.0)[0].outcome, Evaluation)
    pool.submit(on_gpu[1])
    gpu.append("CUDA error: device-side assert triggered")
    assert isinstance(pool.wait(0.0)[0].outcome, Evaluation)
    with pytest.raises(EnvironmentFaultError, match="trial 1 ended with an error of CUDA: ") as e:
        pool.submit(on_gpu[2])
    assert "device-side assert triggered; this process cannot use its GPU" in str(e.value)
    assert e.value.exit_code == 4
    assert pool.wait(0.0) == []


@pytest.mark.parametrize("workers", ["inline", 1])
def test_more_than_one_gpu_for_a_candidate_is_refused(workers: Any) -> None:
    with pytest.raises(InputError, match="2 GPUs; one candidate is trained on one GPU at most"):
        open_pool(workers, Search(gpus=2.0), evaluate=evaluate)


# --- on Ray: one cluster for all ---------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    ray = pytest.importorskip("ray")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    pool = open_pool(2, Search(), evaluate=evaluate)
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGTERM) == handler
    folder = Path(head().environment["RAY_AUTH_TOKEN_PATH"]).parent
    top = psutil.Process(head()._process.pid)
    processes = [top, *top.children(recursive=True)]
    assert len(processes) > 4
    yield pool
    pool.close()
    assert not ray.is_initialized()
    assert not folder.exists()
    assert not [p for p in processes if p.is_running() and runs(p.pid)]


def test_ray_works_side_by_side_in_fresh_processes(pool: Pool) -> None:
    assert pool.capacity == 2
    for trial in range(4):
        pool.submit(job(trial, "fine"))
    results = wait(pool, 4)
    assert [r.weights for r in results] == [b"weights"] * 4
    outcomes = [r.outcome for r in results]
    used = {o.values["pid"] for o in outcomes if isinstance(o, Evaluation)}
    assert len(used) == 4
    assert os.getpid() not in used
    wait_until(lambda: not any(runs(int(pid)) for pid in used))


def test_ray_says_how_a_job_ended(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    for trial, how in enumerate(["raise", "unsendable", "killed", "exit"]):
        pool.submit(job(trial, how))
    outcomes = [r.outcome for r in wait(pool, 4)]
    assert all(isinstance(o, Failure) for o in outcomes)
    assert [o.kind for o in outcomes] == ["error", "error", "crashed", "crashed"]  # type: ignore[union-attr]
    first = outcomes[0]
    assert isinstance(first, Failure)
    assert first.message == "ValueError: the reason"
    assert "in evaluate" in first.traceback
    assert "\x1b" not in first.traceback
    time.sleep(1.0)  # Ray would print the dead workers a moment later
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("how", ["sleep", "hang"])
def test_a_job_past_its_time_limit_is_killed(
    pool: Pool, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "MIN_GRACE", 0.5)
    pool.submit(job(1, how, time_limit_s=0.5, folder=str(tmp_path)))
    [result] = wait(pool)
    assert isinstance(result.outcome, Failure)
    assert result.outcome.kind == "timeout"
    [pid] = pids(tmp_path)
    wait_until(lambda: not runs(pid))
    pool.submit(job(2, "fine"))
    [after] = wait(pool)
    assert isinstance(after.outcome, Evaluation)


def test_closing_kills_what_runs(pool: Pool, tmp_path: Path) -> None:
    """A second pool shares the cluster that this process has, and leaves it to the first."""
    other = open_pool(1, Search(), evaluate=evaluate)
    other.submit(job(1, "sleep", folder=str(tmp_path)))
    while not pids(tmp_path):
        assert other.wait(0.1) == []
    [pid] = pids(tmp_path)
    other.close()
    wait_until(lambda: not runs(pid))
    pool.submit(job(2, "fine"))
    assert isinstance(wait(pool)[0].outcome, Evaluation)


def test_what_no_machine_has_is_refused(pool: Pool) -> None:
    with pytest.raises(InputError, match=r"search\.gpus: a candidate asks for 64 GPU"):
        open_pool(1, Search(gpus=64.0), evaluate=evaluate)
    with pytest.raises(InputError, match=r"search\.cpus: a candidate asks for 5000 cores"):
        open_pool(None, Search(cpus=5000.0), evaluate=evaluate)


@pytest.mark.parametrize("how", ["thread", "child", "child of a crash"])
def test_nothing_that_a_job_started_outlives_it(pool: Pool, how: str, tmp_path: Path) -> None:
    pool.submit(job(1, how, folder=str(tmp_path)))
    [result] = wait(pool)
    crashed = isinstance(result.outcome, Failure) and result.outcome.kind == "crashed"
    assert crashed == (how == "child of a crash")
    started = pids(tmp_path)
    assert len(started) == (1 if how == "thread" else 3)
    wait_until(lambda: pool.wait(0.1) == [] and not any(runs(pid) for pid in started))


def test_ray_tells_what_a_job_raises_prints_and_sends(
    pool: Pool, capfd: pytest.CaptureFixture[str]
) -> None:
    hows = ["sys.exit", "interrupt", "generator", "print", "full", "long", *NO_EVALUATION]
    outcomes = {}
    for how in hows:
        pool.submit(job(1, how))
        [outcomes[how]] = [result.outcome for result in wait(pool)]
    for how, outcome in outcomes.items():
        if how == "print":
            assert isinstance(outcome, Evaluation)
            continue
        assert isinstance(outcome, Failure)
        kind = {"full": "environment"}.get(how, "invalid" if how in NO_EVALUATION else "error")
        assert outcome.kind == kind, outcome
        assert {**ENDS, **NO_EVALUATION}.get(how, "") in outcome.message
        assert len(outcome.message) <= 4096
        assert len(outcome.traceback) <= 32 * 1024
        assert "\x1b" not in outcome.message + outcome.traceback
    caught = capfd.readouterr()
    assert caught.out == ""
    assert "trial 1: hello from the objective" in caught.err


def test_a_stopped_worker_is_killed_at_its_time_limit(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "MIN_GRACE", 0.5)
    pool.submit(job(1, "sleep", time_limit_s=4.0, folder=str(tmp_path)))
    # A worker that is stopped before the pool has heard of it counts as one that never began.
    while not pids(tmp_path) or pool._tasks[0].pid is None:  # type: ignore[attr-defined]
        assert pool.wait(0.1) == []
    [pid] = pids(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    [result] = wait(pool)
    assert isinstance(result.outcome, Failure)
    assert result.outcome.kind == "timeout"
    assert not runs(pid)
    assert pool.capacity == 2


def test_a_worker_that_is_stopped_before_its_job_begins_is_killed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "STOPPED_S", 1.0)
    raylet = psutil.Process(head().pids["raylet"])
    pool.submit(job(1, "fine"))
    stopped = {p.pid for p in raylet.children() if p.name().startswith("ray::_work")}
    while not stopped:  # one that waits for a job, too
        for process in raylet.children():
            if process.name().startswith(("ray::IDLE", "ray::_work")):
                os.kill(process.pid, signal.SIGSTOP)
                stopped.add(process.pid)
    [result] = wait(pool)
    if isinstance(result.outcome, Failure):  # else another worker had it already
        assert result.outcome.kind == "environment"
    for pid in stopped:
        os.kill(pid, signal.SIGCONT) if runs(pid) else None
    pool.submit(job(2, "fine"))
    assert isinstance(wait(pool)[0].outcome, Evaluation)


def test_a_process_that_cannot_be_killed_takes_its_slot_with_it(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a process is in the D state; here neither moenas nor Ray sends SIGKILL."""
    monkeypatch.setattr(ray_pool, "MIN_GRACE", 0.5)
    monkeypatch.setattr(ray_pool, "DIE_S", 0.5)
    monkeypatch.setattr(ray_pool, "kill", lambda pid: None)
    monkeypatch.setattr(ray_pool, "STOPPED_S", 600.0)
    monkeypatch.setattr(type(pool._processes), "stop", lambda self, stream, process: None)  # type: ignore[attr-defined]
    stopped = set[int]()
    for trial in (1, 2):
        pool.submit(job(trial, "hang", time_limit_s=2.0, folder=str(tmp_path)))
        # The pool knows the process, however slow the machine is.
        while len(pids(tmp_path)) < trial or pool._tasks[0].pid is None:  # type: ignore[attr-defined]
            assert pool.wait(0.05) == []
        [newest] = set(pids(tmp_path)) - stopped
        os.kill(newest, signal.SIGSTOP)
        stopped.add(newest)
        assert [r.outcome.kind for r in wait(pool)] == ["timeout"]  # type: ignore[union-attr]
        assert pool.capacity == 1
    with pytest.raises(StorageLostError, match="no worker process is left"):
        pool.submit(job(3, "fine"))
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pool.capacity == 2)
    pool.submit(job(4, "fine"))
    assert isinstance(wait(pool)[0].outcome, Evaluation)


def test_a_job_that_is_never_begun_is_a_fault_of_the_machine(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in (1, 2):  # two processes that stand ready, however slow the machine is
        pool.submit(job(trial, "fine"))
    assert all(isinstance(r.outcome, Evaluation) for r in wait(pool, 2))
    monkeypatch.setattr(ray_pool, "START_S", 4.0)
    monkeypatch.setattr(ray_pool, "MIN_GRACE", 0.5)
    for trial in range(3):  # one more than there is room for
        pool.submit(job(trial, "sleep", time_limit_s=9.0))
    *late, never = sorted((r.outcome for r in wait(pool, 3)), key=lambda o: o.kind, reverse=True)  # type: ignore[union-attr]
    assert [o.kind for o in late] == ["timeout", "timeout"]  # type: ignore[union-attr]
    assert isinstance(never, Failure)
    assert never.kind == "environment"
    assert "began the job within" in never.message


def head() -> ray_cluster.Head:
    assert ray_cluster._shared is not None
    assert ray_cluster._shared.head is not None
    return ray_cluster._shared.head


def test_the_token_is_private(pool: Pool) -> None:
    token = Path(head().environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    folder = token.parent
    assert folder.stat().st_mode & 0o777 == 0o700


def test_every_port_is_of_the_loopback(pool: Pool) -> None:
    own = psutil.Process()
    listening = []
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # a worker that has just ended
            connections = process.net_connections("inet")
            listening += [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.slow
def test_a_stranger_without_the_token_is_turned_away(pool: Pool) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    script = f"import ray; ray.init(address={address!r}, log_to_driver=False)"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean, capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    assert "Authentication" in done.stderr


@pytest.mark.slow  # test_ray_cluster kills a driver in a job, too
def test_a_killed_driver_leaves_no_worker(tmp_path: Path) -> None:
    """Nor does the next one find its folder."""
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import test_pool as t
from ray import cloudpickle
cloudpickle.register_pickle_by_value(t)
pool = t.open_pool(1, t.Search(), evaluate=t.evaluate)
pool.submit(t.job(1, "sleep", folder={str(tmp_path)!r}))
while True:
    pool.wait(1.0)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    driver = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_until(lambda: pids(tmp_path) or driver.poll() is not None)
        [pid] = pids(tmp_path)
        assert runs(pid)
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not runs(pid))
