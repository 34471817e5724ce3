"""The family of feed-forward layers and its plainest kind: dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import Part, changed, setting
from moenas.model.layers.activations import Activated, Activation, up_width
from moenas.model.layers.linear import Linear
from moenas.records import Cost


@dataclass(frozen=True, kw_only=True)
class FFN(Part):
    """The family of feed-forward layers: modules (B, S, D) -> (B, S, D), token by token.

    The module is called as `ffn(x)`. One that derives from `ReadsInputs` is run with the
    `LayerInputs` of the pass, such as the token ids.
    """

    @property
    def causal(self) -> bool:
        """Whether the output at a token depends on no later token, in training too."""
        return True


@dataclass(frozen=True, kw_only=True)
class DenseFFN(Activated, FFN, kind="dense"):
    """One feed-forward network for every token."""

    d_ff: int = setting("width of the hidden layer", low=8, multiple=8)
    bias: bool = setting("both projections add a bias", default=False)

    def canonical(self) -> Self:
        """Reset what the activation does not use."""
        return changed(self, **self.canonical_activation())

    def cost(self, d_model: int, context: int) -> Cost:
        """Count two projections, the up one doubled if gated."""
        return network_cost(d_model, self.d_ff, self.activation, self.bias)

    def build(self, d_model: int) -> nn.Module:
        """Build the layer at a model width."""
        return FeedForward(d_model, self.d_ff, self.build_activation(), self.bias)


def network_cost(d_model: int, width: int, activation: str, bias: bool) -> Cost:
    """Return the cost of one feed-forward network; none of width 0."""
    up = up_width(width, activation)
    weights = d_model * (up + width)
    params = weights + (up + d_model if bias and width else 0)
    return Cost(params=params, active_params=params, flops_per_token=2 * weights)


class FeedForward(nn.Module):
    """down(act(up(x))): one network for every token."""

    def __init__(
        self, d_model: int, width: int, activation: Activation, bias: bool = False
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.width = width
        self.activation = activation
        self.bias = bias
        self.up = Linear(d_model, up_width(width, activation.name), bias)
        self.down = Linear(width, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        y: Tensor = self.down(self.activation(self.up(x)))
        return y


class SigmoidGatedFeedForward(FeedForward):
    """sigmoid(w x) * network(x): the shared expert of Qwen2-MoE (arXiv 2407.10671)."""

    def __init__(
        self, d_model: int, width: int, activation: Activation, bias: bool = False
    ) -> None:
        super().__init__(d_model, width, activation, bias)
        self.gate = Linear(d_model, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return F.sigmoid(self.gate(x)) * super().forward(x)
