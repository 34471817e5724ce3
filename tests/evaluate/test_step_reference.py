"""Steps of a candidate beside steps of the reference model: what a load of the machine changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import RECIPE, MakeJob, job_maker

from moenas.evaluate.devices import device_name
from moenas.evaluate.job import evaluate
from moenas.evaluate.latency import device_lock
from moenas.evaluate.step_reference import reference_key, reference_steps, time_reference
from moenas.evaluate.timing import Pairs
from moenas.records import Job
from moenas.space.sections import Budget

CPU = torch.device("cpu")
HERE = device_name(CPU)
FIXED_MS = 30.0


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJob:
    monkeypatch.setattr("moenas.evaluate.step_time.SAMPLE_SECONDS", 0.0)  # a sample is one step
    return job_maker(tmp_path, monkeypatch)


class MadeUpClock:
    """Times of a machine: steps of 2 ms of CPU time that other work makes longer."""

    def __init__(self, load: Callable[[int], float], *, spins: bool = False) -> None:
        self._load, self._spins, self._samples = load, spins, 0

    def sample(self, run: Callable[[], object], runs: int) -> tuple[float, float]:
        run()
        self._samples += 1
        wall = 0.002 * self._load(self._samples)
        return wall, wall * 1.7 if self._spins else 0.002


def timed_job(job: MakeJob, threads: int = 1, seconds: float = 0.2) -> Job:
    recipe = replace(RECIPE, budget=Budget(seconds=seconds, device=HERE), threads=threads)
    made = job("val_loss", train=recipe.plain())
    key = reference_key(recipe, CPU)
    assert key is not None
    return replace(made, reference_ms={key: FIXED_MS})


@pytest.mark.parametrize("threads", [1, 2])
def test_the_tokens_of_a_candidate_are_the_same_on_a_busy_machine(
    job: MakeJob, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """One thread waits for its core; two spin, and the load moves both sides of a pair."""

    def metrics(load: Callable[[int], float]) -> dict[str, float]:
        clock = MadeUpClock(load, spins=threads > 1)
        monkeypatch.setattr("moenas.evaluate.step_time.WallClock", lambda device: clock)
        evaluation, _ = evaluate(timed_job(job, threads))
        assert evaluation.status == "complete", evaluation.failure
        kept = ("train_tokens", "step_ms", "step_spread")
        return {name: evaluation.metrics[name] for name in kept}

    idle = metrics(lambda n: 1.0)
    assert metrics(lambda n: 7.0) == pytest.approx(idle, rel=0.01)
    assert idle["step_spread"] == pytest.approx(0.0, abs=1e-9)
    if threads == 1:
        assert metrics(lambda n: 1.0 + n % 3) == pytest.approx(idle, rel=0.01)


def test_the_reference_time_is_the_unit_of_a_step(
    job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moenas.evaluate.step_time.WallClock", lambda device: MadeUpClock(lambda n: 1.0)
    )
    one = timed_job(job)
    slow = replace(one, reference_ms={key: 2 * ms for key, ms in one.reference_ms.items()})
    (first, _), (second, _) = evaluate(one), evaluate(slow)
    assert second.metrics["step_ms"] == pytest.approx(2 * first.metrics["step_ms"], rel=0.01)


def test_steps_are_timed_alone_where_the_study_has_no_reference_time(job: MakeJob) -> None:
    evaluation, _ = evaluate(replace(timed_job(job), reference_ms={"other": 1.0}))
    assert evaluation.metrics["step_ms"] > 0
    assert "step_spread" not in evaluation.metrics


def test_a_pair_of_one_thread_counts_its_cpu_time_alone() -> None:
    pairs = Pairs([9.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 2.0])
    assert pairs.own_ratios(1) == [2.0, 1.5]
    assert pairs.own_ratios(2) == pairs.ratios == [3.0, 0.5]


def test_the_key_names_what_a_step_depends_on() -> None:
    key = reference_key(RECIPE, CPU)
    assert key is not None
    assert key.startswith(f"{HERE}, training step, dtype float32, threads 1, torch ")
    assert reference_key(replace(RECIPE, threads=2), CPU) != key
    assert reference_key(replace(RECIPE, dtype="bfloat16"), CPU) != key
    assert reference_key(replace(RECIPE, batch=9, context=32), CPU) == key
    assert reference_key(RECIPE, torch.device("cuda")) is None


def test_the_reference_time_is_the_shortest_of_at_least_ten_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    class Clock:
        def __init__(self, device: Any) -> None: ...

        def sample(self, run: Callable[[], object], runs: int) -> tuple[float, float]:
            run()
            taken.append(runs)
            return 1.0, 0.5 + abs(len(taken) - 4)

    monkeypatch.setattr("moenas.evaluate.step_reference.WallClock", Clock)
    monkeypatch.setattr("moenas.evaluate.step_reference.SECONDS", 0.0)
    with closing(device_lock(CPU)) as lock:
        assert time_reference(RECIPE, CPU, lock) == 0.5
        assert taken == [1] * 10
        assert time_reference(replace(RECIPE, threads=2), CPU, lock) == 1.0


def test_reference_steps_leave_the_random_numbers_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with reference_steps(RECIPE, CPU) as step:
        step()
    assert torch.equal(before, torch.get_rng_state())
