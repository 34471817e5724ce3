"""Pairs of times: the ratio of two sides, and when it is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from moenas.evaluate.timing import Pairs, WallClock, median_interval, time_pairs
from moenas.space.sections import Protocol

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    # Ranks of the 95 % interval for a median, as tables of the sign test print them.
    ("n", "low", "high"),
    [(6, 1, 6), (9, 2, 8), (10, 2, 9), (20, 6, 15), (25, 8, 18), (30, 10, 21), (50, 18, 33)],
)
def test_the_interval_of_a_median_is_the_tabled_one(n: int, low: int, high: int) -> None:
    values = list(range(1, n + 1))
    random.Random(n).shuffle(values)
    assert median_interval([float(v) for v in values]) == (low, high)


@pytest.mark.parametrize("n", [6, 11, 24])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    draw = random.Random(0)
    samples = [[draw.expovariate(1.0) for _ in range(n)] for _ in range(2000)]
    intervals = [median_interval(sample) for sample in samples]
    covered = sum(low <= 0.6931 <= high for low, high in intervals) / len(samples)
    assert 0.94 < covered < 0.995


def test_few_values_give_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([2.0]) == (2.0, 2.0)


class Machine:
    """A clock that runs by what runs on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slow = 1.0
        self.log: list[str] = []

    def run(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def step() -> None:
            self.log.append(name)
            self.now += seconds() * self.slow

        return step

    def clock(self) -> float:
        return self.now


def test_the_ratio_does_not_feel_a_machine_that_slows_down() -> None:
    machine = Machine()

    def drift() -> float:
        machine.slow *= 1.0001
        return 0.003

    pairs = time_pairs(
        machine.run("candidate", drift),
        machine.run("reference", lambda: 0.002),
        Protocol(min_repeats=60, max_repeats=60, max_seconds=1e9),
        WallClock(CPU, machine.clock),
    )
    assert len(pairs.candidate) == 60
    assert pairs.candidate[-1] > 1.005 * pairs.candidate[0]
    assert pairs.ratio == pytest.approx(1.5, rel=1e-3)
    assert pairs.spread < 1e-3
    # One untimed run and 10 ms of timed ones a side, the sides in random order.
    assert pairs.runs == 3
    samples = [["candidate"] * 4, ["reference"] * 6]
    log = machine.log[-600:]
    order = [log[i : i + 10] for i in range(0, 600, 10)]
    assert all(pair in (samples[0] + samples[1], samples[1] + samples[0]) for pair in order)
    assert 15 < sum(pair[0] == "candidate" for pair in order) < 45


def test_a_steady_ratio_stops_early_and_a_noisy_one_goes_on() -> None:
    protocol = Protocol(min_repeats=8, max_repeats=40, precision=0.02, max_seconds=1e9)
    draw = random.Random(0)
    for noise, expected in ((0.0, 8), (0.5, 40)):
        machine = Machine()

        def candidate(noise: float = noise) -> float:
            return 0.01 * (1 + noise * draw.random())

        pairs = time_pairs(
            machine.run("c", candidate),
            machine.run("r", lambda: 0.01),
            protocol,
            WallClock(CPU, machine.clock),
        )
        assert len(pairs.candidate) == expected
        assert (pairs.spread > 0.02) == (expected == 40)


def test_a_slow_candidate_is_timed_three_times_at_least() -> None:
    machine = Machine()
    pairs = time_pairs(
        machine.run("c", lambda: 10.0),
        machine.run("r", lambda: 0.01),
        Protocol(min_repeats=8, max_seconds=4.0),
        WallClock(CPU, machine.clock),
    )
    assert pairs.candidate == pytest.approx([10.0] * 3)


def test_contention_is_wall_time_without_cpu_time() -> None:
    alone = Pairs([2.0, 2.0], [1.0, 1.0], [1.9, 1.9], [1.0, 1.0]).contention()
    assert alone["cpu_ratio"] == pytest.approx(1.9)
    assert not alone["contended"]
    shared = Pairs([4.0, 4.0], [2.0, 2.0], [2.0, 2.0], [1.0, 1.0]).contention()
    assert shared["wall_per_cpu"] == pytest.approx(2.0)
    assert shared["contended"]
