"""Attention whose keys and values come from one small latent. Kinds: latent_attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from moenas.grammar.component import setting
from moenas.grammar.conditions import one_of
from moenas.model.layer_inputs import LayerInputs, ReadsInputs, SharedKV
from moenas.model.layers.linear import Linear, size
from moenas.model.layers.norms import RMSNorm
from moenas.model.mixers.gate import GatedBy, OutputGate, build_gate, gate_width
from moenas.model.mixers.mixer import MOST, KVCache, Mixer
from moenas.model.mixers.qkv import LowRankProjection
from moenas.model.mixers.rotary import FORMER, Rope
from moenas.model.mixers.softmax_attention import AttentionSpan, SoftmaxAttention, sink_flops
from moenas.model.mixers.temperature import build_temperature, canonical_temperature
from moenas.model.mixers.token_indexer import IndexedCache, IndexedSelection, TokenIndexer
from moenas.records import Cost


@dataclass(frozen=True, kw_only=True)
class LatentAttentionMixer(Mixer, kind="latent_attention"):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache keeps the latent of `kv_rank` numbers and one rotary key for all heads. A step of
    decoding works on the latent itself: the key matrix moves to the query, the value matrix to
    the output (the same section).
    """

    n_heads: int = setting("heads", low=1, high=MOST)
    q_rank: int | None = setting(
        "width of the latent of the queries, with a norm; null: no latent", default=None, low=1
    )
    kv_rank: int = setting("width of the latent of keys and values, with a norm", low=1)
    nope_dim: int = setting(
        "elements of a query or key without a position", low=8, high=MOST, multiple=8
    )
    rope_dim: int = setting(
        "elements of a query or key with a position; all heads share one rotary key",
        low=2,
        high=MOST,
        multiple=2,
    )
    v_dim: int = setting("width of the values of a head", low=8, high=MOST, multiple=8)
    rope: Rope = setting("rotary position embeddings of the `rope_dim` elements", default=Rope())
    inner_eps: float = setting("added to the mean square in the norms", default=1e-6, low=0.0)
    rank_scale: bool = setting(
        "a normed latent of width r is multiplied by sqrt(d_model / r) (LongCat-Flash)",
        default=False,
    )
    output_gate: GatedBy = setting(
        "the heads' output times sigmoid(W x), one gate a head (Ling hybrid) or an element (arXiv"
        " 2505.06708)",
        default="none",
    )
    scale: float | None = setting(
        "factor of the scores; null: 1 / sqrt(nope_dim + rope_dim)", default=None, low=0.0
    )
    floor_scale: int | None = setting(
        "queries are multiplied by 1 + attn_scale ln(1 + floor((position + floor_offset) /"
        " floor_scale)) (arXiv 2501.19399; Mistral Small 4: 8192, with floor_offset 0); null: none"
        " is",
        default=None,
        low=1,
    )
    attn_scale: float = setting(
        "of floor_scale", default=0.1, low=0.0, without_effect={"floor_scale": one_of(None)}
    )
    floor_offset: int = setting(
        "added to the position in floor_scale: 1 (Llama 4) or 0 (Mistral Small 4)",
        default=1,
        low=0,
        high=1,
        without_effect={"floor_scale": one_of(None)},
    )
    window: int | None = setting(
        "a token sees itself and the window - 1 tokens before (Longformer, arXiv 2004.05150; dots"
        " 3); null: all",
        default=None,
        low=1,
    )
    sinks: bool = setting(
        "a learned logit for each head that takes part in the softmax and has no value (gpt-oss)",
        default=False,
    )
    rope_norm: bool = setting(
        "RMSNorm of the rotary key before the positions (dots 3)", default=False
    )
    indexer: TokenIndexer | None = setting(
        "which earlier tokens a token reads; it needs q_rank (DeepSeek-V3.2); null: all",
        default=None,
    )

    index_shared: bool = setting(
        "reads the tokens that the nearest indexer of an earlier layer has selected (GLM-5, arXiv"
        " 2603.12201); the windows of both are equal",
        default=False,
    )

    former: ClassVar[Mapping[str, str]] = FORMER

    @property
    def gates(self) -> int:
        """Gates of a token."""
        return gate_width(self.output_gate, self.n_heads, self.v_dim)

    @property
    def factor(self) -> float:
        """What the scores are multiplied with."""
        return float((self.nope_dim + self.rope_dim) ** -0.5 if self.scale is None else self.scale)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.indexer is None:
            return None
        if self.index_shared:
            return "index_shared: the layer has an indexer of its own; leave one of them out"
        if self.q_rank is None:
            return "an indexer reads the latent of the queries; give q_rank, or no indexer"
        if self.rope_dim > self.indexer.head_dim and self.rope.rotary_dim(self.rope_dim):
            return "the head_dim of the indexer must be at least rope_dim"
        return None

    def canonical_at(self, d_model: int) -> Self:
        """Reset fields without effect."""
        usual = (self.nope_dim + self.rope_dim) ** -0.5
        rope = self.rope.canonical_for(self.rope_dim)
        narrow = self.kv_rank != d_model or self.q_rank not in (None, d_model)
        tempered = canonical_temperature(
            self.floor_scale, self.attn_scale, self.floor_offset, "logarithm"
        )
        del tempered["scale_growth"]
        return replace(
            self,
            **tempered,
            # Fingerprints of earlier versions know NoPE of this mixer as a theta of null.
            rope=rope if rope.partial_rotary_factor else Rope(theta=None),
            rank_scale=self.rank_scale and narrow,
            scale=None if self.scale == usual else self.scale,
        )

    def cost(self, d_model: int, context: int) -> Cost:
        """Count the projections, and scores and values of all heads over the full context."""
        q_width = self.n_heads * (self.nope_dim + self.rope_dim)
        out_width = self.n_heads * self.v_dim
        q_rank = self.q_rank or 0
        products = (d_model + q_width) * q_rank if q_rank else d_model * q_width
        products += d_model * (self.kv_rank + self.rope_dim)
        products += self.kv_rank * self.n_heads * (self.nope_dim + self.v_dim)
        products += (out_width + self.gates) * d_model
        params = products + q_rank + self.kv_rank + self.rope_dim * self.rope_norm
        params += self.n_heads * self.sinks
        whole = Cost(
            params=params,
            active_params=params,
            flops_per_token=2 * products + 2 * context * (q_width + out_width),
            kv_bytes_per_token=2 * (self.kv_rank + self.rope_dim),
        )
        if self.indexer is None:
            return whole
        params = self.indexer.n_params(d_model, q_rank)
        return whole + Cost(
            params=params,
            active_params=params,
            flops_per_token=self.indexer.flops_per_token(d_model, q_rank, context),
            kv_bytes_per_token=2 * self.indexer.head_dim,
        )

    def surplus_flops(self, d_model: int, context: int) -> int:
        """Return what the key of a sink takes, and the elements that it adds to all keys."""
        widths = self.nope_dim + self.rope_dim, self.v_dim
        return sink_flops(self.n_heads, widths, context) if self.sinks and self.factor else 0

    def build(self, d_model: int) -> nn.Module:
        """Build the attention at a model width."""
        q_width = self.n_heads * (self.nope_dim + self.rope_dim)
        kv_width = self.n_heads * (self.nope_dim + self.v_dim)
        query: nn.Module = Linear(d_model, q_width)
        if self.q_rank is not None:
            query = self._build_bottleneck(d_model, self.q_rank, 0, q_width)
        return LatentAttention(
            query,
            self._build_bottleneck(d_model, self.kv_rank, self.rope_dim, kv_width),
            self.rope.build(self.rope_dim),
            SoftmaxAttention(
                self.n_heads,
                self.factor,
                AttentionSpan(self.window),
                sinks=self.sinks,
                temperature=build_temperature(
                    self.floor_scale, self.attn_scale, self.floor_offset, "logarithm"
                ),
            ),
            build_gate(d_model, (self.n_heads, self.v_dim), self.output_gate),
            Linear(self.n_heads * self.v_dim, d_model),
            rope_norm=RMSNorm(self.rope_dim, self.inner_eps) if self.rope_norm else None,
            indexer=self._build_indexer(d_model),
            index_shared=self.index_shared,
        )

    def _build_indexer(self, d_model: int) -> IndexedSelection | None:
        if self.indexer is None or self.q_rank is None:
            return None
        return self.indexer.build(d_model, self.q_rank, self.rope.build(self.rope_dim))

    def _build_bottleneck(
        self, d_model: int, rank: int, beside: int, width: int
    ) -> LowRankProjection:
        return LowRankProjection(
            Linear(d_model, rank + beside),
            RMSNorm(rank, self.inner_eps),
            Linear(rank, width),
            (d_model / rank) ** 0.5 if self.rank_scale else 1.0,
        )


class LatentAttention(ReadsInputs):
    """Attention over keys and values that are made from a latent, and one rotary key for all."""

    def __init__(
        self,
        query: Any,  # Linear or LowRankProjection
        keys: LowRankProjection,
        rotary: nn.Module | None,
        attend: SoftmaxAttention,
        gate: OutputGate | None,
        out: Linear,
        *,
        rope_norm: RMSNorm | None = None,
        indexer: IndexedSelection | None = None,
        index_shared: bool = False,
    ) -> None:
        super().__init__()
        self.query = query
        self.keys = keys
        self.rotary = rotary
        self.attend = attend
        self.gate = gate
        self.out = out
        self.rope_norm = rope_norm
        self.indexer = indexer
        self.index_shared = index_shared

    def run(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Map (B, S, D) to (B, S, D) with the cache and the shared selection of a pass."""
        y: Tensor = self(x, inputs.cache, inputs.shared_kv)
        return y

    def forward(self, x: Tensor, cache: Any = None, shared: SharedKV | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it.

        The selection of an indexer goes to `shared`, and layers without one may read it there.

        Raises:
            ValueError: if the selection of an earlier layer is read, and there is no model.
        """
        start = 0 if cache is None else cache.length
        q, index = self.queries(x, start, cache)
        latent, k_rope = (part.unsqueeze(1) for part in self.keys.latent(x))  # (B, 1, S, .)
        nope = size(q.shape[-1] - k_rope.shape[-1])  # tensors while the model is traced
        q_nope, q_rope = q.split((nope, k_rope.shape[-1]), dim=-1)
        if self.rope_norm is not None:
            k_rope = self.rope_norm(k_rope)
        if self.rotary is not None:
            q_rope, k_rope = self.rotary(q_rope, start), self.rotary(k_rope, start)
        if cache is not None:
            latent, k_rope = cache.extend(latent, k_rope)
        reach: Any = self.attend.reach
        indexer: Any = self.indexer
        chosen: Tensor | None = None
        if index is not None:
            chosen = indexer.selected(index, reach.seen(start, size(x.shape[1]), 0, x.device))
        chosen = self.shared_selection(chosen, shared)
        if start:
            y = self.on_latent(q_nope, q_rope, latent, k_rope, start, chosen)
        else:
            kv = self.keys.up(latent.squeeze(1)).unflatten(-1, (self.attend.n_heads, -1))
            kv = kv.transpose(1, 2)
            k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
            k_rope = k_rope.expand(-1, self.attend.n_heads, -1, -1)
            q, k = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope), dim=-1)
            y = self.attend(q, k, v, start, chosen=chosen)
            if index is not None and chosen is not None and self.training:
                indexer.learn(index, chosen, self.attend.mean_weights(q, k, start, chosen))
        y = y.transpose(1, 2)
        out: Tensor = self.out((y if self.gate is None else self.gate.gated(x, y)).flatten(-2))
        return out

    def shared_selection(self, chosen: Tensor | None, shared: SharedKV | None) -> Tensor | None:
        """Return the keys (B, S, L) that are read, None for all; leave an indexer's for others."""
        if self.index_shared:
            if shared is None:
                raise ValueError("the selection of an earlier layer is read, and there is none")
            return shared.selected
        if shared is not None and self.indexer is not None:
            shared.selected = chosen
        return chosen

    def queries(self, x: Tensor, start: int, cache: Any) -> tuple[Tensor, Tensor | None]:
        """Return the queries (B, H, S, C), and the index scores (B, S, L) where an indexer acts."""
        query, index = self.query, None
        if self.indexer is None:
            q = query(x)
        else:
            latent = query.latent(x)[0]
            q = query.up(latent)
            keys = None if cache is None else cache.index
            index = self.indexer.scores(x, latent, start, keys)
        return q.unflatten(-1, (self.attend.n_heads, -1)).transpose(1, 2), index

    def on_latent(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        start: int,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Attend with the latent as key and value of every head, (B, H, S, C of the values)."""
        up = self.keys.up.weight.to(q_nope.dtype).unflatten(0, (self.attend.n_heads, -1))
        nope = size(q_nope.shape[-1])
        up_k, up_v = up[:, :nope], up[:, nope:]  # (H, C, rank)
        q = torch.cat((q_nope @ up_k, q_rope), dim=-1)
        k = torch.cat((latent, k_rope), dim=-1)
        y: Tensor = self.attend(q, k, latent, start, chosen=chosen) @ up_v.transpose(-2, -1)
        return y

    def new_cache(self, batch: int, context: int) -> KVCache:
        """Return an empty cache."""
        return KVCache(batch, context) if self.indexer is None else IndexedCache(batch, context)
