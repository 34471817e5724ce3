"""Router logits: their input, a product or a cosine, and their scaling.

Kinds: linear, cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import Component, changed, setting
from moenas.grammar.conditions import one_of
from moenas.model.layers.norms import RMSNorm

# Shapes: T tokens, D model width, E experts, H width of the hidden layer or else D.


@dataclass(frozen=True, kw_only=True)
class Logits(Component):
    """The logits of a router: one number for each expert, computed in float32."""

    input: Literal["ffn", "stream", "block"] = setting(
        "input of the router: the input of its layer; the input of the norm before the layer (Gemma"
        " 4); or the input of the block, before the mixer (SmallThinker, arXiv 2507.20984)",
        default="ffn",
    )
    input_norm: bool = setting("RMSNorm of the input of the router (Gemma 4)", default=False)
    jitter: float = setting(
        "in training the input is multiplied by uniform noise from 1 - jitter to 1 + jitter (arXiv"
        " 2101.03961, section 2.4)",
        default=0.0,
        low=0.0,
        high=1.0,
    )
    hidden: int | None = setting(
        "width of a hidden layer before the logits; null: none", default=None, low=8, multiple=8
    )
    hidden_activation: Literal["gelu", "none"] = setting(
        "activation of the hidden layer; none: the projection of X-MoE",
        default="gelu",
        without_effect={"hidden": one_of(None)},
    )
    add_bias: bool = setting("the logits have a trained bias (gpt-oss)", default=False)
    standardize: bool = setting(
        "standardise the logits of a token over the experts (Skywork-MoE, arXiv 2406.06563, eq. 6)",
        default=False,
    )
    multiplier: float = setting(
        "factor on the logits (lambda of Skywork-MoE; Gemma 4: d_model^-0.5)",
        default=1.0,
        low=1e-6,
    )
    cap: float | None = setting(
        "soft cap c of the logits: c tanh(z / c) (Laguna); null: none", default=None, low=0.1
    )

    module: ClassVar[type[RouterLinear]]
    """The class of the module that `build` returns."""

    @property
    def has_temperature(self) -> bool:
        """Whether there is a trained factor on the logits."""
        return False

    def invalid_among(self, n_experts: int) -> str | None:
        """Return why the logits do not fit a number of experts, or None."""
        if n_experts <= 2 and self.standardize:
            return (
                f"with standardize: true and {n_experts} experts all tokens have the same logits up"
                " to their order, so the router learns nothing; take 3 experts or leave it out"
            )
        return None

    def canonical(self) -> Self:
        """Reset the activation if there is no hidden layer."""
        return changed(self, hidden_activation=self.hidden_activation if self.hidden else "gelu")

    def n_weights(self, d_model: int, n_experts: int) -> int:
        """Return the number of elements of the matrices."""
        hidden = d_model * self.hidden if self.hidden else 0
        return (self.hidden or d_model) * n_experts + hidden

    def n_params(self, d_model: int, n_experts: int) -> int:
        """Return the number of parameters: matrices, bias, input norm and temperature."""
        bias, norm = n_experts * self.add_bias, d_model * self.input_norm
        return self.n_weights(d_model, n_experts) + bias + norm + self.has_temperature

    def build_input(self, d_model: int) -> RouterInput:
        """Build the input of the logits."""
        return RouterInput(self.input, RMSNorm(d_model) if self.input_norm else None)

    def build(self, d_model: int, n_experts: int) -> nn.Module:
        """Build the logits of E experts."""
        width = self.hidden
        return self.module(
            width or d_model,
            n_experts,
            has_bias=self.add_bias,
            jitter=self.jitter,
            hidden=HiddenLayer(d_model, width, self.hidden_activation) if width else None,
            scaling=LogitScaling(self.multiplier, self.standardize, self.cap),
        )


class RouterInput(nn.Module):
    """The input of a router, with an optional norm.

    `source` is "ffn", the input of its layer; "stream", the input of the norm before that layer;
    or "block", the input of the block, before the mixer.
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


class LogitScaling(nn.Module):
    """Standardise the logits z of a token over the experts, scale them, and cap them.

    The steps are (z - mean) / sqrt(variance + 1e-6), then the factor `scale`, lambda of Skywork-MoE
    (arXiv 2406.06563, eq. 6), then c tanh(z / c). The first and the last one are optional.
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


class RouterLinear(nn.Module):
    """scaling(W h + b) in float32, with h = x or the `hidden` layer of x.

    In training x is multiplied by noise from 1 - jitter to 1 + jitter (Switch Transformer, arXiv
    2101.03961, section 2.4).
    """

    matrices = ("weight",)

    bias: Tensor | None

    def __init__(
        self,
        width: int,
        n_experts: int,
        *,
        has_bias: bool,
        jitter: float,
        hidden: nn.Module | None,
        scaling: LogitScaling,
    ) -> None:
        super().__init__()
        self.width = width
        self.n_experts = n_experts
        self.has_bias = has_bias
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(n_experts, width))
        self.bias = nn.Parameter(torch.zeros(n_experts)) if has_bias else None
        self.hidden = hidden
        self.scaling = scaling
        self.temperature = self.build_temperature()

    def build_temperature(self) -> nn.Parameter | None:
        """Build the trained factor on the products; None for a linear layer."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, E)."""
        x = x.float()
        if self.jitter and self.training:
            x = x * (1 + self.jitter * (2 * torch.rand_like(x) - 1))
        if self.hidden is not None:
            x = self.hidden(x)
        bias = None if self.bias is None else self.bias.float()
        logits: Tensor = self.scaling(self.products(x, bias))
        return logits

    def products(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """Map the hidden layer (T, H) to products (T, E)."""
        return F.linear(h, self.weight.float(), bias)


class RouterCosine(RouterLinear):
    """scaling(e^t cos(h, w_i) + b), with a trained t that starts at 0 (X-MoE, arXiv 2204.09179).

    X-MoE divides by a trained temperature, and e^t is its inverse. Standardised logits without a
    bias have no t, because standardisation cancels it.
    """

    matrices = ("weight",)

    def build_temperature(self) -> nn.Parameter | None:
        """Build the trained factor (1,), if it has an effect."""
        trained = self.has_bias or not self.scaling.standardize
        return nn.Parameter(torch.zeros(1)) if trained else None

    def products(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """Map the hidden layer (T, H) to products (T, E)."""
        logits = F.linear(F.normalize(h, dim=-1), F.normalize(self.weight.float(), dim=-1))
        if self.temperature is not None:
            logits = logits * self.temperature.float().exp()
        return logits if bias is None else logits + bias


@dataclass(frozen=True, kw_only=True)
class LinearLogits(Logits, kind="linear"):
    """The product of a token with a trained vector of each expert."""

    module = RouterLinear


@dataclass(frozen=True, kw_only=True)
class CosineLogits(Logits, kind="cosine"):
    """The cosine of a token with a trained vector of each expert, times one trained factor (X-MoE,
    arXiv 2204.09179)."""

    module = RouterCosine

    @property
    def has_temperature(self) -> bool:
        """Whether there is a trained factor; standardised logits without a bias cancel it."""
        return self.add_bias or not self.standardize


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
