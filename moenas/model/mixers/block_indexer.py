"""The block indexer: it selects the blocks of earlier tokens that attention reads (MiniMax-M3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import Component, setting
from moenas.model.layers.linear import Linear, size
from moenas.model.layers.norms import RMSNorm
from moenas.model.mixers.mixer import MOST, KVCache

# Shapes: B sequences, S tokens of a sequence, L tokens so far, D model width, K key-value heads,
# d width of an index head, N blocks of keys.


@dataclass(frozen=True, kw_only=True)
class BlockIndexer(Component):
    """`block_indexer`: the heads of a key-value head read the `top_blocks` blocks of keys of it.

    MiniMax Sparse Attention (MiniMax-M3, 2026; released code): each key-value head has an index
    head, with one index key for all. The score of a key is q k, of normed and turned q and k. A
    block has the largest score of its keys. It has no effect on a context of up to `top_blocks`
    blocks. The language model loss does not reach the indexer. It learns by the divergence of its
    scores from the attention weights, as the token indexer of DeepSeek-V3.2 (arXiv 2512.02556,
    section 2.1.1). Each key-value head has a divergence of its own. FLOPs count the scores of all
    pairs on contexts above `top_blocks` blocks, and not what the divergence takes in training.
    """

    head_dim: int = setting(
        "width of an index head; its first elements turn as in the attention",
        low=8,
        high=MOST,
        multiple=8,
    )
    block: int = setting("tokens of a block, which begins at a multiple of it", low=1, high=1 << 20)
    top_blocks: int = setting("blocks that a token reads, local_blocks included", low=1)
    local_blocks: int = setting(
        "blocks that a token always reads: its own, and those just before", default=1, low=1
    )
    loss_coef: float = setting(
        "weight of the divergence that the indexer learns by", default=1.0, low=1e-6
    )

    def invalid(self) -> str | None:
        """Refuse more local blocks than a token reads."""
        if self.local_blocks > self.top_blocks:
            return f"local_blocks ({self.local_blocks}) is above top_blocks ({self.top_blocks})"
        return None

    @property
    def reach(self) -> int:
        """The longest context in tokens on which nothing is left out."""
        return self.block * self.top_blocks

    def n_weights(self, d_model: int, n_kv_heads: int) -> int:
        """Return the elements of the matrices."""
        return d_model * self.head_dim * (n_kv_heads + 1)

    def n_params(self, d_model: int, n_kv_heads: int) -> int:
        """Return the number of parameters: matrices, and the norms of queries and keys."""
        return self.n_weights(d_model, n_kv_heads) + 2 * self.head_dim

    def flops_per_token(self, d_model: int, n_kv_heads: int, context: int) -> int:
        """Return the operations of projections and scores; none where nothing is left out."""
        if context <= self.reach:
            return 0
        pairs = context * n_kv_heads * self.head_dim
        return 2 * (self.n_weights(d_model, n_kv_heads) + pairs)

    def build(
        self, d_model: int, n_kv_heads: int, eps: float, rotary: nn.Module | None
    ) -> BlockSelection:
        """Build the indexer of a layer; `rotary` turns the first elements of a head."""
        return BlockSelection(
            Linear(d_model, n_kv_heads * self.head_dim),
            Linear(d_model, self.head_dim),
            RMSNorm(self.head_dim, eps),
            RMSNorm(self.head_dim, eps),
            rotary,
            block=self.block,
            top_blocks=self.top_blocks,
            local_blocks=self.local_blocks,
            loss_coef=self.loss_coef,
        )


class BlockSelection(nn.Module):
    """Selects for each token and key-value head the blocks of keys of the highest index score."""

    def __init__(
        self,
        query: Linear,
        key: Linear,
        query_norm: RMSNorm,
        key_norm: RMSNorm,
        rotary: nn.Module | None,
        *,
        block: int,
        top_blocks: int,
        local_blocks: int,
        loss_coef: float,
    ) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.query_norm = query_norm
        self.key_norm = key_norm
        self.rotary = rotary
        self.block = block
        self.top_blocks = top_blocks
        self.local_blocks = local_blocks
        self.loss_coef = loss_coef
        self.index_loss: Tensor | None = None
        """The weighted divergence of the last training pass, a scalar."""

    def scores(self, x: Tensor, start: int, cache: KVCache | None = None) -> Tensor | None:
        """Return index scores (B, K, S, L), float32, of what the layer reads, `x` (B, S, D).

        None in evaluation where nothing is left out.
        """
        self.index_loss = None  # of an earlier pass, whose graph may be gone
        end = start + size(x.shape[1])
        inert = not torch.compiler.is_compiling() and not self.training
        inert = inert and end <= self.block * self.top_blocks
        if inert and cache is None:
            return None
        # 1. One key for all heads, (B, 1, L, d): the cache needs it whatever the length.
        x = x.detach()
        k = self.turned(self.key_norm(self.key(x)).unsqueeze(1), start)
        if cache is not None:
            k, _ = cache.extend(k, k[..., :0])
        if inert:
            return None
        # 2. Products of each index head, scaled for the softmax of the divergence.
        q = self.query(x).unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)  # (B, K, S, d)
        q = self.turned(self.query_norm(q), start)
        scores: Tensor = (q @ k.transpose(-2, -1)).float() * k.shape[-1] ** -0.5
        return scores

    def turned(self, x: Tensor, start: int) -> Tensor:
        """Rotate (B, n, S, d) at positions start, start + 1, ..."""
        rotary: Any = self.rotary
        y: Tensor = x if rotary is None else rotary(x, start)
        return y

    def selected(self, scores: Tensor, seen: Tensor, start: int) -> Tensor:
        """Return which keys are read, (B, K, S, L), of those that may be `seen` (S, L)."""
        n_keys = size(scores.shape[-1])
        scores = scores.detach().masked_fill(~seen, -torch.inf)
        if torch.compiler.is_compiling():
            return self.selected_in_trace(scores, start) & seen
        # 1. The largest score of each block, (B, K, S, N); blocks of the future have none.
        pad = -n_keys % self.block
        scores = F.pad(scores, (0, pad), value=-torch.inf)
        blocks = scores.unflatten(-1, (-1, self.block)).amax(dim=-1)
        # 2. The block of a token, and those just before it, go first.
        places = torch.arange(blocks.shape[-1], device=scores.device)
        own = torch.arange(start, start + size(scores.shape[-2]), device=scores.device)
        behind = (own // self.block).unsqueeze(-1) - places  # (S, N)
        local = (behind >= 0) & (behind < self.local_blocks)
        blocks = blocks.masked_fill(local, torch.inf)
        # 3. The best blocks. A stable order takes the earlier one of two that are equal.
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        best = order.argsort(dim=-1) < self.top_blocks
        kept: Tensor = best.repeat_interleave(self.block, dim=-1)[..., :n_keys] & seen
        return kept

    def selected_in_trace(self, scores: Tensor, start: int) -> Tensor:
        """Return the same (B, K, S, L) where L is open, so that it cannot be cut into blocks.

        Each key carries the score of its block, and the first key of a block stands for it.
        """
        n_keys = scores.shape[-1]
        keys = torch.arange(n_keys, device=scores.device)
        first, best = keys // self.block * self.block, torch.full_like(scores, -torch.inf)
        for i in range(self.block):
            place = first + i
            value = scores[..., place.clamp(max=n_keys - 1)]
            best = torch.maximum(best, value.masked_fill(place >= n_keys, -torch.inf))
        own = torch.arange(start, start + scores.shape[-2], device=scores.device)
        behind = (own // self.block).unsqueeze(-1) - keys // self.block  # (S, L)
        best = best.masked_fill((behind >= 0) & (behind < self.local_blocks), torch.inf)
        best = best.masked_fill(keys != first, -torch.inf)
        rank = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        kept: Tensor = rank[..., first] < self.top_blocks
        return kept

    def learn(self, scores: Tensor, chosen: Tensor, attention: Tensor) -> None:
        """Keep the divergence of the scores from the attention weights, all (B, K, S, L).

        It is KL(attention || softmax(scores)) over the chosen keys, the mean over tokens and heads.
        """
        logs = scores.masked_fill(~chosen, -torch.inf).log_softmax(dim=-1).masked_fill(~chosen, 0)
        terms = attention * (attention.clamp_min(1e-20).log() - logs)
        self.index_loss = self.loss_coef * terms.sum(dim=-1).mean()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: the graph of the last pass cannot be copied."""
        return {**self.__dict__, "index_loss": None}
