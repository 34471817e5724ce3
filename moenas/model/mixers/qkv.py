"""Projections to queries, keys and values, in one product or through a latent, and their norms."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from moenas.model.layers.linear import Linear
from moenas.model.layers.norms import RMSNorm

# Shapes: B sequences, S tokens of a sequence, D model width, H heads, K key-value heads, C width
# of a head.


class Heads(NamedTuple):
    """Queries, keys and values by heads."""

    q: Tensor
    """(B, H, S, C)"""
    k: Tensor
    """(B, K, S, C)"""
    v: Tensor
    """(B, K, S, C of the values)"""


class QKV(Linear):
    """The queries, keys and values of each token, in one matrix product.

    `counts` are the query heads and key-value heads. `widths` are the widths of a key and of a
    value. With a width of 0 the keys are the values, too. With a `clip` c all are cut to -c..c.
    """

    matrices = ("weight",)

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

    def heads(self, x: Tensor) -> Heads:
        """Map (B, S, D) to (B, H, S, C), (B, K, S, C) and (B, K, S, C of the values)."""
        counts = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        rows = self(x) if self.clip is None else self(x).clamp(-self.clip, self.clip)
        if not self.v_dim:
            q, k = rows.unflatten(-1, (sum(counts[:2]), -1)).transpose(1, 2).split(counts[:2], 1)
            return Heads(q, k, k)
        if self.v_dim == self.head_dim:
            qkv = rows.unflatten(-1, (sum(counts), -1)).transpose(1, 2)
            q, k, v = qkv.split(counts, dim=1)
            return Heads(q, k, v)
        widths = (self.head_dim, self.head_dim, self.v_dim)
        parts = rows.split([n * c for n, c in zip(counts, widths, strict=True)], dim=-1)
        heads = zip(parts, counts, strict=True)
        q, k, v = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in heads)
        return Heads(q, k, v)


class LowRankProjection(nn.Module):
    """up(norm(down(x)) * scale): a product through a latent; `down` may give more than that."""

    def __init__(self, down: Linear, norm: RMSNorm, up: Linear, scale: float = 1.0) -> None:
        super().__init__()
        self.down = down
        self.norm = norm
        self.up = up
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, width)."""
        y: Tensor = self.up(self.latent(x)[0])
        return y

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent (B, S, rank) and the other outputs of `down` (B, S, rest)."""
        rank = self.up.d_in
        latent, beside = self.down(x).split((rank, self.down.d_out - rank), dim=-1)
        latent = self.norm(latent)
        return latent if self.scale == 1 else latent * self.scale, beside


class LowRankQKV(nn.Module):
    """Queries through a latent; keys and values in one matrix product. Arguments as of `QKV`."""

    def __init__(
        self,
        query: nn.Module,
        keys: Linear,
        counts: tuple[int, int],
        widths: tuple[int, int],
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.query = query
        self.keys = keys
        self.counts = counts
        self.widths = widths
        self.clip = clip

    def heads(self, x: Tensor) -> Heads:
        """Map (B, S, D) to (B, H, S, C), (B, K, S, C) and (B, K, S, C of the values)."""
        rows = self.query(x), self.keys(x)
        if self.clip is not None:
            rows = rows[0].clamp(-self.clip, self.clip), rows[1].clamp(-self.clip, self.clip)
        n_heads, n_kv_heads = self.counts
        k, v = rows[1], rows[1]  # of one width, where the keys are the values
        if self.widths[1]:
            k, v = rows[1].split([n_kv_heads * width for width in self.widths], dim=-1)
        parts = (rows[0], n_heads), (k, n_kv_heads), (v, n_kv_heads)
        q, k, v = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in parts)
        return Heads(q, k, v)


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


class NormedValues(nn.Module):
    """Queries, keys and values; the values pass an RMSNorm without a weight in each head."""

    def __init__(self, qkv: nn.Module, v_dim: int, eps: float) -> None:
        super().__init__()
        self.qkv = qkv
        self.v_dim = v_dim
        self.eps = eps
        self.norm = RMSNorm(v_dim, eps, weighted=False)

    def heads(self, x: Tensor) -> Heads:
        """Map (B, S, D) to (B, H, S, C), (B, K, S, C) and (B, K, S, C of the values)."""
        qkv: Any = self.qkv
        q, k, v = qkv.heads(x)
        return Heads(q, k, self.norm(v))
