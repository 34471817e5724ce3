"""Selective state-space mixers, whose state has a fixed size. Kinds: mamba, mamba2."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import setting
from moenas.grammar.conditions import one_of
from moenas.model.layers.linear import Convolution, Linear
from moenas.model.layers.norms import GatedNorm, RMSNorm
from moenas.model.mixers.mixer import Mixer, StateCache
from moenas.model.mixers.scan import read_channels, scan_heads, scan_macs
from moenas.records import Cost

DT_RANGE = (1e-3, 1e-1)
"""Bounds of the initial time steps, which are log-uniform (arXiv 2312.00752, section 3.6)."""


@dataclass(frozen=True, kw_only=True)
class Mamba2Mixer(Mixer, kind="mamba2"):
    """Mamba-2 (arXiv 2405.21060): each token sets one decay for each head.

    One projection gives the gate, the values, B, C and the time step. A short convolution runs
    over the values, B and C. A gated norm follows the scan. FLOPs count the projections and the
    matrix products of the chunked scan. The convolution and the carried state are elementwise.

    A training step of 16 sequences of 1,024 tokens keeps 1.5 GiB for each layer on a CPU (16 heads
    of 64, d_state 128). On CUDA it keeps 0.7 GiB, because the backward pass recomputes the scan.
    """

    n_heads: int = setting("heads", low=1)
    head_dim: int = setting("width of a head", low=8, multiple=8)
    d_state: int = setting("width of B and C: the state of a head is d_state x head_dim", low=1)
    n_state_groups: int = setting(
        "groups of heads that share B and C, and parts of the gated norm", default=1, low=1
    )
    d_conv: int = setting("tokens under the convolution", default=4, low=2)
    conv_bias: bool = setting("the convolution has a bias", default=True)
    proj_bias: bool = setting("both projections have a bias", default=False)
    dt_floor: float = setting(
        "lower bound of the time steps (Nemotron: 0.001)", default=0.0, low=0.0
    )
    inner_eps: float = setting("added to the mean square in the norm", default=1e-5, low=0.0)

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.n_heads * self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: values, B and C."""
        return self.width + 2 * self.n_state_groups * self.d_state

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.n_heads % self.n_state_groups:
            return f"n_state_groups ({self.n_state_groups}) must divide n_heads ({self.n_heads})"
        return None

    def cost(self, d_model: int, context: int) -> Cost:
        """Count two projections and the matrix products of the scan. The state does not grow."""
        into = self.width + self.conv_width + self.n_heads
        products = d_model * (into + self.width)
        params = products + self.conv_width * (self.d_conv + self.conv_bias)
        params += 3 * self.n_heads + self.width + (into + d_model) * self.proj_bias
        flops = 2 * products + -(-self.scan_flops(context) // context)
        return Cost(params=params, active_params=params, flops_per_token=flops)

    def scan_flops(self, context: int) -> int:
        """Return the FLOPs of the scan over a sequence."""
        groups = self.n_state_groups
        return 2 * scan_macs(self.n_heads, groups, self.d_state, self.head_dim, context)

    def surplus_flops(self, d_model: int, context: int) -> int:
        """Return what rounding the FLOPs of a token up has added to the sequence, negated."""
        return -(-self.scan_flops(context) % context)

    def build(self, d_model: int) -> nn.Module:
        """Build the mixer at a model width."""
        into = self.width + self.conv_width + self.n_heads
        return Mamba2(
            Linear(d_model, into, self.proj_bias),
            Convolution(self.conv_width, self.d_conv, self.conv_bias),
            GatedNorm(self.width, self.n_state_groups, self.inner_eps, True),
            Linear(self.width, d_model, self.proj_bias),
            self.n_heads,
            self.dt_floor,
        )


class DecayingHeads(nn.Module):
    """The parts of a mixer whose heads have a state that decays, with a rate for each head."""

    def __init__(
        self, project: Linear, convolution: Convolution, norm: GatedNorm, out: Linear, n_heads: int
    ) -> None:
        super().__init__()
        self.project = project
        self.convolution = convolution
        self.norm = norm
        self.out = out
        self.n_heads = n_heads
        self.log_rate = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))

    def start(self, generator: torch.Generator) -> None:
        """Draw rates from 1 to 16 and time steps within DT_RANGE, as in Mamba-2."""
        self.log_rate.data.copy_(first_log_rates(self.n_heads, generator))
        self.dt_bias.data.copy_(first_dt_bias(self.n_heads, generator))


class Mamba2(DecayingHeads):
    """out(norm(scan(convolution(project(x))), gate)), with a decay for each head."""

    matrices: tuple[str, ...] = ()

    def __init__(
        self,
        project: Linear,
        convolution: Convolution,
        norm: GatedNorm,
        out: Linear,
        n_heads: int,
        dt_floor: float,
    ) -> None:
        super().__init__(project, convolution, norm, out, n_heads)
        self.dt_floor = dt_floor
        self.skip = nn.Parameter(torch.ones(n_heads))

    def forward(self, x: Tensor, cache: StateCache | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it."""
        cache = cache or StateCache()
        width, conv_width = self.out.d_in, self.convolution.width
        # 1. Project to the gate (B, S, H P), the convolution's input and the time steps (B, S, H).
        gate, vbc, dt = self.project(x).split((width, conv_width, self.n_heads), dim=-1)
        # 2. Convolve, then split into values (B, S, H, P), B and C (both B, S, G, M).
        vbc, cache.before = self.convolution(vbc, cache.before)
        states = (conv_width - width) // 2
        v, b, c = F.silu(vbc).float().split((width, states, states), dim=-1)
        v = v.unflatten(-1, (self.n_heads, -1))
        b, c = (m.unflatten(-1, (self.norm.groups, -1)) for m in (b, c))
        # 3. Discretise: the time step dt > 0, and the logarithm of the decay, -dt rate.
        dt = F.softplus(dt.float() + self.dt_bias.float())
        dt = dt.clamp_min(self.dt_floor) if self.dt_floor else dt
        steps = -dt * self.log_rate.float().exp()
        # 4. Scan over the tokens, add the skip connection, then gate, norm and project.
        y, cache.state = scan_heads(v * dt.unsqueeze(-1), steps, b, c, cache.state)
        y = y + v * self.skip.float().unsqueeze(-1)
        cache.length += x.shape[1]
        out: Tensor = self.out(self.norm(y.flatten(-2), gate))
        return out

    def new_cache(self, batch: int, context: int) -> StateCache:
        """Return an empty cache."""
        return StateCache()


def first_log_rates(n_heads: int, generator: torch.Generator) -> Tensor:
    """Return the logarithms (H,) of rates that are uniform from 1 to 16."""
    return torch.empty(n_heads).uniform_(1, 16, generator=generator).log()


def first_dt_bias(width: int, generator: torch.Generator) -> Tensor:
    """Return biases (width,) whose softplus is log-uniform within DT_RANGE."""
    low, high = (math.log(end) for end in DT_RANGE)
    dt = torch.empty(width).uniform_(low, high, generator=generator).exp()
    return dt + (-torch.expm1(-dt)).log()


@dataclass(frozen=True, kw_only=True)
class MambaMixer(Mixer, kind="mamba"):
    """Mamba (arXiv 2312.00752): each token sets the decays of the states of every channel.

    With RMSNorms of dt, B and C it is the mixer of Jamba (arXiv 2403.19887). FLOPs count the
    projections and the product of C and the state. The scan itself is elementwise.

    A training step of 16 sequences of 1,024 tokens keeps 6.6 GiB for each layer on a CPU (d_inner
    1024). On CUDA it keeps 0.6 GiB, because the backward pass recomputes the scan. One layer at a
    time then takes 8 GiB more. The scan consists of hundreds of small operations.
    """

    d_inner: int = setting("channels", low=8, multiple=8)
    d_state: int = setting("numbers in the state of a channel", default=16, low=1)
    dt_rank: int | None = setting(
        "rank of the projection to the time steps",
        derived="ceil(d_model / 16)",
        low=1,
    )
    d_conv: int = setting("tokens under the convolution", default=4, low=2)
    conv_bias: bool = setting("the convolution has a bias", default=True)
    proj_bias: bool = setting("the outer projections have a bias", default=False)
    inner_norm: bool = setting("RMSNorm of dt, B and C (Jamba)", default=False)
    inner_eps: float = setting(
        "added to the mean square in inner_norm",
        default=1e-6,
        low=0.0,
        without_effect={"inner_norm": one_of(False)},
    )

    def dt_rank_at(self, d_model: int) -> int:
        """Return the rank of the projection to the time steps."""
        return int(self.resolved("dt_rank", d_model))

    def canonical_at(self, d_model: int) -> Self:
        """Write out the rank, and reset inner_eps if there are no inner norms."""
        eps = self.inner_eps if self.inner_norm else 1e-6
        return replace(self, dt_rank=self.dt_rank_at(d_model), inner_eps=eps)

    def cost(self, d_model: int, context: int) -> Cost:
        """Count four projections and the product of C and the state. The state does not grow."""
        inner, rank = self.d_inner, self.dt_rank_at(d_model)
        chosen = rank + 2 * self.d_state
        products = d_model * 2 * inner + inner * chosen + rank * inner + inner * d_model
        params = products + inner + inner * (self.d_conv + self.conv_bias)
        params += inner * (self.d_state + 1)
        params += chosen * self.inner_norm + (2 * inner + d_model) * self.proj_bias
        flops = 2 * (products + inner * self.d_state)
        return Cost(params=params, active_params=params, flops_per_token=flops)

    def build(self, d_model: int) -> nn.Module:
        """Build the mixer at a model width."""
        rank = self.dt_rank_at(d_model)
        widths = (rank, self.d_state, self.d_state) if self.inner_norm else ()
        norms: list[nn.Module] = [RMSNorm(width, self.inner_eps) for width in widths]
        choose = SelectiveParams(self.d_inner, rank, self.d_state, norms)
        return Mamba(
            Linear(d_model, 2 * self.d_inner, self.proj_bias),
            Convolution(self.d_inner, self.d_conv, self.conv_bias),
            choose,
            Linear(self.d_inner, d_model, self.proj_bias),
        )


class SelectiveParams(nn.Module):
    """The parameters that each token sets: the time step of each channel, B and C."""

    matrices: tuple[str, ...] = ()

    def __init__(self, width: int, rank: int, d_state: int, norms: list[nn.Module]) -> None:
        super().__init__()
        self.width = width
        self.rank = rank
        self.d_state = d_state
        self.project = Linear(width, rank + 2 * d_state)
        self.dt = Linear(rank, width)
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.norms = nn.ModuleList(norms)

    def start(self, generator: torch.Generator) -> None:
        """Draw time steps within DT_RANGE."""
        self.dt_bias.data.copy_(first_dt_bias(self.width, generator))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, S, C) to dt (B, S, C) > 0, B and C (B, S, M), float32."""
        parts = self.project(x).split((self.rank, self.d_state, self.d_state), dim=-1)
        if len(self.norms):
            parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        dt = F.softplus(self.dt(parts[0]).float() + self.dt_bias.float())
        return dt, parts[1].float(), parts[2].float()


class Mamba(nn.Module):
    """out(scan(silu(convolution(x))) * silu(gate)), with a decay for each channel and state."""

    matrices: tuple[str, ...] = ()

    def __init__(
        self, project: Linear, convolution: Convolution, choose: SelectiveParams, out: Linear
    ) -> None:
        super().__init__()
        self.project = project
        self.convolution = convolution
        self.choose = choose
        self.out = out
        self.log_rate = nn.Parameter(torch.empty(out.d_in, choose.d_state))
        self.skip = nn.Parameter(torch.ones(out.d_in))

    def start(self, generator: torch.Generator) -> None:
        """Set the rates of each channel to 1, 2, ... d_state (S4D-real, arXiv 2206.11893)."""
        numbers = torch.arange(1, self.choose.d_state + 1, dtype=torch.float32)
        self.log_rate.data.copy_(numbers.log().expand(self.out.d_in, -1))

    def forward(self, x: Tensor, cache: StateCache | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it."""
        cache = cache or StateCache()
        # 1. Project to the values and the gate, (B, S, C) each, and convolve the values.
        v, gate = self.project(x).chunk(2, dim=-1)
        v, cache.before = self.convolution(v, cache.before)
        v = F.silu(v)
        # 2. Each token sets dt (B, S, C), B and C (B, S, M). The rates (C, M) are learned.
        dt, b, c = self.choose(v)
        rates = -self.log_rate.float().exp()
        # 3. Scan over the tokens, and add the skip connection.
        y, cache.state = read_channels(v.float(), rates, dt, b, c, cache.state)
        y = y + v.float() * self.skip.float()
        cache.length += x.shape[1]
        out: Tensor = self.out(y.to(x.dtype) * F.silu(gate))
        return out

    def new_cache(self, batch: int, context: int) -> StateCache:
        """Return an empty cache."""
        return StateCache()
