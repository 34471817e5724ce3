"""One process works on many candidates: they get the numbers that a fresh one gives each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import test_pool
import torch
from jobs import PLAIN, MakeJob, without_times
from test_pool import job, pids, runs, wait, wait_until

from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Failure, Job
from moenas.space.sections import Search
from moenas.workers import ray_pool, ray_processes
from moenas.workers.pool import Pool, Result, open_pool

pytestmark = pytest.mark.integration

MANY = Search(candidates_per_worker=4)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Pool]:
    """A pool of fresh processes, whose cluster the others share."""
    pytest.importorskip("ray")
    from ray import cloudpickle

    for module in (test_pool, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    pool = open_pool(2, Search(), evaluate=test_pool.evaluate)
    yield pool
    pool.close()


@pytest.fixture
def kept(cluster: Pool) -> Iterator[Pool]:
    """A pool of one process that works on up to four candidates."""
    pool = open_pool(1, MANY, evaluate=test_pool.evaluate)
    yield pool
    pool.close()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "MIN_GRACE", 0.5)


def worked(pool: Pool, *jobs: Job) -> list[Evaluation | Failure]:
    """The outcomes of jobs, one after another."""
    outcomes = []
    for one in jobs:
        pool.submit(one)
        outcomes += [result.outcome for result in wait(pool)]
    return outcomes


def pid(outcome: Evaluation | Failure) -> int:
    assert isinstance(outcome, Evaluation)
    return int(outcome.values["pid"])


def test_a_process_works_on_its_number_of_candidates(kept: Pool) -> None:
    pids = [pid(outcome) for outcome in worked(kept, *(job(i, "fine") for i in range(6)))]
    assert pids == [pids[0]] * 4 + [pids[4]] * 2
    assert pids[0] != pids[4]
    wait_until(lambda: kept.wait(0.1) == [] and not runs(pids[0]))
    assert runs(pids[4])
    kept.close()
    wait_until(lambda: not runs(pids[4]))


@pytest.mark.parametrize(
    ("how", "kind", "stays"),
    [
        pytest.param("raise", "error", True, marks=pytest.mark.slow),
        ("sys.exit", "error", True),
        pytest.param("interrupt", "error", True, marks=pytest.mark.slow),
        pytest.param("unsendable", "error", True, marks=pytest.mark.slow),
        pytest.param("nothing", "invalid", True, marks=pytest.mark.slow),
        ("child", None, True),
        pytest.param("memory", "out_of_memory", True, marks=pytest.mark.slow),
        ("gpu", "error", False),
        pytest.param("full", "environment", False, marks=pytest.mark.slow),
        pytest.param("thread", None, False, marks=pytest.mark.slow),
        pytest.param("killed", "crashed", False, marks=pytest.mark.slow),
        ("exit", "crashed", False),
        pytest.param("sleep", "timeout", False, marks=pytest.mark.slow),
        ("hang", "timeout", False),
    ],
)
def test_a_candidate_costs_one_process_at_most_and_no_other_candidate(
    kept: Pool, how: str, kind: str | None, stays: bool, short_grace: None, tmp_path: Path
) -> None:
    limit = 0.5 if kind == "timeout" else None
    bad = job(2, how, time_limit_s=limit, folder=str(tmp_path))
    first, middle, last = worked(kept, job(1, "fine"), bad, job(3, "fine"))
    assert (middle.kind if isinstance(middle, Failure) else None) == kind
    assert (pid(first) == pid(last)) == stays
    others = [p for p in pids(tmp_path) if p != pid(last)]
    wait_until(lambda: kept.wait(0.1) == [] and not any(runs(p) for p in others))


def test_what_is_printed_is_told_of_its_candidate(
    kept: Pool, capfd: pytest.CaptureFixture[str]
) -> None:
    worked(kept, job(1, "fine"), job(2, "print"), job(3, "fine"))
    caught = capfd.readouterr()
    assert caught.out == ""
    assert caught.err == "trial 2: hello from the objective\n"


def test_a_process_that_dies_without_a_job_costs_nothing(kept: Pool) -> None:
    [first] = worked(kept, job(1, "fine"))
    psutil.Process(pid(first)).kill()
    wait_until(lambda: not runs(pid(first)))
    [second] = worked(kept, job(2, "fine"))
    assert pid(second) != pid(first)


def test_a_process_without_a_job_ends_after_a_while(
    kept: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first] = worked(kept, job(1, "fine"))
    monkeypatch.setattr(ray_processes, "IDLE_S", 0.5)
    wait_until(lambda: kept.wait(0.1) == [] and not runs(pid(first)))


def test_a_process_of_a_full_cluster_ends_after_its_turn(
    kept: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_is_full", lambda: True)
    first, second = worked(kept, job(1, "fine"), job(2, "fine"))
    assert pid(first) == pid(second)
    monkeypatch.setattr(ray_processes, "TURN_S", 0.0)
    third, fourth = worked(kept, job(3, "fine"), job(4, "fine"))
    assert pid(third) == pid(first)
    assert pid(fourth) != pid(third)


CHANGES = '''"""An objective that changes its process, and says what it found there."""
import os, random, sys, threading, warnings
import numpy, torch

direction = "minimize"
unit = "1"
needs = "model"


def measure(subject):
    changes = [torch.get_default_dtype() == torch.float64, "CHANGED" in os.environ,
               torch.are_deterministic_algorithms_enabled(), os.getcwd() == "/",
               torch.get_num_threads() == 3, not torch.is_grad_enabled(), "/changed" in sys.path]
    torch.set_default_dtype(torch.float64)
    os.environ["CHANGED"] = "1"
    torch.use_deterministic_algorithms(True)
    os.chdir("/")
    torch.set_num_threads(3)
    torch.set_grad_enabled(False)
    sys.path.append("/changed")
    for module in (torch, random):
        module.manual_seed(1) if module is torch else module.seed(1)
    print("changed")
    return float(sum(changes))
'''


def same_weights(one: Result, other: Result) -> bool:
    """Whether two results have equal weights, to the last bit."""
    pair = []
    for result in (one, other):
        assert isinstance(result.weights, bytes)
        pair.append(safetensors.torch.load(result.weights))
    first, second = pair
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_candidates_of_one_process_have_the_numbers_of_fresh_ones(
    cluster: Pool,
    make_job: MakeJob,
) -> None:
    """To the last bit, weights too; one that changes its process changes no other."""
    wider = Architecture.parse({**PLAIN, "d_model": 24}).canonical().plain()
    objectives = ("val_loss", "peak_memory", "flops_per_token")
    jobs = [
        make_job(*objectives, trial=1),
        make_job("val_loss", guests={"changes": CHANGES}, trial=2),
        make_job(*objectives, trial=3, architecture=wider, seed=1),
        make_job("val_loss", guests={"changes": CHANGES}, trial=4),
        make_job(*objectives, trial=1),
    ]
    results = {}
    for count in (1, 10):
        pool = open_pool(1, Search(candidates_per_worker=count))
        try:
            results[count] = []
            for one in jobs:
                pool.submit(one)
                results[count] += wait(pool)
        finally:
            pool.close()
    for fresh, kept, one in zip(results[1], results[10], jobs, strict=True):
        assert isinstance(fresh.outcome, Evaluation)
        assert isinstance(kept.outcome, Evaluation)
        assert fresh.outcome.failure is None
        assert without_times(kept.outcome) == without_times(fresh.outcome)
        assert same_weights(kept, fresh)
        if "changes" in one.objectives:
            assert kept.outcome.values["changes"] == 0.0
    assert same_weights(results[10][0], results[10][4])


GPUS = """
import sys
sys.path.insert(0, {folder!r})
import ray, test_pool as t
from ray import cloudpickle
cloudpickle.register_pickle_by_value(t)
ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
for workers in (None, 2):
    pool = t.open_pool(workers, t.Search(), evaluate=t.evaluate)
    print(pool.device, pool.capacity, pool.sharers)
    for trial in range(pool.capacity):
        pool.submit(t.job(trial, "fine"))
    for result in t.wait(pool, pool.capacity):
        print(result.outcome.kind, result.outcome.message.partition("CUDA_VISIBLE_DEVICES")[2])
    pool.close()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs here are pretended ones")
@pytest.mark.slow
def test_all_gpus_of_a_host_are_used_and_shared() -> None:
    """Ray is told of two GPUs; each process says which one it was given, and that it is not there."""
    folder = str(Path(__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(Path(folder).parent), "RAY_TMPDIR": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", GPUS.format(folder=folder)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    on_one, on_other = "environment ='0')", "environment ='1')"
    wanted = [
        *("cuda 4 2", *[on_one] * 2, *[on_other] * 2),
        *("cuda 2 1", on_one, on_other),
    ]
    assert sorted(done.stdout.splitlines()) == sorted(wanted), done.stderr


def gpus_of(job: Job) -> tuple[Evaluation, None]:
    """Say which GPUs the process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    values = {"pid": float(seen == "")}
    return Evaluation(job.study, job.trial, job.attempt, "complete", "", values=values), None


@pytest.mark.parametrize("count", [1, 4])
def test_a_candidate_on_the_cpu_sees_no_gpu(
    cluster: Pool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = open_pool(1, Search(candidates_per_worker=count), evaluate=gpus_of)
    assert pool.device == "cpu"
    [outcomes] = worked(pool, job(1, "fine"))
    pool.close()
    assert isinstance(outcomes, Evaluation)
    assert outcomes.values == {"pid": 1.0}
