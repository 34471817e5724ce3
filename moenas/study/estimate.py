"""The cost of a study before it starts: training tokens, training FLOPs and hours."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from moenas.errors import MoenasError, StorageError, TimeLimitError
from moenas.evaluate import devices
from moenas.evaluate.dtypes import training_dtype
from moenas.evaluate.footprint import require_fit
from moenas.evaluate.optimizer import learning_rate
from moenas.evaluate.training import train
from moenas.grammar.counting import most_layers
from moenas.grammar.summary import counted, short
from moenas.model.multi_token import build_heads
from moenas.records import TRAINING, Plain
from moenas.store import spending
from moenas.store.store import Store

if TYPE_CHECKING:
    import torch

    from moenas.data.corpus import Corpus
    from moenas.model.architecture import Architecture
    from moenas.space.space import Space

PROBE_S = 10.0
"""Seconds after which the training of a probe ends."""
PROBE_STEPS = 8
"""Training steps of a probe, if they take less."""
UNKNOWN = (
    "no candidates of this size were trained on this device yet; `run --dry-run` times a probe"
)
FEW = 3
"""Stored evaluations from which on their throughput is used."""
SIMILAR = 4.0
"""Factor between the training FLOPs of two candidates up to which they are of similar size."""
DRAWS, DRAWN_LAYERS = 50, 10_000
"""Random architectures whose mean cost estimates the mean cost of the candidates."""


@dataclass(frozen=True)
class Estimate:
    """What a study will take; hours are None where no throughput is known."""

    candidates: int
    replicates: int
    """Trainings with further seeds after the search; see `expected_replicates`."""
    workers: int
    train_tokens: float | None
    """Replicates included, as in the numbers below. None under a budget of seconds as long as no
    throughput is known."""
    train_flops: float | None
    """Trainings times the mean over random feasible draws; None as above."""
    hours: float | None
    hours_low: float | None
    """As if all candidates were as fast as the fastest quarter."""
    hours_high: float | None
    """As if all candidates were as slow as the slowest quarter."""
    basis: str
    """Where the throughput is from, or why there is none."""

    def plain(self) -> Plain:
        """Return the estimate as a JSON object."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """Return the estimate as text."""
        more = f" and about {self.replicates:,} replicates" if self.replicates else ""
        spent = "training tokens are unknown before a step is timed"
        if self.train_tokens is not None and self.train_flops is not None:
            spent = f"{short(self.train_tokens)} training tokens"
            spent += f", {self.train_flops:.3g} training FLOPs"
        lines = [f"estimate for {counted(self.candidates, 'candidate')}{more}: {spent}"]
        if self.hours is None:
            return [*lines, f"  time: unknown; {self.basis}"]
        low, high = _duration(self.hours_low), _duration(self.hours_high)
        with_workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        lines.append(
            f"  time: {_duration(self.hours)} with {with_workers}, {low} to {high} by the fastest"
            " and the slowest quarter"
        )
        return [*lines, f"  basis: {self.basis}"]


def _duration(hours: float | None) -> str:
    """Return a duration in the unit that suits it."""
    assert hours is not None
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h"


@dataclass(frozen=True)
class _Rate:
    """How fast candidates are evaluated: seconds of a candidate of some training FLOPs."""

    flops_per_second: tuple[float, float, float]
    """Of the slowest quarter, the median and the fastest quarter."""
    overhead: float
    """Seconds of a candidate beside its training."""
    basis: str


def estimate(
    space: Space,
    corpus: Corpus | None = None,
    *,
    storage: str | None = None,
    trials: int | None = None,
    workers: int | None = None,
    replicates: int | None = None,
) -> Estimate:
    """Estimate what the evaluation of `trials` candidates and their `replicates` takes.

    None takes the replicates that a new study of so many candidates is expected to have.

    The throughput comes from evaluations in the database on a device of this name. If there are
    fewer than FEW and a corpus is given, the candidate of median cost is trained for some steps.

    Raises:
        SpaceError: if no architecture of the space is feasible.
    """
    n_draws = max(1, min(DRAWS, DRAWN_LAYERS // max(1, most_layers(space.tree))))
    drawn = [
        architecture
        for architecture in space.feasible(n_draws)
        if not isinstance(architecture, str)
    ]
    drawn = drawn or [space.require_feasible()]
    drawn = sorted(drawn, key=lambda a: space.training_cost(a).flops_per_token)
    count = space.search.trials if trials is None else trials
    trains = any(objective.needs == "training" for objective in space.objectives)
    device = devices.of_candidates(space.search.gpus)
    workers = workers or space.search.workers or _default_workers(space, device)
    spent: _Spent | None = _Spent(0.0, 0.0)
    rate: _Rate | str = "no objective trains the candidates"
    if trains and space.train.has_time_budget:
        spent, rate = _of_time_budget(space, corpus, drawn, device)
    elif trains:
        spent = _mean_spent(space, drawn)
        rate = _stored_rate(space, device, storage, spent.flops) or UNKNOWN
        if rate == UNKNOWN and corpus is not None:
            rate = _probed(space, corpus, drawn[len(drawn) // 2], device)
    more = expected_replicates(space, count) if replicates is None else replicates
    runs = count + more
    hours: list[float | None] = [None, None, None]
    if isinstance(rate, _Rate):
        flops = 0.0 if spent is None else spent.flops
        seconds = [flops / speed + rate.overhead for speed in rate.flops_per_second]
        hours = [runs / max(1, min(workers, runs)) * one / 3600 for one in seconds]
    return Estimate(
        candidates=count,
        replicates=more,
        workers=workers,
        train_tokens=None if spent is None else runs * spent.tokens,
        train_flops=None if spent is None else runs * spent.flops,
        hours=hours[1],
        hours_low=hours[2],
        hours_high=hours[0],
        basis=rate if isinstance(rate, str) else rate.basis,
    )


@dataclass(frozen=True)
class _Spent:
    """What the training of one candidate takes, the mean over random ones."""

    tokens: float
    flops: float


def _mean_spent(space: Space, drawn: Sequence[Architecture]) -> _Spent:
    """Return what the training of a candidate takes under equal tokens or equal FLOPs."""
    flops = [space.training_cost(architecture).flops_per_token for architecture in drawn]
    lengths = [float(space.train.for_candidate(one).run_tokens) for one in flops]
    pairs = zip(flops, lengths, strict=True)
    return _Spent(
        statistics.fmean(lengths), statistics.fmean(TRAINING * one * n for one, n in pairs)
    )


def _of_time_budget(
    space: Space, corpus: Corpus | None, drawn: Sequence[Architecture], device: torch.device
) -> tuple[_Spent | None, _Rate]:
    """Return what candidates of equal seconds take: the time is known, the rest by a probe."""
    assert space.train.budget is not None
    assert space.train.budget.seconds is not None
    seconds = space.train.budget.seconds
    basis = (
        "train.budget.seconds; measurements are not included, and candidates that run side by side"
        " slow one another"
    )
    middle = drawn[len(drawn) // 2]
    probe = "" if corpus is None else _probed(space, corpus, middle, device)
    if isinstance(probe, str):
        return None, _Rate((1.0, 1.0, 1.0), seconds, basis)
    # All candidates are taken to have the throughput of the one of median cost.
    flops = seconds * probe.flops_per_second[1]
    lengths = [flops / (TRAINING * space.training_cost(a).flops_per_token) for a in drawn]
    speed = flops / seconds
    spent = _Spent(statistics.fmean(lengths), flops)
    basis += "; tokens and FLOPs by a probe of the candidate of median cost"
    return spent, _Rate((speed, speed, speed), 0.0, basis)


def expected_replicates(space: Space, trials: int, front: int = 0) -> int:
    """Return how many replicates a study of `trials` candidates trains after its search.

    The size of its last front is not known before. It is taken as twice the square root of the
    candidates, or as the members that the `front` has already if they are more.
    """
    members = max(front, min(trials, math.isqrt(4 * trials)))
    return (space.search.replicates - 1) * members


def _default_workers(space: Space, device: torch.device) -> int:
    """Return how many candidates run at a time here by default."""
    if device.type == "cuda":
        return int(devices.n_gpus() / (space.search.gpus or 0.5))
    return max(1, int((os.cpu_count() or 1) / max(space.search.cpus, 0.001)))


def _stored_rate(
    space: Space, device: torch.device, storage: str | None, flops: float
) -> _Rate | None:
    """Return the throughput of stored evaluations of about `flops`, or None if there are too few.

    Small models are trained at a lower throughput, so only evaluations of similar size count.
    """
    threads, dtype = space.train.threads, training_dtype(space.train, device)
    info = devices.device_info(device, threads, dtype)
    try:
        stored = spending.timed(Store.open(storage), info)
    except StorageError:  # there is no database yet
        return None
    similar = [one for one in stored if flops / SIMILAR <= one.train_flops <= flops * SIMILAR]
    if len(similar) < FEW:
        return None
    speeds = _quartiles([one.train_flops / one.train_seconds for one in similar])
    overhead = statistics.median(one.total_seconds - one.train_seconds for one in similar)
    basis = f"{len(similar)} evaluations of similar size in this database on {info['name']}"
    return _Rate(speeds, overhead, basis)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _probed(
    space: Space, corpus: Corpus, architecture: Architecture, device: torch.device
) -> _Rate | str:
    """Train an architecture for some steps; return its throughput, or why there is none."""
    recipe = space.train
    longest = PROBE_STEPS * recipe.batch * recipe.context
    recipe = recipe.for_candidate(space.training_cost(architecture).flops_per_token, longest)
    recipe = replace(recipe, lr=learning_rate(architecture, recipe))
    steps = max(2, min(PROBE_STEPS, recipe.steps))
    short_run = replace(recipe, tokens=steps * recipe.batch * recipe.context)
    began = time.monotonic()
    points = []
    try:
        require_fit(architecture, recipe, device, training=True)
        model = architecture.build(device, space.search.seed)
        heads = build_heads(recipe.heads, architecture, device, space.search.seed)
        for point in train(
            model,
            corpus,
            short_run,
            space.search.seed,
            deadline=time.monotonic() + PROBE_S,
            heads=heads,
        ):
            points.append((point["tokens"], point["seconds"]))
    except TimeLimitError:
        pass
    except MoenasError as error:
        return f"the probe failed: {error}"
    if len(points) < 2:
        return f"two training steps of the median candidate take more than {PROBE_S:.0f} s"
    # The first step also warms up; each later one is a sample.
    flops = TRAINING * space.training_cost(architecture).flops_per_token
    speeds = [
        flops * (tokens - before) / max(seconds - at, 1e-9)
        for (before, at), (tokens, seconds) in pairwise(points)
    ]
    low, middle, high = _quartiles(speeds) if len(speeds) > 1 else (speeds[0],) * 3
    took = time.monotonic() - began
    basis = (
        f"a probe: {len(points)} training steps of the candidate of median cost in {took:.0f} s;"
        " measurements are not included, and candidates that run side by side slow one another"
    )
    return _Rate((low, middle, high), 0.0, basis)
