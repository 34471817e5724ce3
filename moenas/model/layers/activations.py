"""Activations between the up and the down projection of a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import setting
from moenas.grammar.conditions import none_of, one_of

Name = Literal[
    "swiglu", "geglu", "geglu_tanh", "reglu", "glu", "bilinear",
    "gelu", "gelu_tanh", "silu", "relu", "relu2",
]  # fmt: skip


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """Return relu(x)^2 (Primer, So et al., arXiv 2109.08668)."""
    return F.relu(x).square()


def same(x: Tensor) -> Tensor:
    """Return x."""
    return x


# Shazeer, arXiv 2002.05202: act(gate) * up, with the two halves of an up projection of twice the
# width.
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": F.relu,
    "glu": torch.sigmoid,
    "bilinear": same,
}

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": relu2,
}

UNGATED = one_of(*PLAIN)
"""Activations beside which the fields of a gate have no effect."""


def up_width(width: int, activation: str) -> int:
    """Return the rows of the up projection: a gate and a value for each hidden unit if gated."""
    return 2 * width if activation in GATED else width


class Activation(nn.Module):
    """act(gate) * (up + shift), or act(up) without a gate.

    With a `limit` L the gate is cut to at most L and up to -L..L before that. `alpha` sharpens
    the gate of swiglu: gate * sigmoid(alpha * gate). gpt-oss has L 7, alpha 1.702 and shift 1.
    A `activated_limit` L cuts act(gate) to at most L, and up to -L..L (Step-3.5).
    """

    def __init__(
        self,
        name: str,
        limit: float | None = None,
        alpha: float = 1.0,
        shift: float = 0.0,
        activated_limit: float | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.limit = limit
        self.alpha = alpha
        self.shift = shift
        self.activated_limit = activated_limit

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., up_width) to (..., width)."""
        if self.name not in GATED:
            return PLAIN[self.name](h)
        gate, up = h.chunk(2, dim=-1)
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
        if self.activated_limit is not None:
            up = up.clamp(min=-self.activated_limit, max=self.activated_limit)
        if self.shift:
            up = up + self.shift
        if self.alpha != 1.0:
            activated = gate * torch.sigmoid(self.alpha * gate)
        else:
            activated = GATED[self.name](gate)
        if self.activated_limit is not None:
            activated = activated.clamp(max=self.activated_limit)
        return activated * up


@dataclass(frozen=True, kw_only=True)
class Activated:
    """The fields of an activation, shared by the kinds of feed-forward layers."""

    activation: Name = setting(
        "swiglu, geglu, geglu_tanh, reglu, glu and bilinear are gated: their up projection is"
        " twice as wide (arXiv 2002.05202); relu2 is relu(x)^2 (arXiv 2109.08668)",
        default="swiglu",
    )
    gate_limit: float | None = setting(
        "L: a gate is cut to at most L, the value beside it to -L..L (gpt-oss: 7); null: no cut",
        default=None,
        low=1e-3,
        without_effect={"activation": UNGATED},
    )
    gate_alpha: float = setting(
        "sharpness of swiglu: gate * sigmoid(gate_alpha * gate) (gpt-oss: 1.702)",
        default=1.0,
        low=1e-3,
        without_effect={"activation": none_of("swiglu")},
    )
    up_shift: float = setting(
        "added to the value beside a gate (gpt-oss: 1)",
        default=0.0,
        without_effect={"activation": UNGATED},
    )

    activated_limit: float | None = setting(
        "L: an activated gate is cut to at most L, the value beside it to -L..L (Step-3.5); null:"
        " no cut",
        default=None,
        low=1e-3,
        without_effect={"activation": UNGATED},
    )

    def canonical_activation(self) -> dict[str, Any]:
        """Return the fields of the activation, those without effect reset."""
        gated = self.activation in GATED
        return {
            "gate_limit": self.gate_limit if gated else None,
            "gate_alpha": self.gate_alpha if self.activation == "swiglu" else 1.0,
            "up_shift": self.up_shift if gated else 0.0,
            "activated_limit": self.activated_limit if gated else None,
        }

    def build_activation(self) -> Activation:
        """Build the activation; what has no effect is left out."""
        activation = self.canonical_activation()
        return Activation(
            self.activation,
            activation["gate_limit"],
            activation["gate_alpha"],
            activation["up_shift"],
            activation["activated_limit"],
        )
