"""The token indexer: it selects the earlier tokens that attention reads (DeepSeek-V3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moenas.grammar.component import Component, Conflict, setting
from moenas.model.layers.linear import Linear, size
from moenas.model.layers.norms import LayerNorm
from moenas.model.mixers.mixer import MOST, KVCache

# Shapes: B sequences, S tokens of a sequence, L tokens so far, D model width, n heads of the
# indexer, d the width of such a head.


@dataclass(frozen=True, kw_only=True)
class TokenIndexer(Component):
    """`indexer`: each token attends to the `top_k` earlier tokens of the highest index score.

    The lightning indexer of DeepSeek-V3.2-Exp (arXiv 2512.02556, section 2.1): the score of a pair
    of tokens is sum_j w_j relu(q_j k), over heads j with one key for all. It has no effect on a
    context of up to `top_k` tokens. The language model loss does not reach it: it learns by the
    divergence of its scores from the mean attention weights of the heads. FLOPs count the scores of
    all pairs on contexts above `top_k`, and not what the divergence takes in training.
    """

    n_heads: int = setting("heads of the index scores", low=1, high=MOST)
    head_dim: int = setting(
        "width of a head; the first rope_dim elements have a position",
        low=8,
        high=MOST,
        multiple=8,
    )
    top_k: int = setting("tokens that a token attends to, itself included", low=1)
    loss_coef: float = setting(
        "weight of the divergence that the indexer learns by", default=1.0, low=1e-6
    )

    def n_weights(self, d_model: int, q_rank: int) -> int:
        """Return the elements of the matrices."""
        width = self.n_heads * self.head_dim
        return q_rank * width + d_model * (self.head_dim + self.n_heads)

    def n_params(self, d_model: int, q_rank: int) -> int:
        """Return the number of parameters: matrices, and the norm of the keys with its bias."""
        return self.n_weights(d_model, q_rank) + 2 * self.head_dim

    def flops_per_token(self, d_model: int, q_rank: int, context: int) -> int:
        """Return the operations of projections and scores; none where nothing is left out."""
        if context <= self.top_k:
            return 0
        return 2 * (self.n_weights(d_model, q_rank) + context * self.n_heads * self.head_dim)

    def build(self, d_model: int, q_rank: int, rotary: nn.Module | None) -> IndexedSelection:
        """Build the indexer of a layer; `rotary` turns the first elements of a head."""
        return IndexedSelection(
            (d_model, q_rank), self.n_heads, self.head_dim, self.top_k, self.loss_coef, rotary
        )


def index_source_error(mixers: Sequence[Any]) -> Conflict | None:
    """Return which mixer reads the selection of an earlier indexer that it cannot, or None.

    The mixers are records, by layers; None where a layer has none.
    """
    source: Any = None
    for i, mixer in enumerate(mixers):
        if getattr(mixer, "indexer", None) is not None:
            source = mixer
        if not getattr(mixer, "index_shared", False):
            continue
        if source is None:
            reason = "no layer before it has an indexer; give it one, or leave index_shared out"
            return Conflict(mixer, f"layer {i}: index_shared: {reason}")
        if source.window != mixer.window:
            reason = f"its window is {mixer.window}, and the window of the indexer is"
            f" {source.window}"
            return Conflict(mixer, f"layer {i}: index_shared: {reason}; make them equal")
    return None


class IndexedSelection(nn.Module):
    """Selects for each token the `top_k` tokens so far of the highest index score."""

    def __init__(
        self,
        widths: tuple[int, int],
        n_heads: int,
        head_dim: int,
        top_k: int,
        loss_coef: float,
        rotary: nn.Module | None,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.top_k = top_k
        self.loss_coef = loss_coef
        self.rotary = rotary
        d_model, q_rank = widths
        self.query = Linear(q_rank, n_heads * head_dim)
        self.key = Linear(d_model, head_dim)
        self.norm = LayerNorm(head_dim, 1e-6, weighted=True, biased=True)
        self.weigh = Linear(d_model, n_heads)
        self.index_loss: Tensor | None = None
        """The weighted divergence of the last training pass, a scalar."""

    def scores(
        self, x: Tensor, latent: Tensor, start: int, cache: KVCache | None = None
    ) -> Tensor | None:
        """Return index scores (B, S, L), float32; None in evaluation where nothing is left out.

        `x` (B, S, D) is what the layer reads, `latent` (B, S, q_rank) its latent of the queries.
        """
        self.index_loss = None  # of an earlier pass, whose graph may be gone
        end = start + size(x.shape[1])
        inert = not torch.compiler.is_compiling() and not self.training and end <= self.top_k
        if inert and cache is None:
            return None
        # 1. One key for all heads, (B, 1, L, d): the cache needs it whatever the length.
        x, latent = x.detach(), latent.detach()
        k = self.turned(self.norm(self.key(x)).unsqueeze(1), start)
        if cache is not None:
            k, _ = cache.extend(k, k[..., :0])
        if inert:
            return None
        # 2. Products of the heads, (B, n, S, L), and their weighted sum.
        q = self.query(latent).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        products = (self.turned(q, start) @ k.transpose(-2, -1)).float() * self.head_dim**-0.5
        weights = self.weigh(x).float() * self.n_heads**-0.5  # (B, S, n)
        scores: Tensor = (products.relu() * weights.transpose(1, 2).unsqueeze(-1)).sum(dim=1)
        return scores

    def turned(self, x: Tensor, start: int) -> Tensor:
        """Rotate (B, n, S, d) at positions start, start + 1, ..."""
        rotary: Any = self.rotary
        y: Tensor = x if rotary is None else rotary(x, start)
        return y

    def selected(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Return which keys are read, (B, S, L), of those that the span lets be `seen` (S, L)."""
        scores = scores.detach().masked_fill(~seen, -torch.inf)
        traced = torch.compiler.is_compiling()
        if not traced and size(scores.shape[-1]) <= self.top_k:
            return seen.expand_as(scores)
        # Scores of 0 are equal where all heads are negative. A stable order takes the earlier token
        # then, whatever the length, so that decoding with a cache selects the same.
        order = scores.argsort(dim=-1, descending=True, stable=True)
        if traced:  # an open length can be below top_k
            return (order.argsort(dim=-1) < self.top_k) & seen
        best = torch.zeros_like(scores).scatter(-1, order[..., : self.top_k], 1.0)
        return (best > 0) & seen

    def learn(self, scores: Tensor, chosen: Tensor, attention: Tensor) -> None:
        """Keep the divergence of the scores from the mean weights of the heads, both (B, S, L).

        It is KL(attention || softmax(scores)) over the chosen keys, the mean of all tokens
        (section 2.1.1).
        """
        logs = scores.masked_fill(~chosen, -torch.inf).log_softmax(dim=-1).masked_fill(~chosen, 0)
        terms = attention * (attention.clamp_min(1e-20).log() - logs)
        self.index_loss = self.loss_coef * terms.sum(dim=-1).mean()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: the graph of the last pass cannot be copied."""
        return {**self.__dict__, "index_loss": None}


class IndexedCache(KVCache):
    """A cache with the keys of an indexer beside the keys of the attention."""

    def __init__(self, batch: int, context: int) -> None:
        super().__init__(batch, context)
        self.index = KVCache(batch, context)


def total_index_loss(modules: Any) -> Tensor | None:
    """Return the weighted losses of the indexers among some modules, or None without one."""
    # The class is not named, so that the source of a model without an indexer lacks it.
    losses = [getattr(module, "index_loss", None) for module in modules]
    known = [loss for loss in losses if loss is not None]
    return torch.stack(known).sum() if known else None
