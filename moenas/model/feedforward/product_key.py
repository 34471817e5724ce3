"""Product-key memory: a large table of vectors, of which each token reads a few. Kind: product_key.

Lample et al., arXiv 1907.05242, without the batch norm of the query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import setting
from moenas.model.feedforward.dense import FFN
from moenas.model.layers.linear import Linear
from moenas.records import Cost

# Shapes: T tokens, D model width, H heads, C keys a half, Q width of a query, K vectors read.


@dataclass(frozen=True, kw_only=True)
class ProductKeyFFN(FFN, kind="product_key"):
    """n_keys^2 vectors; a token reads the `top_k` whose keys fit its query best, for each head.

    The key of vector (i, j) is the i-th key of one half beside the j-th of the other. So the best
    of n_keys^2 are among the top_k^2 pairs of the best of each half.
    """

    n_keys: int = setting("keys a half; the memory has n_keys^2 vectors", low=1)
    d_key: int = setting("width of a query, both halves together", default=64, low=8, multiple=8)
    n_heads: int = setting("queries of a token, each with its own keys", default=1, low=1)
    top_k: int = setting("vectors that a query reads", default=8, low=1)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.top_k > self.n_keys:
            return f"top_k ({self.top_k}) must be at most n_keys ({self.n_keys})"
        if self.top_k == 1:
            return "with top_k: 1 the keys learn nothing: the only weight is 1; take 2 or more"
        return None

    def cost(self, d_model: int, context: int) -> Cost:
        """Count queries and keys as matrix products; of the memory only what is read is active."""
        search = self.n_heads * self.d_key * (d_model + self.n_keys)
        memory = d_model * self.n_keys**2
        read = min(memory, self.n_heads * self.top_k * d_model)
        params = search + memory
        return Cost(params=params, active_params=search + read, flops_per_token=2 * search)

    def build(self, d_model: int) -> nn.Module:
        """Build the layer at a model width."""
        return ProductKeys(d_model, self.n_keys, self.d_key, self.n_heads, self.top_k)


class ProductKeys(nn.Module):
    """sum over heads and the K best (i, j) of softmax(q1 k1_i + q2 k2_j) v_ij."""

    matrices = ("keys", "values")

    writes = ("values",)

    def __init__(self, d_model: int, n_keys: int, d_key: int, n_heads: int, top_k: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.n_keys = n_keys
        self.d_key = d_key
        self.n_heads = n_heads
        self.top_k = top_k
        self.query = Linear(d_model, n_heads * d_key)
        self.keys = nn.Parameter(torch.empty(2 * n_heads, n_keys, d_key // 2))
        self.values = nn.Parameter(torch.empty(n_keys**2, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D); scores and softmax in float32."""
        queries = self.query(x.flatten(0, 1)).float()  # (T, H Q)
        halves = queries.unflatten(-1, (2 * self.n_heads, -1)).transpose(0, 1)  # (2 H, T, Q / 2)
        scores = torch.bmm(halves, self.keys.float().transpose(-2, -1))  # (2 H, T, C)
        best = scores.topk(self.top_k, dim=-1)
        first, second = best.values.unflatten(0, (-1, 2)).unbind(dim=1)  # (H, T, K) each
        i, j = best.indices.unflatten(0, (-1, 2)).unbind(dim=1)
        pairs = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)  # (H, T, K K)
        numbers = (i.unsqueeze(-1) * self.n_keys + j.unsqueeze(-2)).flatten(-2)
        chosen = pairs.topk(self.top_k, dim=-1)
        weights = chosen.values.softmax(dim=-1).unsqueeze(-1).to(x.dtype)
        read = F.embedding(numbers.gather(-1, chosen.indices), self.values).to(x.dtype)
        y: Tensor = (weights * read).sum(dim=(0, -2))
        return y.view_as(x)
