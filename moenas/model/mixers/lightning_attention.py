"""Lightning attention, linear attention with fixed decays. Kinds: lightning_attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import setting
from moenas.model.layer_inputs import LayerIndexed
from moenas.model.layers.linear import Linear
from moenas.model.layers.norms import RMSNorm
from moenas.model.mixers.mixer import MOST, Mixer, StateCache
from moenas.model.mixers.scan import scan_heads, scan_macs
from moenas.records import Cost


@dataclass(frozen=True, kw_only=True)
class LightningAttentionMixer(Mixer, kind="lightning_attention"):
    """Lightning attention (arXiv 2401.04658) as in MiniMax-01 (arXiv 2501.08313, section 2.2).

    Queries, keys and values pass silu. The state of head h of H decays by exp(-2^(-8 h / H)) at
    each token. The output passes a norm over all heads and a sigmoid gate. FLOPs count the
    projections and the matrix products of the chunked form.
    """

    n_heads: int = setting("heads", low=1, high=MOST)
    head_dim: int = setting("width of a head", low=8, high=MOST, multiple=8)
    slower_by_depth: bool = setting(
        "multiply the exponents of layer i of L by 1 - i / (L - 1), i from 0 (MiniMax-01)",
        default=False,
    )
    inner_eps: float = setting("added to the mean square in the norm", default=1e-6, low=0.0)

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.n_heads * self.head_dim

    def cost(self, d_model: int, context: int) -> Cost:
        """Count the projections and the matrix products of the scan. The state does not grow."""
        products = 5 * d_model * self.width
        params = products + self.width
        flops = 2 * products + -(-self.scan_flops(context) // context)
        return Cost(params=params, active_params=params, flops_per_token=flops)

    def scan_flops(self, context: int) -> int:
        """Return the FLOPs of the scan over a sequence."""
        return 2 * scan_macs(self.n_heads, self.n_heads, self.head_dim, self.head_dim, context)

    def surplus_flops(self, d_model: int, context: int) -> int:
        """Return what rounding the FLOPs of a token up has added to the sequence, negated."""
        return -(-self.scan_flops(context) % context)

    def build(self, d_model: int) -> nn.Module:
        """Build the mixer at a model width."""
        return LightningAttention(
            Linear(d_model, 3 * self.width),
            Linear(d_model, self.width),
            RMSNorm(self.width, self.inner_eps),
            Linear(self.width, d_model),
            self.n_heads,
            self.slower_by_depth,
        )

    @property
    def layer_indexed(self) -> bool:
        """Whether the decays depend on the index of the layer."""
        return self.slower_by_depth


class LightningAttention(LayerIndexed):
    """out(norm(scan(silu(q, k, v))) * sigmoid(gate))."""

    share = 1.0
    """Factor on the exponents of the first layer."""

    def __init__(
        self,
        project: Linear,
        gate: Linear,
        norm: RMSNorm,
        out: Linear,
        n_heads: int,
        slower_by_depth: bool,
    ) -> None:
        super().__init__()
        self.project = project
        self.gate = gate
        self.norm = norm
        self.out = out
        self.n_heads = n_heads
        self.slower_by_depth = slower_by_depth

    def set_layer_index(self, index: int, n_layers: int) -> None:
        """Set the decays of layer `index`, from 0. MiniMax-01 has the same 1e-5."""
        if self.slower_by_depth:
            self.share = 1 - index / (n_layers - 1 + 1e-5) + 1e-5

    def forward(self, x: Tensor, cache: StateCache | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it."""
        cache = cache or StateCache()
        cache.check_batch(x.shape[0])
        # 1. Queries, keys and values, (B, S, H, C) each.
        qkv = F.silu(self.project(x)).float().unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.unbind(2)
        # 2. The logarithm of the decay of each head, (H,).
        head = torch.arange(1, self.n_heads + 1, device=x.device, dtype=torch.float32)
        steps = (head * (-8 * math.log(2) / self.n_heads)).exp() * -self.share
        # 3. Scan over the tokens, then norm, gate and project.
        y, cache.state = scan_heads(v, steps.expand(v.shape[:3]), k, q, cache.state)
        cache.length += x.shape[1]
        y = self.norm(y.flatten(-2)) * self.gate(x).float().sigmoid()
        out: Tensor = self.out(y.to(x.dtype))
        return out

    def new_cache(self, batch: int, context: int) -> StateCache:
        """Return an empty cache."""
        return StateCache()
