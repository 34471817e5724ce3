"""The gate on the output of attention heads: a factor of each head, or of each element."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.model.layers.linear import Linear

GatedBy = Literal["none", "head", "element"]
GateActivation = Literal["sigmoid", "softplus"]


def gate_width(gated_by: str, n_heads: int, v_dim: int) -> int:
    """Return the gates of a token, for H heads with values of a width."""
    return {"none": 0, "head": n_heads, "element": n_heads * v_dim}[gated_by]


def build_gate(
    d_model: int,
    heads: tuple[int, int],
    gated_by: str,
    *,
    activation: str = "sigmoid",
    bias: bool = False,
) -> OutputGate | None:
    """Build the gate of `heads` (number, width of a value); None where there is none."""
    width = gate_width(gated_by, *heads)
    return OutputGate(d_model, width, heads[0], activation, bias) if width else None


class OutputGate(Linear):
    """The heads' output times act(W x + b), b one number for each head.

    The activation is a sigmoid (gated attention, arXiv 2505.06708), or a softplus (Laguna).
    """

    matrices = ("weight",)

    def __init__(
        self,
        d_model: int,
        width: int,
        n_heads: int,
        activation: str = "sigmoid",
        head_biased: bool = False,
    ) -> None:
        super().__init__(d_model, width)
        self.d_model = d_model
        self.width = width
        self.n_heads = n_heads
        self.activation = activation
        self.head_biased = head_biased
        self.head_bias = nn.Parameter(torch.zeros(n_heads)) if head_biased else None

    def gated(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the heads' output (B, S, H, C) times the gates of what they read, (B, S, D)."""
        gate: Tensor = self(x).unflatten(-1, (self.n_heads, -1)).float()  # (B, S, H, C) or 1 of C
        if self.head_bias is not None:
            gate = gate + self.head_bias.float().unsqueeze(-1)
        factors = gate.sigmoid() if self.activation == "sigmoid" else F.softplus(gate)
        return y * factors.to(y.dtype)
