"""The one run that every candidate gets: equal tokens, equal data, a learning rate by rule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.optim.adamw import adamw

from moenas.architecture import Architecture, Model
from moenas.data import Corpus
from moenas.dtypes import training_dtype
from moenas.errors import CollapsedError, DivergedError, TimeLimitError
from moenas.memory import keep_freed_memory
from moenas.parts.layers import matrices
from moenas.records import Plain
from moenas.routing import Meter, Reading, Watch
from moenas.sections import Recipe

ROWS = 40
"""Rows of a learning curve."""
BASE_WIDTH, BASE_RATE = 64, 0.004
"""The width at which all weights learn at one rate, and that rate."""


class Gate(Protocol):
    """Who may work on a device: every training step asks."""

    def working(self) -> AbstractContextManager[object]:
        """Return what to enter around a step; it waits while a latency is being measured."""


@dataclass(frozen=True)
class Progress:
    """A row of the learning curve."""

    tokens: int
    """Training tokens seen."""
    train_loss: float
    """Mean cross entropy since the row before, nats per token."""
    lr: float
    grad_norm: float
    """Norm of the last step's gradient, before clipping."""
    seconds: float
    """Wall seconds since the run began."""
    routing: list[Plain] = field(default_factory=list)
    """A row for each MoE layer, over the steps since the row before, as `Reading.short` gives it;
    with domains in the last row alone."""

    def plain(self) -> Plain:
        """Return the row as a JSON object; a model without MoE layers has no `routing`."""
        return {name: value for name, value in asdict(self).items() if value != []}


@dataclass(frozen=True)
class Validation:
    """What a trained model is worth on text that it has not seen."""

    loss: float
    """Cross entropy in nats per token."""
    bits_per_byte: float | None
    """The same in bits, where the tokens are bytes."""
    tokens: int
    """Predictions that the loss is the mean of."""
    routing: list[Plain] = field(default_factory=list)
    """A row for each MoE layer, as `Reading.plain` gives it; `dropped` is the share of the slots of
    this text that find no room at the capacity of training."""


def learning_rate(architecture: Architecture, recipe: Recipe) -> float:
    """Return the peak rate of a candidate's matrices: the recipe's, or by the rule 0.256 / d_model.

    The embedding moves at `d_model / 64` times that: 0.004 at every width under the rule. So does
    muP for Adam (arXiv 2203.03466, table 3: 1/width for hidden and output matrices, constant for
    input weights); norms go with the matrices. Measured in docs/learning_rate.md.
    """
    if recipe.lr is not None:
        return recipe.lr
    return recipe.lr_scale * BASE_RATE * BASE_WIDTH / architecture.d_model


def schedule(step: int, recipe: Recipe) -> float:
    """Return the share of the peak rate at a step from 0: warm-up, plateau, fall to 0, linearly.

    Warm-up, stable, decay (MiniCPM, arXiv 2404.06395); no step has a rate of 0.
    """
    steps = recipe.steps
    up = (step + 1) / max(1.0, recipe.warmup * steps)
    down = (steps - step) / max(1.0, recipe.decay * steps)
    return min(1.0, up, down)


def train(
    model: Model,
    corpus: Corpus,
    recipe: Recipe,
    seed: int,
    gate: Gate | None = None,
    deadline: float | None = None,
) -> Iterator[Progress]:
    """Train a model in place for `recipe.steps` steps and yield a row about 40 times.

    `recipe.lr` must be set (see `learning_rate`). `seed` orders the data; it is the same for
    every candidate of a study. `deadline` is a moment of `time.monotonic`. On a CPU with one
    thread the same call gives the same weights to the last bit.

    Raises:
        DivergedError: if a loss or a gradient is not finite; the weights are of no use then.
        CollapsedError: if more than `recipe.max_dead` of the experts of a layer are dead, after
            the row of the curve that shows it.
        TimeLimitError: once the deadline has passed.
    """
    assert recipe.lr is not None
    keep_freed_memory()
    device = next(model.parameters()).device
    dtype = training_dtype(recipe, device)
    optimizer = AdamW(model, recipe)
    began, since, last = time.monotonic(), 0.0, math.nan
    since_step, last_row = 0, (recipe.steps - 1) * ROWS // recipe.steps
    names = corpus.domains.names if corpus.domains else ()
    layers = model.moe_layers()
    meter, watch = Meter(layers, len(names)), Watch(layers, recipe.max_dead)
    model.train()
    for step in range(recipe.steps):
        if deadline is not None and time.monotonic() > deadline:
            raise TimeLimitError(f"the time limit came in step {step} of {recipe.steps}")
        lr = recipe.lr * schedule(step, recipe)
        with gate.working() if gate else nullcontext(), _threads(recipe.threads):
            place = (step, recipe.batch, recipe.context, seed)
            loss, norm = _step(model, optimizer, corpus.batch(*place), dtype, lr)
            ends = step * ROWS // recipe.steps == last_row
            meter.add(corpus.batch_domains(*place) if ends and layers else None)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise DivergedError(
                f"the {what} was not finite in step {step} of {recipe.steps} at a learning rate of"
                f" {lr:.2g}; the last finite loss was {last:.3f}"
            )
        since, last = since + loss, loss
        if (step + 1) * ROWS // recipe.steps > step * ROWS // recipe.steps:
            tokens = (step + 1) * recipe.batch * recipe.context
            mean = since / (step + 1 - since_step)
            readings = meter.read()
            rows = [reading.short(names if ends else ()) for reading in readings]
            yield Progress(tokens, mean, lr, norm, time.monotonic() - began, rows)
            if since_step >= recipe.warmup * recipe.steps:
                _require_alive(watch, readings, step, recipe.steps)
            since, since_step = 0.0, step + 1


def _require_alive(watch: Watch, readings: list[Reading], step: int, steps: int) -> None:
    """Raise CollapsedError if a layer has collapsed."""
    collapsed = watch.judge(readings)
    if collapsed is not None:
        layer, share = collapsed
        raise CollapsedError(
            f"{share:.0%} of the experts of layer {layer} were dead at step {step} of {steps}, more"
            f" than train.max_dead: {watch.max_dead:g}"
        )


class AdamW:
    """AdamW (arXiv 1711.05101), bit for bit `torch.optim.AdamW(fused=True)`.

    What a module calls its matrices decays; norms, biases and rates do not. The step is torch's own
    kernel; building torch's optimizer object would import its compiler first, over 2 seconds of CPU
    time.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self.recipe = recipe
        weights = [p for p in model.parameters() if p.requires_grad]
        decaying = {id(p) for module in model.modules() for p in matrices(module)}
        decaying.discard(id(model.embedding))
        self.matrices = [p for p in weights if id(p) in decaying]
        self.vectors = [p for p in weights if id(p) not in decaying and p is not model.embedding]
        self.embedding = model.embedding
        self.widening = model.d_model / BASE_WIDTH
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in weights}
        self.steps = {p: torch.zeros((), device=p.device) for p in weights}

    def step(self, lr: float) -> None:
        """Move all weights that have a gradient; `lr` is the rate of the matrices."""
        self._move(self.matrices, lr, self.recipe.weight_decay)
        self._move([self.embedding], lr * self.widening, self.recipe.weight_decay)
        self._move(self.vectors, lr, 0.0)

    @torch.no_grad()
    def _move(self, weights: list[nn.Parameter], lr: float, decay: float) -> None:
        moved = [p for p in weights if p.grad is not None]
        adamw(
            list(moved),
            [p.grad for p in moved if p.grad is not None],
            [self.moments[p][0] for p in moved],
            [self.moments[p][1] for p in moved],
            [],
            [self.steps[p] for p in moved],
            lr=lr, weight_decay=decay, beta1=self.recipe.beta1, beta2=self.recipe.beta2, eps=1e-8,
            fused=True, amsgrad=False, maximize=False,
        )  # fmt: skip


def _step(
    model: Model,
    optimizer: AdamW,
    batch: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    lr: float,
) -> tuple[float, float]:
    """Take one step unless it would not be finite; return cross entropy and gradient norm."""
    device = next(model.parameters()).device
    tokens, targets = (part.to(device, non_blocking=True) for part in batch)
    loss = model.loss(tokens, targets, dtype)
    model.zero_grad(set_to_none=True)
    (loss + model.auxiliary_loss()).backward()
    weights = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    if torch.isfinite(norm):
        if optimizer.recipe.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(weights, optimizer.recipe.grad_clip, norm)
        optimizer.step(lr)
        model.after_step()
    return loss.item(), norm.item()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads, and leave the process as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def validate(model: Model, corpus: Corpus, recipe: Recipe) -> Validation:
    """Return the loss of a model on fixed windows of the validation split, and how it routes.

    In evaluation mode and float32, whatever the run computed in: the same on every machine, and
    what an exported model gives again.

    Raises:
        DivergedError: if the loss is not finite.
    """
    device = next(model.parameters()).device
    names = corpus.domains.names if corpus.domains else ()
    layers = model.moe_layers()
    meter, crowded = Meter(layers, len(names)), Meter(layers)
    sizes = (recipe.context, recipe.batch, recipe.val_tokens)
    total, count = 0.0, 0
    was_training = model.training
    with torch.inference_mode(), _threads(recipe.threads):
        for batch, where in zip(
            corpus.val_batches(*sizes), corpus.val_domains(*sizes), strict=True
        ):
            tokens, targets = (part.to(device) for part in batch)
            model.eval()
            total += model.loss(tokens, targets, torch.float32).item() * targets.numel()
            count += targets.numel()
            meter.add(where)
            if any(moe.capacity_factor is not None for _, moe in layers):
                model.train()
                model(tokens, dtype=torch.float32)
                crowded.add()
    model.train(was_training)
    loss = total / count
    if not math.isfinite(loss):
        raise DivergedError("the validation loss was not finite")
    rows = [reading.plain(names) for reading in meter.read()]
    for row, reading in zip(rows, crowded.read(), strict=False):
        row["dropped"] = reading.dropped
    bits = loss / math.log(2) if corpus.is_bytes else None
    return Validation(loss, bits, count, rows)
