"""Mixtures of attention heads: experts are heads that share keys and values. Kind: moa."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from moenas.grammar.component import setting
from moenas.model.layers.linear import Linear, on_cuda
from moenas.model.mixers.mixer import MOST, KVCache, Mixer
from moenas.model.mixers.rotary import FORMER, Rope
from moenas.model.mixers.softmax_attention import AttentionSpan, SoftmaxAttention
from moenas.model.moe.balance import LoadBalancer
from moenas.model.moe.dispatch import (
    ExpertRows,
    grouped,
    row_multiple,
    rows_by_token,
    rows_of,
    sort_slots,
    sums_of,
    traced,
)
from moenas.model.moe.gating import Gating, RoutingDecision
from moenas.model.moe.routed_layer import RoutedLayer
from moenas.model.moe.router import Router
from moenas.records import Cost

# Shapes: B sequences of S tokens, T = B S tokens, D model width, E experts, N experts chosen for a
# token, K key-value heads, C width of a head. An expert has K query heads, W = K C numbers.


@dataclass(frozen=True, kw_only=True)
class MoAMixer(Mixer, kind="moa"):
    """Mixture of attention heads (arXiv 2210.05144, section 3; JetMoE, arXiv 2404.07413).

    An expert projects a token to a query for each key-value head, and projects the outputs of these
    heads back to the stream. All experts share the keys and values. The router chooses for each
    token.
    """

    n_experts: int = setting("experts, each with queries and an output of its own", low=1)
    head_dim: int = setting("width of a head", low=8, high=MOST, multiple=8)
    n_kv_heads: int = setting(
        "key-value heads; an expert has a query head for each (JetMoE: 16)", default=1, low=1
    )
    router: Router = setting("how experts are chosen, weighted and balanced", default=Router())
    rope: Rope = setting("rotary position embeddings of queries and keys", default=Rope())
    window: int | None = setting(
        "a token sees itself and the window - 1 tokens before", default=None, low=2
    )
    scale: float | None = setting(
        "factor of the scores; null: 1 / sqrt(head_dim)", default=None, low=0.0
    )
    out_bias: bool = setting("the layer adds a bias to its output (JetMoE)", default=False)

    former: ClassVar[Mapping[str, str]] = FORMER

    @property
    def width(self) -> int:
        """Width of the queries of an expert, of all keys, and of all values."""
        return self.n_kv_heads * self.head_dim

    @property
    def factor(self) -> float:
        """What the scores are multiplied with."""
        return float(self.head_dim**-0.5 if self.scale is None else self.scale)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.router.top_k > self.n_experts:
            return f"top_k ({self.router.top_k}) must be at most n_experts ({self.n_experts})"
        if not self.router.selection.per_token:
            return (
                f"selection: '{self.router.selection.kind}' is not for heads; take 'top_k' or"
                " 'noisy_top_k'"
            )
        if self.router.logits.input != "ffn":
            return (
                f"logits.input: '{self.router.logits.input}' is for feed-forward layers; a router"
                " of heads reads what the mixer reads: leave it out"
            )
        return self.router.invalid_among(self.n_experts)

    def canonical(self) -> Self:
        """Reset fields without effect, and write the router canonically."""
        rope, folded = self.rope.fold_into_scale(self.head_dim)
        factor, usual = self.factor * folded, self.head_dim**-0.5
        near = abs(factor - usual) <= 1e-10 * usual
        return replace(
            self,
            router=self.router.canonical_among(self.n_experts),
            rope=rope,
            scale=None if near else float(f"{factor:.12g}"),
        )

    def cost(self, d_model: int, context: int) -> Cost:
        """Count all experts as parameters and top_k of them as active, over the full context."""
        expert, kv = 2 * d_model * self.width, 2 * d_model * self.width
        used, bias = expert * self.router.top_k + kv, d_model * self.out_bias
        params = expert * self.n_experts + kv + bias
        scores = 2 * context * 2 * self.width * self.router.top_k
        return self.router.cost(d_model, self.n_experts) + Cost(
            params=params,
            active_params=used + bias,
            flops_per_token=2 * used + scores,
            kv_bytes_per_token=2 * 2 * self.width,
        )

    def build(self, d_model: int) -> nn.Module:
        """Build the layer at a model width."""
        n_heads = self.n_kv_heads * self.router.top_k
        attention = SharedKeys(
            Linear(d_model, 2 * self.width),
            self.rope.build(self.head_dim),
            SoftmaxAttention(n_heads, self.factor, AttentionSpan(self.window)),
            self.n_kv_heads,
        )
        return MoA(
            self.router.build(d_model, self.n_experts),
            self.router.build_balancer(self.n_experts),
            HeadExperts(self.n_experts, d_model, self.width, self.router.weight_on),
            attention,
            self.router.capacity_factor,
            self.out_bias,
        )


class HeadExperts(nn.Module):
    """E query projections and E output projections in two stacks of matrices, each (in, out)."""

    matrices = ("query", "out")

    def __init__(self, n_experts: int, d_model: int, width: int, weight_on: str) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.d_model = d_model
        self.width = width
        self.weight_on = weight_on
        self.query = nn.Parameter(torch.empty(n_experts, d_model, width))
        self.out = nn.Parameter(torch.empty(n_experts, width, d_model))

    def rows(self, x: Tensor, choice: RoutingDecision, kept: Tensor | None) -> ExpertRows:
        """Return where the slots of `x` (T, D) lie; the slots of an expert lie together."""
        multiple = row_multiple(x, choice.experts, self.n_experts)
        return sort_slots(choice.experts, self.n_experts, kept, multiple)

    def queries(self, x: Tensor, choice: RoutingDecision, rows: ExpertRows) -> Tensor:
        """Return the queries (T N, W) of tokens (T, D), by slots; 0 where one is dropped."""
        if on_cuda(x):
            return self.queries_on_cuda(x, choice, rows)
        n_slots = choice.experts.numel()
        taken = x.index_select(0, rows.slot // choice.experts.shape[1])
        if self.weight_on == "input":
            taken = taken * self.weights(choice, rows, x.dtype)
        y = self.product(taken, self.query, rows)
        return y.new_zeros(n_slots, self.width).index_add(0, rows.slot, y)

    def outputs(self, y: Tensor, choice: RoutingDecision, rows: ExpertRows) -> Tensor:
        """Return (T, D): for each token the weighted sum over its experts, from (T N, W)."""
        if on_cuda(y):
            return self.outputs_on_cuda(y, choice, rows)
        n_tokens, top_k = choice.experts.shape
        z = self.product(y.index_select(0, rows.slot), self.out, rows)
        if self.weight_on == "output":
            z = z * self.weights(choice, rows, y.dtype)
        return z.new_zeros(n_tokens, self.d_model).index_add(0, rows.slot // top_k, z)

    def chosen(self, choice: RoutingDecision, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return (T, N, E), 1 where a slot that is kept goes to an expert."""
        experts = torch.arange(self.n_experts, device=choice.experts.device)
        goes = choice.experts.unsqueeze(-1) == experts
        return (goes if kept is None else goes & kept.unsqueeze(-1)).to(dtype)

    def all_queries(self, x: Tensor, choice: RoutingDecision, kept: Tensor | None) -> Tensor:
        """Return what `queries` does, from the products of all tokens with all experts.

        A tracer sees products of fixed form, without a sort, at E / N times the operations.
        """
        chosen = self.chosen(choice, kept, x.dtype)
        queries = x @ self.query.to(x.dtype).transpose(0, 1).flatten(1)  # (T, E W)
        y: Tensor = chosen @ queries.unflatten(-1, (self.n_experts, self.width))  # (T, N, W)
        if self.weight_on == "input":
            y = y * choice.weights.unsqueeze(-1).to(x.dtype)
        return y.flatten(0, 1)

    def all_outputs(self, y: Tensor, choice: RoutingDecision, kept: Tensor | None) -> Tensor:
        """Return what `outputs` does; see `all_queries`."""
        chosen = self.chosen(choice, kept, y.dtype)
        if self.weight_on == "output":
            chosen = chosen * choice.weights.unsqueeze(-1).to(y.dtype)
        by_expert = chosen.transpose(1, 2) @ y.unflatten(0, choice.experts.shape)  # (T, E, W)
        z: Tensor = by_expert.flatten(1) @ self.out.to(y.dtype).flatten(0, 1)
        return z

    def queries_on_cuda(self, x: Tensor, choice: RoutingDecision, rows: ExpertRows) -> Tensor:
        """Return the queries with sums in one order."""
        at = rows_by_token(rows, *choice.experts.shape)
        taken = rows_of(x, at)
        if self.weight_on == "input":
            taken = taken * self.weights_on_cuda(choice, rows, x.dtype)
        y = self.product(taken, self.query, rows)
        return sums_of(y, at.by_slot(rows.slot))

    def outputs_on_cuda(self, y: Tensor, choice: RoutingDecision, rows: ExpertRows) -> Tensor:
        """Return the outputs with sums in one order; the projection is linear in its weight."""
        at = rows_by_token(rows, *choice.experts.shape)
        taken = rows_of(y, at.by_slot(rows.slot))
        if self.weight_on == "output":
            taken = taken * self.weights_on_cuda(choice, rows, y.dtype)
        z = self.product(taken, self.out, rows)
        return sums_of(z, at)

    def weights_on_cuda(
        self, choice: RoutingDecision, rows: ExpertRows, dtype: torch.dtype
    ) -> Tensor:
        """Return the weight of the slot in each row, (rows, 1)."""
        return choice.weights.flatten().index_select(0, rows.slot).unsqueeze(-1).to(dtype)

    def product(self, x: Tensor, stack: Tensor, rows: ExpertRows) -> Tensor:
        """Multiply each row with the matrix of its expert; rows without a slot are 0."""
        # The grouped product leaves them unwritten, in its output and in the gradient of its input.
        x = x if rows.empty is None else x.masked_fill(rows.empty, 0)
        y = grouped(x, stack.to(x.dtype), rows.ends)
        return y if rows.empty is None else y.masked_fill(rows.empty, 0)

    def weights(self, choice: RoutingDecision, rows: ExpertRows, dtype: torch.dtype) -> Tensor:
        """Return the weight of the slot in each row, (rows, 1)."""
        return choice.weights.flatten()[rows.slot].unsqueeze(-1).to(dtype)


class SharedKeys(nn.Module):
    """Keys and values of all experts, and attention over them."""

    def __init__(
        self, keys: Linear, rotary: nn.Module | None, attend: SoftmaxAttention, n_kv_heads: int
    ) -> None:
        super().__init__()
        self.keys = keys
        self.rotary = rotary
        self.attend = attend
        self.n_kv_heads = n_kv_heads

    def forward(self, x: Tensor, rows: Tensor, cache: KVCache | None) -> Tensor:
        """Map tokens (B, S, D) and queries (T N, W) by slots to (T N, W)."""
        batch, length = x.shape[:2]
        q = rows.view(batch, length, -1, self.n_kv_heads, rows.shape[-1] // self.n_kv_heads)
        q = q.permute(0, 3, 2, 1, 4).flatten(1, 2)  # (B, K N, S, C): N heads for each key
        kv = self.keys(x).unflatten(-1, (2 * self.n_kv_heads, -1)).transpose(1, 2)
        k, v = kv.chunk(2, dim=1)
        start = 0 if cache is None else cache.length
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        if cache is not None:
            k, v = cache.extend(k, v)
        y: Tensor = self.attend(q, k, v, start).unflatten(1, (self.n_kv_heads, -1))
        return y.permute(0, 3, 2, 1, 4).reshape(rows.shape)


class MoA(RoutedLayer):
    """Mixture of attention heads: sum over the chosen experts of weight * out(attend(query(x))).

    Routing, balancing and statistics are the same as for feed-forward experts. A dropped slot adds
    nothing.
    """

    matrices: tuple[str, ...] = ()

    def __init__(
        self,
        router: Gating,
        balance: LoadBalancer,
        experts: HeadExperts,
        attention: SharedKeys,
        capacity_factor: float | None,
        biased: bool,
    ) -> None:
        super().__init__(router, balance, experts, capacity_factor)
        self.attention = attention
        self.biased = biased
        self.bias = nn.Parameter(torch.zeros(experts.d_model)) if biased else None

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D) and note the routing; with a cache, `x` continues it."""
        tokens = x.flatten(0, 1)
        choice: RoutingDecision = self.router(tokens, self.balance.bias)
        kept, dropped = self.apply_capacity(choice, x.shape[0])
        y: Tensor
        if traced(x):
            heads = self.attention(x, self.experts.all_queries(tokens, choice, kept), cache)
            y = self.experts.all_outputs(heads, choice, kept).view_as(x)
        else:
            rows = self.experts.rows(tokens, choice, kept)
            heads = self.attention(x, self.experts.queries(tokens, choice, rows), cache)
            y = self.experts.outputs(heads, choice, rows).view_as(x)
        self.routing = self.balance(choice, dropped, x.shape[0])
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def new_cache(self, batch: int, context: int) -> KVCache:
        """Return an empty cache."""
        return KVCache(batch, context)
