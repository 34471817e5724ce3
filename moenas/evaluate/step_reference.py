"""The training step of a fixed reference model, which the steps of candidates are timed beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from moenas.data.corpus import Corpus
from moenas.evaluate.devices import device_name
from moenas.evaluate.dtypes import training_dtype
from moenas.evaluate.latency import REFERENCE, REFERENCE_VERSION
from moenas.evaluate.steps import HostSteps, TrainingInputs
from moenas.evaluate.threads import cpu_threads
from moenas.evaluate.timing import WallClock
from moenas.model.architecture import Architecture
from moenas.space.sections import Recipe

if TYPE_CHECKING:
    from moenas.evaluate.device_lock import DeviceLock

BATCH, CONTEXT = 8, 64
"""Sequences of a reference step, and their tokens: some 30 ms on one core, and little memory."""
TOKENS = 65_536
"""Random tokens that the reference model trains on."""
SECONDS, FEWEST = 2.0, 10
"""Length of the measurement of a reference time, and its steps at least."""


def reference_key(recipe: Recipe, device: torch.device) -> str | None:
    """Name all that the time of a reference step depends on; None on a GPU, which has none.

    There a step takes as long as its kernels do, whatever else the host does.
    """
    if device.type != "cpu":
        return None
    dtype = str(training_dtype(recipe, device)).removeprefix("torch.")
    words = ["training step", f"dtype {dtype}", f"threads {recipe.threads}"]
    made = [f"torch {torch.__version__}", f"reference {REFERENCE_VERSION}"]
    return ", ".join([device_name(device), *words, *made])


@contextmanager
def reference_steps(recipe: Recipe, device: torch.device) -> Iterator[Callable[[], object]]:
    """Give what takes one step of the reference model, in the compute type of a recipe.

    The learning rate is 0, so all steps are equal in their work.
    """
    architecture = Architecture.parse(REFERENCE)
    tokens = np.random.default_rng(0).integers(architecture.vocab_size, size=TOKENS, dtype=np.uint8)
    corpus = Corpus("random", tokens, tokens, architecture.vocab_size, False, "", [], {})
    own = Recipe(
        batch=BATCH,
        context=CONTEXT,
        lr=0.0,
        dtype=recipe.dtype,
        threads=recipe.threads,
    )
    steps = HostSteps(TrainingInputs(architecture.build(device, 0), corpus, own, 0))
    steps.trainee.train()
    with closing(steps):
        yield lambda: steps.advance(steps.done + 1, None, None)


def time_reference(recipe: Recipe, device: torch.device, lock: DeviceLock) -> float:
    """Return the shortest time of a reference step, seconds; no other work of ours runs meanwhile.

    It is CPU time where one thread computes, as in `Pairs.own_ratios`.
    """
    clock = WallClock(device)
    times: list[float] = []
    with (
        cpu_threads(recipe.threads),
        lock.exclusive(),
        reference_steps(recipe, device) as step,
    ):
        step()
        began = time.monotonic()
        while len(times) < FEWEST or time.monotonic() - began < SECONDS:
            wall, cpu = clock.sample(step, 1)
            times.append(cpu if recipe.threads == 1 else wall)
    return min(times)
