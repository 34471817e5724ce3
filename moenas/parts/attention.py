"""Softmax attention of every common shape. Kinds: attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.component import setting
from moenas.parts.layers import Linear
from moenas.parts.mixers import KVCache, Mixer, Rotary
from moenas.parts.norms import RMSNorm
from moenas.records import Cost


@dataclass(frozen=True, kw_only=True)
class AttentionMixer(Mixer, kind="attention"):
    """Causal softmax attention with rotary positions.

    Multi-head, grouped-query (arXiv 2305.13245) or multi-query (arXiv 1911.02150), by the number
    of key-value heads. A window or chunk bounds what a token sees, not what the cache keeps, and
    the FLOPs are those of the full square with a mask.
    """

    head_dim: int = setting("width of a head", low=8, multiple=8)
    n_heads: int | None = setting("query heads; null: d_model / head_dim", default=None, low=1)
    n_kv_heads: int | None = setting(
        "key-value heads, each shared by n_heads / n_kv_heads query heads; null: n_heads",
        default=None,
        low=1,
    )
    v_head_dim: int | None = setting(
        "width of the values of a head; null: head_dim", default=None, low=8, multiple=8
    )
    rope_theta: float = setting(
        "base of the rotary wavelengths (RoFormer, arXiv 2104.09864)", default=10000.0, low=1.0
    )
    rope_fraction: float = setting(
        "share of a head that turns, to the next even number of elements; 0: no positions (NoPE)",
        default=1.0,
        low=0.0,
        high=1.0,
    )
    qk_norm: Literal["none", "head", "full", "weightless"] = setting(
        "RMSNorm of queries and keys: none, over each head (Qwen3), over all heads together"
        " (OLMoE), or over each head without a weight (Llama 4)",
        default="none",
    )
    qk_norm_after_rope: bool = setting(
        "qk_norm comes after the positions, not before them (Hunyuan)", default=False
    )
    inner_eps: float = setting("added to the mean square in qk_norm", default=1e-6, low=0.0)
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
        "a token sees only tokens of its own chunk of so many (Llama 4)", default=None, low=1
    )
    sinks: bool = setting(
        "a learned logit for each head that takes part in the softmax and has no value (gpt-oss)",
        default=False,
    )
    softcap: float | None = setting(
        "scores become c tanh(score / c) (Gemma 2, arXiv 2408.00118)", default=None, low=0.1
    )
    output_gate: Literal["none", "head", "element"] = setting(
        "the heads' output times sigmoid(W x), one gate a head or an element (arXiv 2505.06708)",
        default="none",
    )
    scale: float | None = setting(
        "factor of the scores; null: 1 / sqrt(head_dim)", default=None, low=0.0
    )

    def heads_at(self, d_model: int) -> tuple[int, int]:
        """Return the query heads and the key-value heads at a model width."""
        n_heads = self.n_heads or d_model // self.head_dim
        return n_heads, self.n_kv_heads or n_heads

    @property
    def v_dim(self) -> int:
        """Width of the values of a head."""
        return self.v_head_dim or self.head_dim

    @property
    def rope_dim(self) -> int:
        """How many elements of a head turn with the position."""
        return 2 * round(self.rope_fraction * self.head_dim / 2)

    @property
    def factor(self) -> float:
        """What the scores are multiplied with."""
        return float(self.head_dim**-0.5 if self.scale is None else self.scale)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.window is not None and self.chunk is not None:
            return "window and chunk exclude each other; set one of them to null"
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
        # To turn a vector changes neither its length nor what has no weight.
        ordered = self.rope_dim > 0 and self.qk_norm in ("head", "full")
        return replace(
            self,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            v_head_dim=self.v_dim,
            rope_theta=self.rope_theta if self.rope_dim > 2 else 10000.0,
            rope_fraction=self.rope_dim / self.head_dim,
            qk_norm_after_rope=self.qk_norm_after_rope and ordered,
            inner_eps=1e-6 if self.qk_norm == "none" else self.inner_eps,
            scale=None if self.factor == self.head_dim**-0.5 else self.scale,
        )

    def cost(self, d_model: int, context: int) -> Cost:
        """Count the projections, and scores and values over the full context."""
        n_heads, n_kv_heads = self.heads_at(d_model)
        widths = n_heads * self.head_dim, n_kv_heads * self.head_dim
        out_width, kv_width = n_heads * self.v_dim, n_kv_heads * (self.head_dim + self.v_dim)
        gates = {"none": 0, "head": n_heads, "element": out_width}[self.output_gate]
        products = d_model * (widths[0] + kv_width + gates) + out_width * d_model
        params = products + (n_heads if self.sinks else 0)
        params += {"head": 2 * self.head_dim, "full": sum(widths)}.get(self.qk_norm, 0)
        params += (widths[0] + kv_width) * self.qkv_bias + d_model * self.out_bias
        return Cost(
            params=params,
            active_params=params,
            flops_per_token=2 * products + 2 * context * (widths[0] + out_width),
            kv_bytes_per_token=2 * kv_width,
            weight_bytes=2 * params,
        )

    def build(self, d_model: int) -> nn.Module:
        """Build the attention at a model width."""
        n_heads, n_kv_heads = self.heads_at(d_model)
        width = n_heads * self.v_dim
        gate = {"none": 0, "head": n_heads, "element": width}[self.output_gate]
        return Attention(
            QKV(
                d_model,
                (n_heads, n_kv_heads),
                (self.head_dim, self.v_dim),
                self.qkv_bias,
                self.qkv_clip,
            ),
            Rotary(self.rope_dim, self.rope_theta) if self.rope_dim else None,
            self._build_norm(n_heads, n_kv_heads),
            Attend(n_heads, self.factor, self.window, self.chunk, self.softcap, self.sinks),
            Linear(d_model, gate) if gate else None,
            Linear(width, d_model, self.out_bias),
        )

    def _build_norm(self, n_heads: int, n_kv_heads: int) -> QKNorm | None:
        if self.qk_norm == "none":
            return None
        full, weighted = self.qk_norm == "full", self.qk_norm != "weightless"
        widths = [self.head_dim * (n if full else 1) for n in (n_heads, n_kv_heads)]
        q, k = (RMSNorm(width, self.inner_eps, weighted) for width in widths)
        return QKNorm(q, k, self.qk_norm_after_rope)


class QKV(Linear):
    """The queries, keys and values of each token, in one matrix product.

    `counts` are the query heads and key-value heads, `widths` those of a key and of a value. With
    a `clip` c all are cut to -c..c.
    """

    def __init__(
        self,
        d_model: int,
        counts: tuple[int, int],
        widths: tuple[int, int],
        biased: bool,
        clip: float | None = None,
    ) -> None:
        super().__init__(d_model, counts[0] * widths[0] + counts[1] * sum(widths), biased)
        self.d_model = d_model
        self.n_heads, self.n_kv_heads = counts
        self.head_dim, self.v_dim = widths
        self.counts = counts
        self.widths = widths
        self.clip = clip

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, S, D) to (B, H, S, C), (B, K, S, C) and (B, K, S, C of the values)."""
        counts = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        rows = self(x) if self.clip is None else self(x).clamp(-self.clip, self.clip)
        if self.v_dim == self.head_dim:
            qkv = rows.unflatten(-1, (sum(counts), -1)).transpose(1, 2)
            q, k, v = qkv.split(counts, dim=1)
            return q, k, v
        widths = (self.head_dim, self.head_dim, self.v_dim)
        parts = rows.split([n * c for n, c in zip(counts, widths, strict=True)], dim=-1)
        heads = zip(parts, counts, strict=True)
        q, k, v = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in heads)
        return q, k, v


class QKNorm(nn.Module):
    """Norms of queries and keys, over each head or over all heads of a token together."""

    def __init__(self, q: RMSNorm, k: RMSNorm, after_rope: bool = False) -> None:
        super().__init__()
        self.q = q
        self.k = k
        self.after_rope = after_rope

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise (B, H, S, C) queries and (B, K, S, C) keys."""
        return normed(q, self.q), normed(k, self.k)


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """Apply a norm to (B, H, S, C), over C or, if it is as wide, over H and C."""
    if norm.width == x.shape[-1]:
        y: Tensor = norm(x)
    else:
        y = norm(x.transpose(1, 2).flatten(-2))
        y = y.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
    return y


class Attention(nn.Module):
    """softmax(q k^T scale) v over the tokens so far (Vaswani et al., arXiv 1706.03762)."""

    def __init__(
        self,
        qkv: QKV,
        rotary: nn.Module | None,
        norm: nn.Module | None,
        attend: Attend,
        gate: Linear | None,
        out: Linear,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.rotary = rotary
        self.norm = norm
        self.attend = attend
        self.gate = gate
        self.out = out

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it."""
        q, k, v = self.qkv.heads(x)
        norm: Any = self.norm
        if norm is not None and not norm.after_rope:
            q, k = norm(q, k)
        start = 0 if cache is None else cache.length
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        if norm is not None and norm.after_rope:
            q, k = norm(q, k)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = self.attend(q, k, v, start).transpose(1, 2)
        if self.gate is not None:
            y = gated(y, self.gate(x))
        out: Tensor = self.out(y.flatten(-2))
        return out

    def new_cache(self, batch: int, context: int) -> KVCache:
        """Return an empty cache."""
        return KVCache(batch, context)


def gated(y: Tensor, gate: Tensor) -> Tensor:
    """Return (B, S, H, C) times the sigmoid of `gate`, (B, S, H) or (B, S, H C)."""
    factors: Tensor = gate.unflatten(-1, (y.shape[2], -1)).float().sigmoid()
    return y * factors.to(y.dtype)


class Attend(nn.Module):
    """Scores, softmax and the mean of the values, over the tokens that a token may see.

    Soft caps and sinks are computed step by step; all else by torch's own kernel.
    """

    def __init__(
        self,
        n_heads: int,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.scale = scale
        self.window = window
        self.chunk = chunk
        self.softcap = softcap
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if sinks else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """Return (B, H, S, C of v) for queries at start, start + 1, ... and keys from 0 on.

        On CPUs a bfloat16 gradient goes through float32: the kernel's own is up to 3 times slower.
        """
        dtype = q.dtype
        if q.requires_grad and q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        first = self.first_seen(start)
        if first:
            k, v = k[:, :, first:], v[:, :, first:]
        length = int(q.shape[2])  # a tensor while the model is traced
        mask = None
        step_by_step = self.softcap is not None or self.sinks is not None
        causal = length > 1 and start == first and not self.is_limited(start, length)
        if length > 1 and (step_by_step or not causal):
            mask = self.seen(start, length, first, q.device)
        if step_by_step:
            return self.by_hand(q, k, v, mask).to(dtype)
        grouped = int(k.shape[1]) < self.n_heads
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return y.to(dtype)

    def first_seen(self, start: int) -> int:
        """Return the first position that a query at `start` sees."""
        if self.chunk is not None:
            return start // self.chunk * self.chunk
        return 0 if self.window is None else max(0, start - self.window + 1)

    def is_limited(self, start: int, length: int) -> bool:
        """Whether the last of `length` queries from `start` on sees less than the first one."""
        return self.first_seen(start + length - 1) > self.first_seen(start)

    def seen(self, start: int, length: int, first: int, device: torch.device) -> Tensor:
        """Return (S, L) which keys, from position `first` on, each query sees."""
        query = torch.arange(start, start + length, device=device).unsqueeze(-1)
        key = torch.arange(first, start + length, device=device)
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & (key >= query - query % self.chunk)
        return seen

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with a soft cap or sinks; K key-value heads serve H / K query heads each."""
        kv_heads = k.shape[1]
        q = q.unflatten(1, (kv_heads, -1))  # (B, K, H / K, S, C)
        scores = (q @ k.unsqueeze(2).transpose(-2, -1)).float() * self.scale
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.float().view(1, kv_heads, -1, 1, 1)
            sinks = sinks.expand(*scores.shape[:-1], 1)
            shares = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            shares = scores.softmax(dim=-1)
        return (shares.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)
