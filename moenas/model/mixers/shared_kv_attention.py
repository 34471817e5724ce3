"""Attention over the keys and values of an earlier layer."""

from __future__ import annotations

from torch import Tensor, nn

from moenas.model.layer_inputs import SharedKV
from moenas.model.layers.linear import Linear, size
from moenas.model.layers.norms import RMSNorm
from moenas.model.mixers.gate import OutputGate
from moenas.model.mixers.qkv import normed
from moenas.model.mixers.shared_kv import SharesKV
from moenas.model.mixers.softmax_attention import SoftmaxAttention

# Shapes: B sequences, S tokens of a sequence, D model width, H heads, C width of a head.


class QueryProjection(nn.Module):
    """Queries by themselves: projected, cut to -clip..clip, normed and turned."""

    def __init__(
        self,
        project: nn.Module,
        n_heads: int,
        clip: float | None,
        norm: RMSNorm | None,
        rotary: nn.Module | None,
        norm_after_rope: bool,
    ) -> None:
        super().__init__()
        self.project = project
        self.n_heads = n_heads
        self.clip = clip
        self.norm = norm
        self.rotary = rotary
        self.norm_after_rope = norm_after_rope

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Map (B, S, D) of tokens at start, start + 1, ... to (B, H, S, C)."""
        rows: Tensor = self.project(x)
        rows = rows if self.clip is None else rows.clamp(-self.clip, self.clip)
        q: Tensor = rows.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        if self.norm is not None and not self.norm_after_rope:
            q = normed(q, self.norm)
        if self.rotary is not None:
            q = self.rotary(q, start)
        if self.norm is not None and self.norm_after_rope:
            q = normed(q, self.norm)
        return q


class CrossLayerAttention(SharesKV):
    """Attention whose keys and values an earlier layer made (arXiv 2405.12981, section 2)."""

    def __init__(
        self,
        kv_source: int,
        queries: QueryProjection,
        attend: SoftmaxAttention,
        gate: OutputGate | None,
        out: Linear,
    ) -> None:
        super().__init__(kv_source, attend.bias_shared)
        self.queries = queries
        self.attend = attend
        self.gate = gate
        self.out = out

    def forward(self, x: Tensor, cache: None = None, shared: SharedKV | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), the last S of the tokens whose keys are in `shared`."""
        k, v = self.shared_kv_of(shared)
        start = size(k.shape[2]) - size(x.shape[1])  # tensors while the model is traced
        table = self.table(self.attend.table, shared)
        y = self.attend(self.queries(x, start), k, v, start, table).transpose(1, 2)
        out: Tensor = self.out((y if self.gate is None else self.gate.gated(x, y)).flatten(-2))
        return out

    def new_cache(self, batch: int, context: int) -> None:
        """Return no cache: the cache of the layer that is read holds all."""
