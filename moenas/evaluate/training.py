"""The one run that every candidate gets: equal tokens, equal data, a learning rate by rule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch

from moenas.data.corpus import Corpus
from moenas.errors import CollapsedError, DivergedError
from moenas.evaluate.device_steps import DeviceSteps
from moenas.evaluate.malloc import tune_malloc
from moenas.evaluate.optimizer import schedule
from moenas.evaluate.routing_stats import CollapseDetector, RoutingAccumulator
from moenas.evaluate.steps import Gate, HostSteps, Steps, TrainingInputs, row_ends
from moenas.evaluate.threads import cpu_threads
from moenas.model.architecture import Model
from moenas.model.multi_token import PredictionHeads
from moenas.records import CurvePoint, RoutingRow
from moenas.space.sections import Recipe


@dataclass(frozen=True)
class Validation:
    """What a trained model is worth on text that it has not seen."""

    loss: float
    """Cross entropy in nats per token."""
    bits_per_byte: float | None
    """The same in bits, where the tokens are bytes."""
    tokens: int
    """Predictions that the loss is the mean of."""
    routing: list[RoutingRow] = field(default_factory=list)
    """A row for each MoE layer, as `RoutingStats.row` gives it; `dropped` is the share of the
    slots of this text that find no room at the capacity of training."""


class TrainingRun:
    """The run of one candidate for `recipe.steps` steps, with about 40 points of its curve.

    `recipe.lr` must be set (see `learning_rate`). `deadline` is a moment of `time.monotonic`. On a
    CPU with one thread the same run gives the same weights to the last bit.

    Between two points `checkpoint.save` can save the run, and `checkpoint.restore` continue it in
    another process.
    """

    def __init__(
        self,
        inputs: TrainingInputs,
        *,
        gate: Gate | None = None,
        deadline: float | None = None,
    ) -> None:
        recipe, corpus = inputs.recipe, inputs.corpus
        assert recipe.lr is not None
        has_heads = inputs.heads is not None
        assert has_heads == (recipe.heads is not None), "heads and recipe do not belong together"
        tune_malloc()
        self.model, self.recipe = inputs.model, recipe
        self.steps = open_steps(inputs)
        self.collapse = CollapseDetector(self.model.moe_layers(), recipe.max_dead)
        self.seconds = 0.0
        """Seconds of training up to the latest point."""
        self._domain_names, self._gate, self._deadline = corpus.domain_names, gate, deadline
        self._collapsed: CollapsedError | None = None

    def points(self) -> Generator[CurvePoint, None, None]:
        """Train the model in place, and yield the points of the curve that are left.

        A point has `routing` if the model has MoE layers. Between two points the caller may
        validate the model: that changes no weight, and its time does not count as seconds of
        training.

        Raises:
            DivergedError: if a loss or a gradient is not finite; the weights are of no use then.
            CollapsedError: if more than `recipe.max_dead` of the experts of a layer are dead, after
                the row of the curve that shows it.
            TimeLimitError: once the deadline has passed.
        """
        began, start = time.monotonic() - self.seconds, self.steps.done
        self.steps.trainee.train()
        try:
            for end in row_ends(self.recipe.steps):
                if end <= start:
                    continue
                point = self._advance(start, end)
                point["seconds"] = self.seconds = time.monotonic() - began
                paused = time.monotonic()
                yield point
                began += time.monotonic() - paused
                self.require_alive()
                start = end
        finally:
            self.steps.close()

    def _advance(self, start: int, end: int) -> CurvePoint:
        """Take the steps from `start` to `end`, and return their point of the curve."""
        recipe, total = self.recipe, self.recipe.steps
        last = end == total
        with cpu_threads(recipe.threads):
            sums = self.steps.advance(end, self._gate, self._deadline, with_domains=last)
        readings = self.steps.meter.read()
        point: CurvePoint = {
            "tokens": end * recipe.batch * recipe.context,
            "train_loss": sums.loss / (end - start),
            "lr": (recipe.lr or 0.0) * schedule(end - 1, recipe),
            "grad_norm": sums.grad_norm,
        }
        if readings:
            names = self._domain_names if last else ()
            point["routing"] = [reading.rounded_row(names) for reading in readings]
        if (
            start >= recipe.warmup * total
            and (collapsed := self.collapse.update(readings)) is not None
        ):
            layer, share = collapsed
            self._collapsed = CollapsedError(
                f"{share:.0%} of the experts of layer {layer} were dead at step {end - 1} of"
                f" {total}, more than train.max_dead: {recipe.max_dead:g}"
            )
        return point

    def require_alive(self) -> None:
        """Raise CollapsedError if the latest point shows that a layer has collapsed."""
        if self._collapsed is not None:
            raise self._collapsed


def train(
    model: Model,
    corpus: Corpus,
    recipe: Recipe,
    seed: int,
    gate: Gate | None = None,
    deadline: float | None = None,
    *,
    heads: PredictionHeads | None = None,
) -> Iterator[CurvePoint]:
    """Train a model in place and yield the points of its curve; see `TrainingRun`."""
    inputs = TrainingInputs(model, corpus, recipe, seed, heads)
    yield from TrainingRun(inputs, gate=gate, deadline=deadline).points()


def rung_tokens(recipe: Recipe) -> list[int]:
    """Return the training tokens at each rung, where the curve has a row; the end is none.

    A rung lies in the first row of the curve at or after its share of the steps.
    """
    total, ends = recipe.steps, row_ends(recipe.steps)
    wanted = [total * rung / (recipe.rungs + 1) for rung in range(1, recipe.rungs + 1)]
    steps = {next(end for end in ends if end >= share) for share in wanted} - {total}
    return [step * recipe.batch * recipe.context for step in sorted(steps)]


def open_steps(inputs: TrainingInputs) -> Steps:
    """Return the steps of a run: on a GPU none of them makes the host wait."""
    return (DeviceSteps if inputs.device.type == "cuda" else HostSteps)(inputs)


def validation_loss(model: Model, corpus: Corpus, recipe: Recipe) -> float:
    """Return the loss that `validate` gives, in nats per token, without the routing.

    Raises:
        DivergedError: if the loss is not finite.
    """
    return _validation_pass(model, corpus, recipe)[0]


def validate(model: Model, corpus: Corpus, recipe: Recipe) -> Validation:
    """Return the loss of a model on fixed windows of the validation split, and how it routes.

    The model runs in evaluation mode and float32, whatever type the training computed in. Every
    machine gives the same loss, and an exported model gives it too.

    Raises:
        DivergedError: if the loss is not finite.
    """
    names, layers = corpus.domain_names, model.moe_layers()
    meter, with_capacity = RoutingAccumulator(layers, len(names)), RoutingAccumulator(layers)
    domains = corpus.val_domains(recipe.context, recipe.batch, recipe.val_tokens)
    has_capacity = any(moe.capacity_factor is not None for _, moe in layers)

    def count_routing(tokens: torch.Tensor) -> None:
        meter.add(next(domains))
        if has_capacity:  # a capacity has an effect in training mode alone
            model.train()
            model(tokens, dtype=torch.float32)
            with_capacity.add()

    loss, count = _validation_pass(model, corpus, recipe, count_routing)
    rows = [reading.row(names) for reading in meter.read()]
    for row, reading in zip(rows, with_capacity.read(), strict=False):
        row["dropped"] = reading.dropped
    bits = loss / math.log(2) if corpus.is_bytes else None
    return Validation(loss, bits, count, rows)


def _validation_pass(
    model: Model,
    corpus: Corpus,
    recipe: Recipe,
    after_batch: Callable[[torch.Tensor], None] = lambda tokens: None,
) -> tuple[float, int]:
    """Return the mean loss in nats per token, and the number of predictions.

    `after_batch` gets the tokens (batch, context) of each batch after its loss. It may leave the
    model in training mode.

    Raises:
        DivergedError: if the loss is not finite.
    """
    device = next(model.parameters()).device
    was_training = model.training
    total, count = 0.0, 0
    # Not inference mode: training goes on with whatever a layer caches in this pass.
    with torch.no_grad(), cpu_threads(recipe.threads):
        for batch in corpus.val_batches(recipe.context, recipe.batch, recipe.val_tokens):
            tokens, targets = (part.to(device) for part in batch)
            model.eval()
            total += model.loss(tokens, targets, torch.float32).item() * targets.numel()
            count += targets.numel()
            after_batch(tokens)
    model.train(was_training)
    if not math.isfinite(total):
        raise DivergedError("the validation loss was not finite")
    return total / count, count
