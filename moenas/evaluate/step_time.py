"""The time of a training step, and the tokens that fit in a budget of seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moenas.errors import InputError, TimeLimitError
from moenas.evaluate.devices import device_name, is_called
from moenas.evaluate.footprint import require_fit
from moenas.evaluate.steps import TrainingInputs
from moenas.evaluate.threads import cpu_threads
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
SAMPLES, FEWEST = 200, 5
"""Samples of the time of a step, at most and at least."""
SAMPLE_SECONDS = 0.02
"""Length of a sample that is aimed at; it has 1 to WARM_UP_CUDA steps."""
SHARE = 0.05
"""Share of the budget for which steps are timed, in search of a moment without other work."""
PROBE_STEPS = WARM_UP_CUDA + 1 + SAMPLES * WARM_UP_CUDA
"""Steps of the run that is timed, at most."""


@dataclass(frozen=True)
class StepTime:
    """The time of a training step of one candidate."""

    seconds: float
    """Of the quickest sample: what else runs on a machine can only lengthen a step."""

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
    sharers: int = 1,
    deadline: float | None = None,
) -> StepTime:
    """Time training steps of a model, with the heads of `train.mtp`, that is given up afterwards.

    No other work of ours runs on the device meanwhile. The learning rate is 0, so the routers stay
    as they are drawn and nothing diverges. `sharers` candidates share the memory of the device.
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
        try:
            steps.advance(warm_up, None, deadline)
            began = time.monotonic()
            steps.advance(warm_up + 1, None, deadline)
            quick = max(time.monotonic() - began, 1e-6)
            count = max(1, min(WARM_UP_CUDA, round(SAMPLE_SECONDS / quick)))
            samples: list[float] = []
            while len(samples) < SAMPLES:
                late = time.monotonic() - began > SHARE * recipe.budget.seconds
                if late and len(samples) >= FEWEST:
                    break
                start = time.perf_counter()
                steps.advance(steps.done + count, None, deadline)
                samples.append((time.perf_counter() - start) / count)
        finally:
            steps.close()
    return StepTime(min(samples))


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
