"""The logits of a router: what it reads, a matrix or cosines, and what becomes of the numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes: T tokens, D model width, E experts, H width of the hidden layer or else D.


class RouterInput(nn.Module):
    """What a router reads, through a norm of its own or as it is.

    `source` is "ffn", the input of its layer; "stream", what the norm before that layer reads; or
    "block", the stream before the mixer of the block.
    """

    def __init__(self, source: str, norm: nn.Module | None) -> None:
        super().__init__()
        self.source = source
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, D), float32 if there is a norm."""
        normed: Tensor = x if self.norm is None else self.norm(x.float())
        return normed


class HiddenLayer(nn.Module):
    """gelu(V x), or V x with the activation "none"."""

    matrices = ("weight",)

    def __init__(self, d_model: int, width: int, activation: str) -> None:
        super().__init__()
        self.d_model = d_model
        self.width = width
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(width, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, H), float32 both."""
        h = F.linear(x, self.weight.float())
        return F.gelu(h) if self.activation == "gelu" else h


class LogitShape(nn.Module):
    """scale * z, of which z is standardised first, and soft-capped to c tanh(z / c).

    Standardised over the experts of a token: (z - mean) / sqrt(variance + 1e-6). With it `scale` is
    the lambda of Skywork-MoE (arXiv 2406.06563, eq. 6).
    """

    def __init__(self, scale: float, standardize: bool, cap: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.standardize = standardize
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        """Map (T, E) to (T, E)."""
        if self.standardize:
            logits = F.layer_norm(logits, logits.shape[-1:], eps=1e-6)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


class RouterLogits(nn.Module):
    """shape(W h + b) in float32, with h = x or the `hidden` layer of x.

    In training x is multiplied by noise from 1 - jitter to 1 + jitter (Switch Transformer, arXiv
    2101.03961, section 2.4).
    """

    matrices = ("weight",)

    bias: Tensor | None

    def __init__(
        self,
        width: int,
        n_experts: int,
        has_bias: bool,
        jitter: float,
        hidden: nn.Module | None,
        shape: LogitShape,
    ) -> None:
        super().__init__()
        self.width = width
        self.n_experts = n_experts
        self.has_bias = has_bias
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(n_experts, width))
        self.bias = nn.Parameter(torch.zeros(n_experts)) if has_bias else None
        self.hidden = hidden
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, E)."""
        x = x.float()
        if self.jitter and self.training:
            x = x * (1 + self.jitter * (2 * torch.rand_like(x) - 1))
        if self.hidden is not None:
            x = self.hidden(x)
        bias = None if self.bias is None else self.bias.float()
        logits: Tensor = self.shape(self.products(x, bias))
        return logits

    def products(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """Map (T, H) to (T, E)."""
        return F.linear(h, self.weight.float(), bias)


class CosineLogits(RouterLogits):
    """shape(e^t cos(h, w_i) + b), with a trained t that starts at 0 (X-MoE, arXiv 2204.09179).

    X-MoE divides by a trained temperature; e^t is its inverse. Where logits without a bias are
    standardised there is none, for it would have no effect.
    """

    matrices = ("weight",)

    temperature: Tensor | None

    def __init__(
        self,
        width: int,
        n_experts: int,
        has_bias: bool,
        jitter: float,
        hidden: nn.Module | None,
        shape: LogitShape,
    ) -> None:
        super().__init__(width, n_experts, has_bias, jitter, hidden, shape)
        trained = has_bias or not shape.standardize
        self.temperature = nn.Parameter(torch.zeros(1)) if trained else None

    def products(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """Map (T, H) to (T, E)."""
        logits = F.linear(F.normalize(h, dim=-1), F.normalize(self.weight.float(), dim=-1))
        if self.temperature is not None:
            logits = logits * self.temperature.float().exp()
        return logits if bias is None else logits + bias


class NoLogits(nn.Module):
    """0 for every expert."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, E)."""
        return torch.zeros(x.shape[0], self.n_experts, device=x.device)


class Noise(nn.Module):
    """softplus(W_n x): the standard deviation of the noise (arXiv 1701.06538, eq. 4)."""

    matrices = ("weight",)

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.n_experts = n_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, E), float32."""
        return F.softplus(F.linear(x.float(), self.weight.float()))
