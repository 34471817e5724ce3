"""Training steps as they run on a device, for the groups that time and compare them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gpu.card import GPU, synchronize
from gpu.models import corpus
from moenas.evaluate.device_steps import WARM_UP, DeviceSteps
from moenas.evaluate.steps import TrainingInputs
from moenas.model.architecture import Model
from moenas.space.sections import Recipe


@contextmanager
def opened(model: Model, recipe: Recipe, seed: int = 0) -> Iterator[DeviceSteps]:
    """Open a run whose tokens lie on the device, and free it at the end."""
    steps = DeviceSteps(TrainingInputs(model.train(), corpus(), recipe, seed))
    steps.load(0, recipe.steps)
    try:
        yield steps
    finally:
        steps.close()


def warm_up(steps: DeviceSteps) -> None:
    """Take the steps that a capture asks for before it."""
    for _ in range(WARM_UP):
        steps.step()
    synchronize()


def capture(steps: DeviceSteps) -> float:
    """Capture a step and return the seconds that it took.

    Raises:
        RuntimeError: saying why there is no graph.
    """
    synchronize()
    began = time.perf_counter()
    if not steps.capture() and GPU:
        raise RuntimeError(f"no graph: {steps.capture_fault or 'the model is not capturable'}")
    synchronize()
    return time.perf_counter() - began


def milliseconds_a_step(steps: DeviceSteps, count: int) -> float:
    """Return the mean time of some steps that follow each other without a wait."""
    synchronize()
    began = time.perf_counter()
    for _ in range(count):
        steps.step()
    synchronize()
    return 1e3 * (time.perf_counter() - began) / count
