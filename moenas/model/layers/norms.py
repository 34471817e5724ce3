"""Norms, computed in float32: over a token, over a head, over a gated output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["rmsnorm", "layernorm", "layernorm_bias", "nonparametric", "dyt"]


def build_norm(norm: str, width: int, eps: float) -> nn.Module:
    """Build a norm by its name."""
    build, _, _ = NORMS[norm]
    return build(width, eps)


def norm_params(norm: str, width: int) -> int:
    """Return the number of parameters of a norm."""
    _, each, further = NORMS[norm]
    return each * width + further


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich, arXiv 1910.07467)."""

    matrices: tuple[str, ...] = ()

    def __init__(self, width: int, eps: float = 1e-6, weighted: bool = True) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weighted = weighted
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the dtype stays."""
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), (self.width,), weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * weight + bias` (Ba et al., arXiv 1607.06450).

    Without the bias, as in PaLM (arXiv 2204.02311, section 2), or without both, as in OLMo
    (arXiv 2402.00838, section 2.1).
    """

    matrices: tuple[str, ...] = ()

    def __init__(
        self, width: int, eps: float = 1e-6, weighted: bool = True, biased: bool = False
    ) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weighted = weighted
        self.biased = biased
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None
        self.bias = nn.Parameter(torch.zeros(width)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the dtype stays."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), (self.width,), weight, bias, self.eps).to(x.dtype)


class DynamicTanh(nn.Module):
    """`tanh(alpha x) * weight + bias`, alpha one number (Zhu et al., arXiv 2503.10622)."""

    matrices: tuple[str, ...] = ()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Squash the last dimension; the dtype stays."""
        squashed = (x.float() * self.alpha.float()).tanh()
        return (squashed * self.weight.float() + self.bias.float()).to(x.dtype)


NORMS: dict[str, tuple[Callable[[int, float], nn.Module], int, int]] = {
    "rmsnorm": (RMSNorm, 1, 0),
    "layernorm": (LayerNorm, 1, 0),
    "layernorm_bias": (lambda width, eps: LayerNorm(width, eps, biased=True), 2, 0),
    "nonparametric": (lambda width, eps: LayerNorm(width, eps, weighted=False), 0, 0),
    "dyt": (lambda width, _eps: DynamicTanh(width), 2, 1),
}
"""Name -> how a norm is built from width and eps, parameters for each element, further ones."""


class GatedNorm(nn.Module):
    """RMSNorm over each of `groups` equal parts, and a gate: act(z) before it or after it.

    Before: `norm(x act(z)) * weight`, with a weight for all parts (Mamba-2, arXiv 2405.21060).
    After: `norm(x) * weight * act(z)`, the weight shared by the parts (gated DeltaNet, arXiv
    2412.06464: the parts are heads). The gate is silu, or sigmoid (Kimi Linear).
    """

    matrices: tuple[str, ...] = ()

    def __init__(
        self, width: int, groups: int, eps: float, gate_first: bool, gate: str = "silu"
    ) -> None:
        super().__init__()
        self.width = width
        self.groups = groups
        self.eps = eps
        self.gate_first = gate_first
        self.gate = gate
        self.weight = nn.Parameter(torch.ones(width if gate_first else width // groups))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalise `x` (..., width) by the gate `z` of the same shape, to the dtype of `z`."""
        gate = z.float().sigmoid() if self.gate == "sigmoid" else F.silu(z.float())
        y = x.float() * gate if self.gate_first else x.float()
        parts = y.unflatten(-1, (self.groups, -1))
        weight = self.weight.float()
        if self.gate_first:
            return (F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * weight).to(
                z.dtype
            )
        normed = F.rms_norm(parts, parts.shape[-1:], weight, self.eps).flatten(-2)
        return (normed * gate).to(z.dtype)
