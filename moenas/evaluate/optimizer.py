"""AdamW, its learning rates by width and batch, and their schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moenas.evaluate.trainee import Trainee
from moenas.model.architecture import Architecture, Model
from moenas.model.layers.linear import matrices
from moenas.model.multi_token import PredictionHeads
from moenas.space.sections import Recipe

BASE_WIDTH, BASE_RATE = 64, 0.004
"""The width at which all weights have the same learning rate, and that rate."""
BASE_STEP_TOKENS = 1024
"""The tokens of a step at which that rate was fitted."""


def learning_rate(architecture: Architecture, recipe: Recipe) -> float:
    """Return the peak rate of a candidate's matrices: the recipe's, or that of the rule.

    The rule is `lr_scale * 0.256 / d_model`; `batch_scale` stands in for an `lr_scale` of null.
    The embedding has `d_model / 64` times this rate, which is equal at every width. This is muP
    for Adam (arXiv 2203.03466, table 3): 1 / width for hidden and output matrices, constant for
    input weights. Norms have the rate of the matrices. docs/learning_rate.md measures it.
    """
    if recipe.lr is not None:
        return recipe.lr
    scale = batch_scale(recipe) if recipe.lr_scale is None else recipe.lr_scale
    return scale * BASE_RATE * BASE_WIDTH / architecture.d_model


def batch_scale(recipe: Recipe) -> float:
    """Return the factor on the learning rate by the tokens of a step, 1 at 1,024 of them.

    It is their cube root, fitted to the runs of `benchmarks/learning_rate.py`.
    """
    return math.pow(recipe.batch * recipe.context / BASE_STEP_TOKENS, 1 / 3)


def schedule(step: int, recipe: Recipe) -> float:
    """Return the fraction of the peak rate at a step, counted from 0.

    Warmup-stable-decay (MiniCPM, arXiv 2404.06395), with linear warm-up and decay. No step has a
    rate of 0.
    """
    steps = recipe.steps
    up = (step + 1) / max(1.0, recipe.warmup * steps)
    down = (steps - step) / max(1.0, recipe.decay * steps)
    return min(1.0, up, down)


class AdamW:
    """AdamW (arXiv 1711.05101), bit for bit `torch.optim.AdamW(fused=True)`.

    Weight decay applies to the `matrices` of a module, not to norms, biases and rates. The step is
    torch's own kernel. The optimizer class of torch imports its compiler, over 2 seconds of CPU
    time.
    """

    def __init__(self, model: Model, recipe: Recipe, heads: PredictionHeads | None = None) -> None:
        self.recipe = recipe
        trainee = Trainee(model, heads)
        weights = [p for p in trainee.parameters() if p.requires_grad]
        decaying = {id(p) for module in trainee.modules() for p in matrices(module)}
        decaying.discard(id(model.embedding))
        self.matrices = [p for p in weights if id(p) in decaying]
        self.vectors = [p for p in weights if id(p) not in decaying and p is not model.embedding]
        self.embedding = model.embedding
        self.embedding_factor = model.d_model / BASE_WIDTH
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in weights}
        self.steps = {p: torch.zeros((), device=p.device) for p in weights}

    def step(
        self, lr: float | Tensor, scale: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Update all weights that have a gradient; `lr` is the rate of the matrices.

        For a step that reads nothing on the host, `lr`, `scale` and `skip` are float32 tensors of
        one element on the device. Gradients are divided by `scale`, and a `skip` of 1 leaves the
        weights as they are.
        """
        self._update(self.matrices, lr, self.recipe.weight_decay, scale, skip)
        embedding_lr = lr * self.embedding_factor
        self._update([self.embedding], embedding_lr, self.recipe.weight_decay, scale, skip)
        self._update(self.vectors, lr, 0.0, scale, skip)

    @torch.no_grad()
    def _update(
        self,
        weights: list[nn.Parameter],
        lr: float | Tensor,
        decay: float,
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        updated = [p for p in weights if p.grad is not None]
        adamw(
            list(updated),
            [p.grad for p in updated if p.grad is not None],
            [self.moments[p][0] for p in updated],
            [self.moments[p][1] for p in updated],
            [],
            [self.steps[p] for p in updated],
            lr=lr, weight_decay=decay, beta1=self.recipe.beta1, beta2=self.recipe.beta2, eps=1e-8,
            fused=True, amsgrad=False, maximize=False, grad_scale=scale, found_inf=skip,
        )  # fmt: skip
