"""Pairs of times: a candidate and the reference, timed in turn until their ratio is known."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol as Interface

import torch

from moenas.evaluate.cuda_graphs import capture, side_stream
from moenas.records import Plain
from moenas.space.sections import Protocol

WARM_UP = 3
"""Runs of each side before the first pair."""
SAMPLE_SECONDS = 0.01
"""Shortest sample: several time slices of a scheduler."""
CONTENDED = 1.2
"""Wall time over CPU time above which a single-threaded measurement had to share its core."""

Run = Callable[[], object]


# --- clocks ------------------------------------------------------------------------------------


class Clock(Interface):
    """Times runs on one device."""

    def now(self) -> float:
        """Return a moment, seconds."""

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""

    def sample(self, run: Run, runs: int) -> tuple[float, float]:
        """Return the seconds of one of some runs in a row, and the CPU seconds of this process."""


class WallClock:
    """Wall time from one synchronized device to the next: what a caller waits.

    CPU time would leave out what is waited for memory, locks or a GPU, and adds up threads that
    only spin.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self.now = clock

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def sample(self, run: Run, runs: int) -> tuple[float, float]:
        """See `Clock.sample`."""
        self.synchronize()
        wall_start, cpu_start = self.now(), time.process_time()
        for _ in range(runs):
            run()
        self.synchronize()
        return (self.now() - wall_start) / runs, (time.process_time() - cpu_start) / runs


class DeviceClock(WallClock):
    """The time of the GPU itself between two events: what the host does beside does not count."""

    def sample(self, run: Run, runs: int) -> tuple[float, float]:
        """See `Clock.sample`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cpu_start = time.process_time()
        start.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1000
        return seconds / runs, (time.process_time() - cpu_start) / runs


def replayed(run: Run, device: torch.device) -> Run:
    """Return what replays one run from a CUDA graph: the host launches one thing, not hundreds.

    Raises:
        RuntimeError: if the run cannot be captured, as it waits for the device.
    """
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    return capture(run, device).replay


# --- pairs -------------------------------------------------------------------------------------


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a confidence interval for the median, with at least 95 % coverage from 6 values on.

    It runs from the j-th smallest to the j-th largest value. j is the largest number for which a
    binomial (n, 1/2) falls below j in at most 2.5 % of cases. It supposes nothing about the
    distribution (David and Nagaraja, Order Statistics, section 7.1). Fewer than 6 values give their
    range.
    """
    ordered, n = sorted(values), len(values)
    rank, below = 0, 1
    while below <= 0.025 * 2**n:
        rank += 1
        below += math.comb(n, rank)
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[n - rank]


@dataclass
class Pairs:
    """Times of one run of the candidate and of the reference, taken side by side, in seconds."""

    candidate: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    candidate_cpu: list[float] = field(default_factory=list)
    """CPU time of this process, all its threads together."""
    reference_cpu: list[float] = field(default_factory=list)
    runs: int = 1
    """Runs of the candidate in a sample, which a time is the mean of."""

    @property
    def ratios(self) -> list[float]:
        """Candidate over reference, pair by pair."""
        return [c / r for c, r in zip(self.candidate, self.reference, strict=True)]

    def own_ratios(self, threads: int) -> list[float]:
        """Candidate over reference by the times that a load of the machine moves least.

        This is CPU time where one thread computes: a thread takes none while it waits for its core.
        Several threads spin while they wait for one another, so their wall time counts.
        """
        if threads > 1:
            return self.ratios
        pairs = zip(self.candidate_cpu, self.reference_cpu, strict=True)
        return [c / r for c, r in pairs]

    @property
    def ratio(self) -> float:
        """The median ratio: a slowdown of both sides cancels out."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Half-width of the median ratio's 95 % confidence interval, as a share of the ratio."""
        low, high = median_interval(self.ratios)
        return (high - low) / 2 / self.ratio

    @property
    def mad(self) -> float:
        """Median absolute deviation of the ratios, as a share of the median ratio."""
        middle = self.ratio
        return statistics.median(abs(r - middle) for r in self.ratios) / middle

    def contention(self) -> Plain:
        """Return the median ratio by CPU time, and whether wall time was much longer than it."""
        wall_per_cpu = sum(self.candidate + self.reference) / sum(
            self.candidate_cpu + self.reference_cpu
        )
        return {
            "cpu_ratio": statistics.median(self.own_ratios(1)),
            "wall_per_cpu": wall_per_cpu,
            "contended": wall_per_cpu > CONTENDED,
        }


def time_pairs(candidate: Run, reference: Run, protocol: Protocol, clock: Clock) -> Pairs:
    """Time both sides in turn, in random order within each pair, until the ratio is known.

    A sample begins with one untimed run, which warms the caches that the other side has used. Then
    come as many runs as make both samples equally long. If one were much shorter, the scheduler
    would interrupt the other more often. The ratio would then depend on other processes. It ends
    when the ratio's interval is as narrow as `protocol.precision`, after `max_repeats` pairs, or
    after `max_seconds` and 3 pairs.
    """
    pairs, order = Pairs(), random.Random(0)
    quickest = [_quickest(run, clock) for run in (candidate, reference)]
    length = max(*quickest, SAMPLE_SECONDS)
    pairs.runs, reference_runs = (max(1, round(length / seconds)) for seconds in quickest)
    sides = (
        (candidate, pairs.runs, pairs.candidate, pairs.candidate_cpu),
        (reference, reference_runs, pairs.reference, pairs.reference_cpu),
    )
    started = clock.now()
    while True:
        for run, runs, wall, cpu in sides if order.random() < 0.5 else sides[::-1]:
            run()
            for times, seconds in zip((wall, cpu), clock.sample(run, runs), strict=True):
                times.append(seconds)
        n = len(pairs.candidate)
        late = n >= 3 and clock.now() - started >= protocol.max_seconds
        if n >= protocol.max_repeats or late:
            return pairs
        if n >= protocol.min_repeats and pairs.spread <= protocol.precision:
            return pairs


def _quickest(run: Run, clock: Clock) -> float:
    """Warm up and return the shortest time of a run, seconds."""
    times = []
    for _ in range(WARM_UP):
        started = clock.now()
        run()
        clock.synchronize()
        times.append(clock.now() - started)
    return min(times)
