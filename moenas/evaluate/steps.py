"""Training steps on a CPU, each of which the host waits for."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from moenas.data.corpus import Corpus
from moenas.errors import DivergedError, TimeLimitError
from moenas.evaluate.dtypes import training_dtype
from moenas.evaluate.optimizer import AdamW, schedule
from moenas.evaluate.routing_stats import RoutingAccumulator
from moenas.evaluate.trainee import Trainee
from moenas.model.architecture import Model
from moenas.model.multi_token import PredictionHeads
from moenas.space.sections import Recipe

ROWS = 40
"""Rows of a learning curve."""


class Gate(Protocol):
    """Who may work on a device: every group of training steps asks."""

    def shared(self) -> AbstractContextManager[object]:
        """Return what to enter around steps; it waits while a latency is being measured."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a training run trains, and on what."""

    model: Model
    corpus: Corpus
    recipe: Recipe
    seed: int
    """Orders the data; it is the same for every candidate of a study."""
    heads: PredictionHeads | None = None
    """The heads for further tokens, if the recipe has them: see `build_heads`."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def trainee(self) -> Trainee:
        """The model with its heads."""
        return Trainee(self.model, self.heads)

    def build_optimizer(self) -> AdamW:
        """Build the optimizer of the model and its heads."""
        return AdamW(self.model, self.recipe, self.heads)

    def build_meter(self) -> RoutingAccumulator:
        """Build the counts of the routing of the model, by domain of the corpus."""
        return RoutingAccumulator(self.model.moe_layers(), len(self.corpus.domain_names))


@dataclass(frozen=True)
class Sums:
    """What the steps of a row of the learning curve gave."""

    loss: float
    """Sum of the cross entropies, nats per token."""
    grad_norm: float
    """Norm of the last step's gradient, before clipping."""


class Steps(Protocol):
    """The steps of one training run."""

    meter: RoutingAccumulator
    """Takes in the routing of every step."""
    optimizer: AdamW
    trainee: Trainee
    done: int
    """Steps that were taken, those before a checkpoint included."""
    last_loss: float
    """The last loss that was finite; NaN before the first step."""

    def resume(self, done: int, last_loss: float) -> None:
        """Continue after `done` steps; the caller restores the weights and the optimizer."""

    def advance(
        self, until: int, gate: Gate | None, deadline: float | None, *, with_domains: bool = False
    ) -> Sums:
        """Take the steps up to number `until`; count domains of tokens with `with_domains`.

        Raises:
            DivergedError: if a loss or a gradient is not finite.
            TimeLimitError: once `deadline`, a moment of `time.monotonic`, has passed.
        """

    def close(self) -> None:
        """Free what only the steps need."""


def row_ends(steps: int) -> list[int]:
    """Return the numbers of steps after which the learning curve has a row, about 40."""
    return [n for n in range(1, steps + 1) if n * ROWS // steps > (n - 1) * ROWS // steps]


def diverged(*, loss: bool, step: int, rate: float, recipe: Recipe, last: float) -> DivergedError:
    """Return the error of a step whose loss (or gradient) is not finite, at a learning rate."""
    what = "loss" if loss else "gradient"
    return DivergedError(
        f"the {what} was not finite in step {step} of {recipe.steps} at a learning rate of"
        f" {rate:.2g}; the last finite loss was {last:.3f}"
    )


def out_of_time(step: int, recipe: Recipe) -> TimeLimitError:
    """Return the error of a run whose deadline has passed."""
    return TimeLimitError(f"the time limit came in step {step} of {recipe.steps}")


class HostSteps:
    """The steps of one run, with one look at the loss and the gradient of each."""

    def __init__(self, inputs: TrainingInputs) -> None:
        self.trainee = inputs.trainee
        self.corpus, self.recipe, self.seed = inputs.corpus, inputs.recipe, inputs.seed
        self.dtype = training_dtype(inputs.recipe, inputs.device)
        self.optimizer, self.meter = inputs.build_optimizer(), inputs.build_meter()
        self.done = 0
        self.last_loss = math.nan

    def resume(self, done: int, last_loss: float) -> None:
        """See `Steps.resume`."""
        self.done, self.last_loss = done, last_loss

    def advance(
        self, until: int, gate: Gate | None, deadline: float | None, *, with_domains: bool = False
    ) -> Sums:
        """See `Steps.advance`."""
        recipe, corpus = self.recipe, self.corpus
        assert recipe.lr is not None
        total, norm = 0.0, math.nan
        for step in range(self.done, until):
            if deadline is not None and time.monotonic() > deadline:
                raise out_of_time(step, recipe)
            rate = recipe.lr * schedule(step, recipe)
            place = (step, recipe.batch, recipe.context, self.seed)
            with gate.shared() if gate else nullcontext():
                loss, norm = self._step(corpus.batch(*place), rate)
                counts = with_domains and self.meter.layers
                self.meter.add(corpus.batch_domains(*place) if counts else None)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                bad = not math.isfinite(loss)
                raise diverged(loss=bad, step=step, rate=rate, recipe=recipe, last=self.last_loss)
            total, self.last_loss = total + loss, loss
            self.done = step + 1
        return Sums(total, norm)

    def _step(self, batch: tuple[torch.Tensor, torch.Tensor], rate: float) -> tuple[float, float]:
        """Take one step unless it would not be finite; return cross entropy and gradient norm."""
        trainee = self.trainee
        tokens, targets = batch
        loss, trained = trainee.losses(tokens, targets, self.dtype)
        trainee.zero_grad()
        trained.backward()
        weights = [p for p in trainee.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if torch.isfinite(norm):
            if self.recipe.grad_clip > 0:
                nn.utils.clip_grads_with_norm_(weights, self.recipe.grad_clip, norm)
            self.optimizer.step(rate)
            trainee.after_step()
        return loss.item(), norm.item()

    def close(self) -> None:
        """Free the gradients."""
        self.trainee.zero_grad()
