"""Kimi delta attention: linear attention with a decay for each channel. Kinds: kimi_delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import setting
from moenas.model.layers.linear import Convolution, Linear, LowRank
from moenas.model.layers.norms import GatedNorm
from moenas.model.mixers.gated_delta import directions
from moenas.model.mixers.mamba import first_dt_bias, first_log_rates
from moenas.model.mixers.mixer import MOST, Mixer, StateCache
from moenas.model.mixers.scan import CHANNEL_CHUNK, delta_macs, delta_rule
from moenas.records import Cost


@dataclass(frozen=True, kw_only=True)
class KimiDeltaMixer(Mixer, kind="kimi_delta"):
    """Kimi delta attention (arXiv 2510.26692, section 3): the gated delta rule by channel.

    Unlike gated_delta, each channel of a key has its own decay. Low-rank projections give the
    decays and the output gate, and the gate is a sigmoid. FLOPs count the projections and the
    matrix products of the chunked form.

    A training step of 16 sequences of 1,024 tokens keeps 2.6 GiB for each layer on a CPU (8 heads
    of 64). On CUDA it keeps 0.6 GiB, as the backward pass recomputes the rule. One layer at a time
    then takes 3 GiB more.
    """

    n_heads: int = setting("heads", low=1, high=MOST)
    key_dim: int = setting("width of a query or key of a head", low=8, high=MOST, multiple=8)
    value_dim: int = setting("width of the values of a head", low=8, high=MOST, multiple=8)
    rank: int | None = setting(
        "rank of the projections to decays and output gate (Kimi Linear: 128); null: full rank"
        " (Ling hybrid)",
        default=None,
        low=1,
    )
    decay_limit: float | None = setting(
        "L: the logarithm of a decay is -L sigmoid(rate (x + bias)) (Ling hybrid: 5); null:"
        " -rate softplus(x + bias)",
        default=None,
        low=1e-3,
    )
    d_conv: int = setting("tokens under the convolution", default=4, low=2)
    inner_eps: float = setting("added to the mean square in the norm", default=1e-6, low=0.0)

    @property
    def widths(self) -> tuple[int, int]:
        """Width of all keys, and of all values."""
        return self.n_heads * self.key_dim, self.n_heads * self.value_dim

    def cost(self, d_model: int, context: int) -> Cost:
        """Count the projections and the matrix products of the rule. The state does not grow."""
        keys, values = self.widths
        products = d_model * (2 * keys + values + self.n_heads) + values * d_model
        for width in (keys, values):
            products += self.rank * (d_model + width) if self.rank else d_model * width
        params = products + (2 * keys + values) * self.d_conv
        params += keys + self.n_heads + self.value_dim
        flops = 2 * products + -(-self.rule_flops(context) // context)
        return Cost(params=params, active_params=params, flops_per_token=flops)

    def rule_flops(self, context: int) -> int:
        """Return the FLOPs of the rule over a sequence."""
        sizes = self.n_heads, self.key_dim, self.value_dim
        return 2 * delta_macs(*sizes, context, CHANNEL_CHUNK)

    def surplus_flops(self, d_model: int, context: int) -> int:
        """Return what rounding the FLOPs of a token up has added to the sequence, negated."""
        return -(-self.rule_flops(context) % context)

    def build(self, d_model: int) -> nn.Module:
        """Build the mixer at a model width."""
        keys, values = self.widths
        return KimiDelta(
            Linear(d_model, 2 * keys + values + self.n_heads),
            Convolution(2 * keys + values, self.d_conv, False),
            ChannelDecay(self._build_projection(d_model, keys), self.n_heads, self.decay_limit),
            self._build_projection(d_model, values),
            GatedNorm(values, self.n_heads, self.inner_eps, False, "sigmoid"),
            Linear(values, d_model),
        )

    def _build_projection(self, d_model: int, width: int) -> nn.Module:
        return Linear(d_model, width) if self.rank is None else LowRank(d_model, self.rank, width)


class ChannelDecay(nn.Module):
    """The logarithm of the decay of each channel, from a projection p of the tokens.

    It is -rate softplus(p + bias), or with a limit L, -L sigmoid(rate (p + bias)). A head has one
    rate, and a channel one bias.
    """

    matrices: tuple[str, ...] = ()

    def __init__(self, project: nn.Module, n_heads: int, limit: float | None) -> None:
        super().__init__()
        self.project = project
        self.n_heads = n_heads
        self.limit = limit
        self.log_rate = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.width))

    @property
    def width(self) -> int:
        """Channels of all heads."""
        project: Any = self.project
        return int(project.d_out)

    def start(self, generator: torch.Generator) -> None:
        """Draw rates from 1 to 16 and time steps as in Mamba-2."""
        self.log_rate.data.copy_(first_log_rates(self.n_heads, generator))
        self.dt_bias.data.copy_(first_dt_bias(self.width, generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, H, M), float32, at most 0."""
        steps = (self.project(x).float() + self.dt_bias.float()).unflatten(-1, (self.n_heads, -1))
        rates = self.log_rate.float().exp().unsqueeze(-1)
        if self.limit is None:
            decays: Tensor = F.softplus(steps) * -rates
        else:
            decays = (rates * steps).sigmoid() * -self.limit
        return decays


class KimiDelta(nn.Module):
    """out(norm(rule(convolution(q, k, v), decay, beta)) * sigmoid(gate))."""

    def __init__(
        self,
        project: Linear,
        convolution: Convolution,
        decay: ChannelDecay,
        gate: nn.Module,
        norm: GatedNorm,
        out: Linear,
    ) -> None:
        super().__init__()
        self.project = project
        self.convolution = convolution
        self.decay = decay
        self.gate = gate
        self.norm = norm
        self.out = out

    def forward(self, x: Tensor, cache: StateCache | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it."""
        cache = cache or StateCache()
        n_heads, values, width = self.decay.n_heads, self.out.d_in, self.convolution.width
        # 1. Project to q, k and v together, and beta (B, S, H).
        qkv, beta = self.project(x).split((width, n_heads), dim=-1)
        # 2. Convolve, then split into q and k (B, S, H, M) of norm 1, and v (B, S, H, P).
        qkv, cache.before = self.convolution(qkv, cache.before)
        keys = (width - values) // 2
        q, k, v = F.silu(qkv).float().split((keys, keys, values), dim=-1)
        q, k = (directions(part, n_heads) for part in (q, k))
        heads = q * q.shape[-1] ** -0.5, k, v.unflatten(-1, (n_heads, -1))
        # 3. Apply the rule with the logarithms of the decays (B, S, H, M), then norm and gate.
        y, cache.state = delta_rule(heads, self.decay(x), beta.float().sigmoid(), cache.state)
        cache.length += x.shape[1]
        out: Tensor = self.out(self.norm(y.flatten(-2), self.gate(x)))
        return out

    def new_cache(self, batch: int, context: int) -> StateCache:
        """Return an empty cache."""
        return StateCache()
