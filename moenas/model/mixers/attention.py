"""Softmax attention of every common shape. Kinds: attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from moenas.grammar.component import changed, fields, setting
from moenas.grammar.conditions import none_of, one_of
from moenas.model.layer_inputs import SharedKV
from moenas.model.layers.linear import Linear, size
from moenas.model.layers.norms import RMSNorm
from moenas.model.mixers.block_indexer import BlockIndexer, BlockSelection
from moenas.model.mixers.gate import (
    GateActivation,
    GatedBy,
    OutputGate,
    build_gate,
    gate_width,
)
from moenas.model.mixers.mixer import MOST, KVCache, Mixer
from moenas.model.mixers.position_bias import PositionBias
from moenas.model.mixers.qkv import QKV, LowRankProjection, LowRankQKV, NormedValues, QKNorm
from moenas.model.mixers.rotary import FORMER, Rope
from moenas.model.mixers.shared_kv import SharesKV
from moenas.model.mixers.shared_kv_attention import CrossLayerAttention, QueryProjection
from moenas.model.mixers.softmax_attention import AttentionSpan, SoftmaxAttention, sink_flops
from moenas.model.mixers.temperature import (
    ScaleGrowth,
    build_temperature,
    canonical_temperature,
)
from moenas.model.mixers.token_indexer import IndexedCache
from moenas.records import Cost

OF_KEYS = (
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "v_head_dim",
    "qk_norm",
    "qk_norm_after_rope",
    "window",
    "chunk",
    "sinks",
)
"""Fields, beside `rope`, that a layer shares with the one whose keys and values it reads."""


@dataclass(frozen=True, kw_only=True)
class AttentionMixer(Mixer, kind="attention"):
    """Causal softmax attention with rotary positions.

    Multi-head, grouped-query (arXiv 2305.13245) or multi-query (arXiv 1911.02150), by the number
    of key-value heads. A window or chunk bounds what a token sees, not what the cache keeps. The
    FLOPs count the full square with a mask.
    """

    head_dim: int = setting("width of a head", low=8, high=MOST, multiple=8)
    n_heads: int | None = setting("query heads", derived="d_model / head_dim", low=1, high=MOST)
    n_kv_heads: int | None = setting(
        "key-value heads, each shared by n_heads / n_kv_heads query heads",
        derived="n_heads",
        low=1,
    )
    v_head_dim: int | None = setting(
        "width of the values of a head", derived="head_dim", low=8, multiple=8
    )
    q_rank: int | None = setting(
        "width of a latent of the queries, with a norm (MFA, arXiv 2412.19255; Step-3); null: no"
        " latent",
        default=None,
        low=1,
    )
    rope: Rope = setting("rotary position embeddings of queries and keys", default=Rope())
    qk_norm: Literal["none", "head", "full", "weightless"] = setting(
        "RMSNorm of queries and keys: none, over each head (Qwen3), over all heads together"
        " (OLMoE), or over each head without a weight (Llama 4)",
        default="none",
    )
    qk_norm_after_rope: bool = setting(
        "qk_norm comes after the positions, not before them (Hunyuan)",
        default=False,
        without_effect={"qk_norm": one_of("none")},
    )
    v_norm: bool = setting(
        "RMSNorm of the values of each head, without a weight (Gemma 4)",
        default=False,
        without_effect={"kv_source": none_of(None)},
    )
    k_eq_v: bool = setting(
        "the values are the keys as they are projected, before norms and positions (Gemma 4)",
        default=False,
        without_effect={"kv_source": none_of(None)},
    )
    inner_eps: float = setting(
        "added to the mean square in qk_norm, in v_norm, and in the norms of q_rank and indexer",
        default=1e-6,
        low=0.0,
        without_effect={
            "q_rank": one_of(None),
            "qk_norm": one_of("none"),
            "v_norm": one_of(False),
            "block_indexer": one_of(None),
        },
    )
    qkv_bias: bool = setting("queries, keys and values have a bias", default=False)
    qkv_clip: float | None = setting(
        "queries, keys and values are cut to -c..c (DBRX: 8); null: no cut", default=None, low=1e-3
    )
    out_bias: bool = setting("the output projection has a bias", default=False)
    window: int | None = setting(
        "a token sees itself and the window - 1 tokens before (Longformer, arXiv 2004.05150)",
        default=None,
        low=1,
    )
    chunk: int | None = setting(
        "tokens of a chunk; a token sees only its own chunk (Llama 4)", default=None, low=1
    )
    sinks: bool = setting(
        "a learned logit for each head that takes part in the softmax and has no value (gpt-oss)",
        default=False,
    )
    softcap: float | None = setting(
        "scores become c tanh(score / c) (Gemma 2, arXiv 2408.00118); training keeps every score",
        default=None,
        low=0.1,
    )
    output_gate: GatedBy = setting(
        "the heads' output times sigmoid(W x), one gate a head or an element (arXiv 2505.06708)",
        default="none",
    )
    gate_activation: GateActivation = setting(
        "the function of output_gate: sigmoid, or softplus, which has no upper bound (Laguna)",
        default="sigmoid",
        without_effect={"output_gate": one_of("none")},
    )
    gate_bias: bool = setting(
        "output_gate adds a trained bias of each head to W x (Beam)",
        default=False,
        without_effect={"output_gate": one_of("none")},
    )
    scale: float | None = setting(
        "factor of the scores; null: 1 / sqrt(head_dim)", default=None, low=0.0
    )
    floor_scale: int | None = setting(
        "queries from position floor_scale - 1 on are multiplied by"
        " 1 + attn_scale ln(1 + floor((position + 1) / floor_scale)) (arXiv 2501.19399; Llama 4:"
        " 8192 where nothing turns); null: none is",
        default=None,
        low=1,
    )
    attn_scale: float = setting(
        "of floor_scale",
        default=0.1,
        low=0.0,
        without_effect={"floor_scale": one_of(None)},
    )
    scale_growth: ScaleGrowth = setting(
        "how floor_scale grows with the position: by the logarithm above, or as the power"
        " (1 + (position + 1) / floor_scale)^attn_scale of every position (Beam)",
        default="logarithm",
        without_effect={"floor_scale": one_of(None)},
    )
    floor_offset: int = setting(
        "added to the position in floor_scale and scale_growth: 1 (Llama 4) or 0 (Mistral)",
        default=1,
        low=0,
        high=1,
        without_effect={"floor_scale": one_of(None)},
    )
    position_bias: PositionBias | None = setting(
        "added to the scores by the distance of their tokens; null: nothing is", default=None
    )
    block_indexer: BlockIndexer | None = setting(
        "which blocks of earlier tokens a token reads (MiniMax-M3); null: all", default=None
    )
    kv_source: int | None = setting(
        "reads the keys and values of the n-th previous attention layer that has its own; 1 is the"
        " nearest (cross-layer attention, arXiv 2405.12981: 1; Gemma 3n: 1 or 2); null: this layer"
        " has its own",
        default=None,
        low=1,
        high=1000,
    )

    former: ClassVar[Mapping[str, str]] = FORMER

    def heads_at(self, d_model: int) -> tuple[int, int]:
        """Return the query heads and the key-value heads at a model width."""
        return self.resolved("n_heads", d_model), self.resolved("n_kv_heads", d_model)

    @property
    def v_dim(self) -> int:
        """Width of the values of a head."""
        return int(self.resolved("v_head_dim"))

    @property
    def factor(self) -> float:
        """The factor of the scores."""
        return float(self.head_dim**-0.5 if self.scale is None else self.scale)

    @property
    def bias_shared(self) -> bool | None:
        """Whether the position bias reads the table of an earlier layer; None: it has no table."""
        return getattr(self.position_bias, "shared", None)

    def kv_mismatch(self, source: AttentionMixer, d_model: int) -> str | None:
        """Return a field in which this and the layer whose keys it reads differ, or None.

        The source decides the shape of the keys and values, and which of them are visible.
        """
        # The canonical form moves YaRN's factor into the scores, so it is compared before.
        factors = (m.rope.attention_factor(m.head_dim) for m in (self, source))
        if len(set(factors)) > 1:
            return "rope.scaling"
        one, other = self.canonical_at(d_model), source.canonical_at(d_model)
        for name in fields(Rope):
            if getattr(one.rope, name) != getattr(other.rope, name):
                return f"rope.{name}"
        names = (*OF_KEYS, "inner_eps") if one.qk_norm != "none" else OF_KEYS
        return next((n for n in names if getattr(one, n) != getattr(other, n)), None)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.window is not None and self.chunk is not None:
            return "window and chunk exclude each other; set one of them to null"
        if self.k_eq_v and self.v_dim != self.head_dim:
            return "k_eq_v: the values are as wide as the keys; leave v_head_dim out"
        if self.block_indexer is not None and (reason := self._invalid_indexer()) is not None:
            return f"block_indexer: {reason}"
        alone = 1 in (self.window, self.chunk) and not self.sinks
        if self.kv_source is not None and (alone or self.scale == 0):
            return "kv_source: its queries have no effect; give a wider window and no scale of 0"
        return None

    def _invalid_indexer(self) -> str | None:
        """Return why there cannot be an indexer of blocks, or None."""
        if self.window is not None or self.chunk is not None:
            return "it selects among all earlier tokens; leave window and chunk out"
        if self.position_bias is not None or self.kv_source is not None:
            return "the layer has keys of its own and no position_bias; leave kv_source and it out"
        assert self.block_indexer is not None
        turned = self.rope.rotary_dim(self.head_dim)
        if turned > self.block_indexer.head_dim:
            return f"its head_dim must be at least the {turned} elements that have a position"
        return None

    def invalid_at(self, d_model: int) -> str | None:
        """Return why the heads do not fit the width or one another, or None."""
        if self.n_heads is None and d_model % self.head_dim:
            return f"head_dim ({self.head_dim}) must divide d_model ({d_model}); or give n_heads"
        n_heads, n_kv_heads = self.heads_at(d_model)
        if n_heads % n_kv_heads:
            return f"n_kv_heads ({n_kv_heads}) must divide n_heads ({n_heads})"
        return None

    def canonical_at(self, d_model: int) -> Self:
        """Write out the numbers that follow from others and reset fields without effect."""
        n_heads, n_kv_heads = self.heads_at(d_model)
        one_head = self.qk_norm == "full" and n_heads == n_kv_heads == 1
        own = self.kv_source is None
        normed = (
            self.q_rank or self.block_indexer or self.qk_norm != "none" or (own and self.v_norm)
        )
        bias = self.position_bias and self.position_bias.canonical_within(self.attention_span)
        canonical = changed(
            self,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            v_head_dim=self.v_dim,
            qk_norm="head" if one_head else self.qk_norm,
            v_norm=self.v_norm and own,
            k_eq_v=self.k_eq_v and own,
            inner_eps=self.inner_eps if normed else 1e-6,
            window=1 if self.chunk == 1 else self.window,
            chunk=None if self.chunk == 1 else self.chunk,
            **canonical_temperature(
                self.floor_scale, self.attn_scale, self.floor_offset, self.scale_growth
            ),
            gate_activation=self.gate_activation if self.output_gate != "none" else "sigmoid",
            gate_bias=self.gate_bias and self.output_gate != "none",
            position_bias=bias,
        )
        if canonical.window == 1 and not canonical.sinks:
            return canonical._without_scores()
        return canonical._with_canonical_positions()

    def _without_scores(self) -> Self:
        """Reset what acts on the scores alone: the softmax over one token is 1."""
        return changed(
            self,
            rope=Rope(),
            qk_norm="none" if self.qk_norm == "weightless" else self.qk_norm,
            qk_norm_after_rope=False,
            inner_eps=self.inner_eps if self.v_norm else 1e-6,
            softcap=None,
            scale=None,
            **canonical_temperature(None, 0.1, 1, "logarithm"),
            position_bias=self.position_bias if self.bias_shared is not None else None,
        )

    def _with_canonical_positions(self) -> Self:
        """Reset what has no effect in `rope`; move YaRN's factor into `scale` where possible."""
        rope, folded = self.rope.canonical_for(self.head_dim), 1.0
        # A rotation keeps lengths, so a norm without weights commutes with it. YaRN's factor and
        # the weights of a norm do not.
        longer = rope.attention_factor(self.head_dim) != 1
        ordered = rope.partial_rotary_factor > 0 and (self.qk_norm in ("head", "full") or longer)
        after = self.qk_norm_after_rope and ordered and self.qk_norm != "none"
        if not after and self.block_indexer is None:  # an indexer reads the positions, too
            rope, folded = self.rope.fold_into_scale(self.head_dim)
        factor, usual = self.factor * folded, self.head_dim**-0.5
        is_usual = factor == usual or (folded != 1 and math.isclose(factor, usual, rel_tol=1e-10))
        scale = self.scale if folded == 1 else float(f"{factor:.12g}")
        return changed(
            self,
            rope=rope,
            qk_norm_after_rope=after,
            scale=None if is_usual else scale,
        )

    def cost(self, d_model: int, context: int) -> Cost:
        """Count the projections, and scores and values over the full context."""
        n_heads, n_kv_heads = self.heads_at(d_model)
        own = self.kv_source is None
        widths = n_heads * self.head_dim, n_kv_heads * self.head_dim * own
        out_width, kept = n_heads * self.v_dim, n_kv_heads * (self.head_dim + self.v_dim) * own
        kv_width = widths[1] if self.k_eq_v else kept
        gates = gate_width(self.output_gate, n_heads, self.v_dim)
        q_rank = self.q_rank or 0
        products = (d_model + widths[0]) * q_rank if q_rank else d_model * widths[0]
        products += d_model * (kv_width + gates) + out_width * d_model
        params = products + q_rank + (n_heads if self.sinks else 0)
        params += self.position_bias.params(n_heads) if self.position_bias else 0
        params += {"head": (1 + own) * self.head_dim, "full": sum(widths)}.get(self.qk_norm, 0)
        params += (widths[0] + kv_width) * self.qkv_bias + d_model * self.out_bias
        params += n_heads * (self.gate_bias and gates > 0)
        flops = 2 * products + 2 * context * (widths[0] + out_width)
        if (indexer := self.block_indexer) is not None:
            params += indexer.n_params(d_model, n_kv_heads)
            flops += indexer.flops_per_token(d_model, n_kv_heads, context)
            kept += indexer.head_dim
        return Cost(
            params=params,
            active_params=params,
            flops_per_token=flops,
            kv_bytes_per_token=2 * kept,
        )

    def surplus_flops(self, d_model: int, context: int) -> int:
        """Return what the one more key of a sink takes, and the elements that it adds to all."""
        if not self.sinks or self.softcap is not None or not self.factor:
            return 0
        return sink_flops(self.heads_at(d_model)[0], (self.head_dim, self.v_dim), context)

    def build(self, d_model: int) -> nn.Module:
        """Build the attention at a model width."""
        n_heads, n_kv_heads = self.heads_at(d_model)
        width = n_heads * self.v_dim
        rotary, attend = self.rope.build(self.head_dim), self._build_attend(n_heads)
        gate = build_gate(
            d_model,
            (n_heads, self.v_dim),
            self.output_gate,
            activation=self.gate_activation,
            bias=self.gate_bias,
        )
        out = Linear(width, d_model, self.out_bias)
        if self.kv_source is not None:
            query = self._build_query(d_model)
            norm = self._build_norm(n_heads) if self.qk_norm != "none" else None
            entry = QueryProjection(
                query, n_heads, self.qkv_clip, norm, rotary, self.qk_norm_after_rope
            )
            return CrossLayerAttention(self.kv_source, entry, attend, gate, out)
        norms = None
        if self.qk_norm != "none":
            q, k = self._build_norm(n_heads), self._build_norm(n_kv_heads)
            norms = QKNorm(q, k, self.qk_norm_after_rope)
        indexer = None
        if self.block_indexer is not None:
            turning = self.rope.build(self.head_dim)
            indexer = self.block_indexer.build(d_model, n_kv_heads, self.inner_eps, turning)
        qkv = self._build_qkv(d_model)
        return Attention(qkv, rotary, norms, attend, gate, out, indexer=indexer)

    def _build_query(self, d_model: int) -> nn.Module:
        """Build what makes the queries where they are made by themselves."""
        width = self.heads_at(d_model)[0] * self.head_dim
        if self.q_rank is None:
            return Linear(d_model, width, self.qkv_bias)
        return LowRankProjection(
            Linear(d_model, self.q_rank),
            RMSNorm(self.q_rank, self.inner_eps),
            Linear(self.q_rank, width, self.qkv_bias),
        )

    def _build_qkv(self, d_model: int) -> nn.Module:
        counts, widths = self.heads_at(d_model), (self.head_dim, 0 if self.k_eq_v else self.v_dim)
        if self.q_rank is None:
            qkv: nn.Module = QKV(d_model, counts, widths, self.qkv_bias, self.qkv_clip)
        else:
            keys = Linear(d_model, counts[1] * sum(widths), self.qkv_bias)
            qkv = LowRankQKV(self._build_query(d_model), keys, counts, widths, self.qkv_clip)
        return NormedValues(qkv, self.v_dim, self.inner_eps) if self.v_norm else qkv

    def _build_attend(self, n_heads: int) -> SoftmaxAttention:
        bias = None if self.position_bias is None else self.position_bias.build(n_heads)
        return SoftmaxAttention(
            n_heads,
            self.factor,
            AttentionSpan(self.window, self.chunk, bias),
            self.softcap,
            self.sinks,
            build_temperature(
                self.floor_scale, self.attn_scale, self.floor_offset, self.scale_growth
            ),
        )

    def _build_norm(self, n_heads: int) -> RMSNorm:
        width = self.head_dim * (n_heads if self.qk_norm == "full" else 1)
        return RMSNorm(width, self.inner_eps, self.qk_norm != "weightless")


class Attention(SharesKV):
    """softmax(q k^T scale) v over the tokens so far (Vaswani et al., arXiv 1706.03762)."""

    def __init__(
        self,
        qkv: nn.Module,
        rotary: nn.Module | None,
        norm: nn.Module | None,
        attend: SoftmaxAttention,
        gate: OutputGate | None,
        out: Linear,
        *,
        indexer: BlockSelection | None = None,
    ) -> None:
        super().__init__(None, attend.bias_shared)
        self.indexer = indexer
        self.qkv = qkv
        self.rotary = rotary
        self.norm = norm
        self.attend = attend
        self.gate = gate
        self.out = out

    def forward(
        self, x: Tensor, cache: KVCache | None = None, shared: SharedKV | None = None
    ) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it.

        Keys and values that other layers read go to `shared`, which holds the shared bias table.
        """
        qkv: Any = self.qkv
        q, k, v = qkv.heads(x)
        norm: Any = self.norm
        if norm is not None and not norm.after_rope:
            q, k = norm(q, k)
        start = 0 if cache is None else cache.length
        indexer: Any = self.indexer
        index: Tensor | None = None
        if indexer is not None:
            index = indexer.scores(x, start, getattr(cache, "index", None))
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        if norm is not None and norm.after_rope:
            q, k = norm(q, k)
        if cache is not None:
            k, v = cache.extend(k, v)
        self.publish_kv(k, v, shared)
        chosen: Tensor | None = None
        if index is not None:
            reach: Any = self.attend.reach
            seen = reach.seen(start, size(x.shape[1]), 0, x.device)
            chosen = indexer.selected(index, seen, start)
        table = self.table(self.attend.table, shared)
        y = self.attend(q, k, v, start, table, chosen=chosen).transpose(1, 2)
        if index is not None and chosen is not None and self.training:
            indexer.learn(index, chosen, self.attend.group_weights(q, k, start, chosen))
        if self.gate is not None:
            y = self.gate.gated(x, y)
        out: Tensor = self.out(y.flatten(-2))
        return out

    def new_cache(self, batch: int, context: int) -> KVCache:
        """Return an empty cache."""
        return KVCache(batch, context) if self.indexer is None else IndexedCache(batch, context)
