"""The time of a training step, and the tokens that fit in a budget of seconds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moenas.errors import InputError, TimeLimitError
from moenas.evaluate.devices import device_name, is_called
from moenas.evaluate.footprint import require_fit
from moenas.evaluate.step_reference import reference_steps
from moenas.evaluate.steps import TrainingInputs
from moenas.evaluate.threads import cpu_threads
from moenas.evaluate.timing import Pairs, Run, WallClock, median_interval
from moenas.evaluate.training import open_steps
from moenas.model.multi_token import build_heads

if TYPE_CHECKING:
    import torch

    from moenas.data.corpus import Corpus
    from moenas.evaluate.device_lock import DeviceLock
    from moenas.model.architecture import Architecture
    from moenas.space.sections import Recipe

WARM_UP_CPU, WARM_UP_CUDA = 2, 8
"""Steps before the first sample; on CUDA a graph of a step is captured meanwhile."""
SAMPLES, FEWEST = 200, 6
"""Samples of the time of a step, at most and at least."""
SAMPLE_SECONDS = 0.02
"""Length of a sample that is aimed at; it has 1 to WARM_UP_CUDA steps."""
SHARE = 0.05
"""Share of the budget for which steps are timed."""
PROBE_STEPS = WARM_UP_CUDA + 1 + SAMPLES * WARM_UP_CUDA
"""Steps of the run that is timed, at most."""


@dataclass(frozen=True)
class StepTime:
    """The time of a training step of one candidate."""

    seconds: float
    """The median ratio to the steps of the reference model, times the reference time of the study.
    Without such a time it is that of the quickest sample: other work can only lengthen a step."""
    spread: float | None = None
    """Half-width of the 95 % interval of the median ratio, as a share of it."""

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that are stored with a trial."""
        spread = {} if self.spread is None else {"step_spread": self.spread}
        return {"step_ms": 1000 * self.seconds} | spread

    def tokens(self, recipe: Recipe) -> int:
        """Return the tokens of the whole steps that fit in the budget of a recipe."""
        assert recipe.budget is not None
        assert recipe.budget.seconds is not None
        return int(recipe.budget.seconds / self.seconds) * recipe.batch * recipe.context


def require_named_device(recipe: Recipe, device: torch.device) -> None:
    """Refuse a device that is not the one whose seconds a budget counts.

    Raises:
        InputError: naming both devices.
    """
    budget = recipe.budget
    if budget is None or budget.device is None:
        return
    here = device_name(device)
    if not is_called(here, budget.device):
        raise InputError(
            f"train.budget.device: candidates run here on '{here}', and the budget counts seconds"
            f" on '{budget.device}'; run the study on such a device, or name this one"
        )


def time_step(
    architecture: Architecture,
    corpus: Corpus,
    recipe: Recipe,
    device: torch.device,
    *,
    lock: DeviceLock,
    seed: int,
    reference: float | None = None,
    sharers: int = 1,
    deadline: float | None = None,
) -> StepTime:
    """Time training steps of a model, with the heads of `train.mtp`, that is given up afterwards.

    No other work of ours runs on the device meanwhile. The learning rate is 0, so the routers stay
    as they are drawn and nothing diverges. `reference` is the reference time of the study, in
    seconds. With it, steps of the reference model are timed in turn with those of the candidate:
    the load of the machine moves both. `sharers` candidates share the memory of the device.
    `deadline` is a moment of `time.monotonic`.

    Raises:
        NoRoomError: if the training does not fit the device.
        TimeLimitError: once the deadline has passed.
    """
    assert recipe.budget is not None
    assert recipe.budget.seconds is not None
    require_fit(architecture, recipe, device, training=True, sharers=sharers)
    probe = replace(recipe, lr=0.0, tokens=PROBE_STEPS * recipe.batch * recipe.context)
    warm_up = WARM_UP_CUDA if device.type == "cuda" else WARM_UP_CPU
    with cpu_threads(recipe.threads), lock.exclusive():
        model = architecture.build(device, seed)
        heads = build_heads(recipe.heads, architecture, device, seed)
        steps = open_steps(TrainingInputs(model, corpus, probe, seed, heads))
        steps.trainee.train()

        def take(count: int) -> None:
            steps.advance(steps.done + count, None, deadline)

        try:
            take(warm_up)
            began = time.monotonic()
            take(1)
            quick = max(time.monotonic() - began, 1e-6)
            count = max(1, min(WARM_UP_CUDA, round(SAMPLE_SECONDS / quick)))
            until = began + SHARE * recipe.budget.seconds
            if reference is None:
                return StepTime(_quickest(lambda: take(count), until) / count)
            with reference_steps(recipe, device) as other:
                pairs = _pairs(lambda: take(count), other, device, until)
            ratios = pairs.own_ratios(recipe.threads)
            low, high = median_interval(ratios)
            ratio = statistics.median(ratios)
            return StepTime(ratio * reference / count, (high - low) / 2 / ratio)
        finally:
            steps.close()


def _goes_on(samples: int, until: float) -> bool:
    """Whether further samples are taken, up to a moment of `time.monotonic`."""
    return samples < FEWEST or (samples < SAMPLES and time.monotonic() <= until)


def _quickest(sample: Run, until: float) -> float:
    """Return the time of the quickest sample, seconds."""
    times: list[float] = []
    while _goes_on(len(times), until):
        start = time.perf_counter()
        sample()
        times.append(time.perf_counter() - start)
    return min(times)


def _pairs(sample: Run, reference: Run, device: torch.device, until: float) -> Pairs:
    """Time samples of a candidate, each beside reference steps that take about as long."""
    clock, pairs = WallClock(device), Pairs()
    reference()  # it warms up
    step, took = clock.sample(reference, 1)[0], clock.sample(sample, 1)[0]
    steps = max(1, min(WARM_UP_CUDA, round(took / step)))
    sides = (
        (sample, 1, pairs.candidate, pairs.candidate_cpu),
        (reference, steps, pairs.reference, pairs.reference_cpu),
    )
    while _goes_on(len(pairs.candidate), until):
        for run, runs, wall, cpu in sides if len(pairs.candidate) % 2 else sides[::-1]:
            seconds, own = clock.sample(run, runs)
            wall.append(seconds)
            cpu.append(own)
    return pairs


def require_steps(recipe: Recipe, step: StepTime, least: int) -> None:
    """Refuse a candidate that has too few steps in its budget of seconds.

    Raises:
        TimeLimitError: with the time of a step, and what would be enough.
    """
    assert recipe.budget is not None
    steps = step.tokens(recipe) // (recipe.batch * recipe.context)
    if steps < least:
        raise TimeLimitError(
            f"train.budget.seconds: {recipe.budget.seconds:g} s hold {steps} training steps of"
            f" {1000 * step.seconds:.4g} ms, and a candidate needs {least}: give at least"
            f" {least * step.seconds:.3g} s, or a smaller batch"
        )
