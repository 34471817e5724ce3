"""Mixtures of experts: a layer of many feed-forward networks, a few for each token. Kind: moe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import changed, setting
from moenas.grammar.conditions import one_of
from moenas.model.feedforward.dense import FFN, FeedForward, SigmoidGatedFeedForward, network_cost
from moenas.model.layer_inputs import LayerInputs, ReadsInputs
from moenas.model.layers.activations import Activated, Activation, up_width
from moenas.model.layers.linear import Linear, on_cuda
from moenas.model.moe.balance import LoadBalancer
from moenas.model.moe.dispatch import (
    grouped,
    one_hot,
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

# Shapes: B sequences of S tokens, T = B S tokens, D model width, E experts, Z zero-computation
# experts, K experts chosen for a token, F width of an expert, N = T K slots (a slot is one token at
# one of its experts).


@dataclass(frozen=True, kw_only=True)
class MoEFFN(Activated, FFN, kind="moe"):
    """Many small feed-forward networks (experts), a few of which see each token.

    Fine-grained experts are many experts of a small `d_expert` (DeepSeekMoE, arXiv 2401.06066);
    shared experts see every token, with weight 1 or through a gate of their own.
    """

    n_experts: int = setting("routed experts", low=1)
    d_expert: int = setting("width of the hidden layer of an expert", low=8, multiple=8)
    expert_bias: bool = setting(
        "both projections of the routed experts add a bias (gpt-oss)", default=False
    )
    router: Router = setting("how experts are chosen, weighted and balanced", default=Router())
    n_shared_experts: int = setting("experts that every token passes", default=0, low=0)
    d_shared: int | None = setting(
        "width of a shared expert",
        derived="d_expert",
        low=8,
        multiple=8,
        without_effect={"n_shared_experts": one_of(0)},
    )
    shared_gate: bool = setting(
        "the shared experts are multiplied by sigmoid(w x) (Qwen2-MoE)",
        default=False,
        without_effect={"n_shared_experts": one_of(0)},
    )
    out_bias: bool = setting("the layer adds a bias to its output (JetMoE)", default=False)
    d_latent: int | None = setting(
        "width that routed experts work at, between a projection down before and up after them"
        " (Nemotron 3 Super); null: d_model",
        default=None,
        low=8,
        multiple=8,
    )
    n_zero_experts: int = setting(
        "experts without a network that the router chooses among, too (MoE++, arXiv 2410.07348,"
        " section 3.1; LongCat-Flash). The cost counts the networks of an even load",
        default=0,
        low=0,
    )
    zero_kind: Literal["identity", "zero", "constant"] = setting(
        "what such an expert gives: the token, nothing, or a mix of the token and a vector",
        default="identity",
        without_effect={"n_zero_experts": one_of(0)},
    )

    @property
    def causal(self) -> bool:
        """Whether the output at a token depends on no later token, in training too."""
        return self.router.causal

    @property
    def n_choices(self) -> int:
        """Experts that the router chooses among."""
        return self.n_experts + self.n_zero_experts

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together: n of width w are one of width n w."""
        return self.n_shared_experts * int(self.resolved("d_shared"))

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.router.top_k > self.n_choices:
            zeros = f" + n_zero_experts ({self.n_zero_experts})" if self.n_zero_experts else ""
            return f"top_k ({self.router.top_k}) must be at most n_experts ({self.n_experts})" + (
                zeros
            )
        return self.router.invalid_among(self.n_choices)

    def canonical(self) -> Self:
        """Write the shared experts as one, the router canonically, and reset what has no effect."""
        router = self.router.canonical_among(self.n_choices)
        # relu(w x) = w relu(x) for w > 0, so it is the same weight before and after such experts.
        if self.activation == "relu" and not self.expert_bias and not router.expert_scale:
            router = changed(router, weight_on="output")
        return changed(
            self,
            **self.canonical_activation(),
            router=router,
            n_shared_experts=min(self.n_shared_experts, 1),
            d_shared=self.shared_width or None,
            shared_gate=self.shared_gate and self.shared_width > 0,
            zero_kind=self.zero_kind if self.n_zero_experts else "identity",
        )

    def cost(self, d_model: int, context: int) -> Cost:
        """Count all experts as parameters, and top_k of them as active.

        Of top_k experts an even load sends n_experts / (n_experts + n_zero_experts) to networks,
        rounded down to a whole operation.
        """
        width = self.d_latent or d_model
        expert = network_cost(width, self.d_expert, self.activation, self.expert_bias)
        used = [x * self.n_experts * self.router.top_k // self.n_choices for x in (
            expert.active_params, expert.flops_per_token)]  # fmt: skip
        params = expert.params * self.n_experts
        latent = 2 * d_model * self.d_latent if self.d_latent else 0
        zero = 3 * d_model * self.n_zero_experts if self.zero_kind == "constant" else 0
        gate = d_model if self.shared_gate and self.shared_width else 0
        rest, bias = latent + zero + gate, d_model * self.out_bias
        return (
            Cost(params=params, active_params=used[0], flops_per_token=used[1])
            + Cost(params=rest + bias, active_params=rest + bias, flops_per_token=2 * rest)
            + self.router.cost(d_model, self.n_choices)
            + network_cost(d_model, self.shared_width, self.activation, False)
        )

    def surplus_flops(self, d_model: int, context: int) -> int:
        """Count a row of a network for every slot, whether it counts or not."""
        expert = network_cost(
            self.d_latent or d_model, self.d_expert, self.activation, self.expert_bias
        ).flops_per_token
        top_k, n_choices = self.router.top_k, self.n_choices
        counted = expert * self.n_experts * top_k // n_choices
        return expert * self.router.selection.slots(top_k, context, n_choices) - context * counted

    def build(self, d_model: int) -> nn.Module:
        """Build the layer at a model width."""
        experts, zeros = self.build_experts(d_model), self.n_zero_experts
        return MoE(
            self.router.build(d_model, self.n_choices),
            self.router.build_balancer(self.n_choices),
            experts,
            self.build_shared(d_model),
            ZeroExperts(zeros, d_model, self.zero_kind) if zeros else None,
            self.router.capacity_factor,
        )

    def build_shared(self, d_model: int) -> nn.Module | None:
        """Build what every token passes beside the routed experts, if there is anything."""
        shared = None
        if self.shared_width:
            network = SigmoidGatedFeedForward if self.shared_gate else FeedForward
            shared = network(d_model, self.shared_width, self.build_activation())
        return Biased(shared, d_model) if self.out_bias else shared

    def build_experts(self, d_model: int) -> nn.Module:
        """Build the experts with networks."""
        experts = Experts(
            self.n_experts,
            self.d_latent or d_model,
            self.d_expert,
            self.build_activation(),
            self.expert_bias,
            self.router.weight_on,
        )
        return LatentExperts(experts, d_model) if self.d_latent else experts


class Biased(nn.Module):
    """A network plus a bias, or the bias alone, whatever the token; it starts at 0."""

    matrices: tuple[str, ...] = ()

    writes = ("network",)

    def __init__(self, network: nn.Module | None, width: int) -> None:
        super().__init__()
        self.network = network
        self.width = width
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D), or to (D,) without a network."""
        bias = self.bias.to(x.dtype)
        return bias if self.network is None else self.network(x) + bias


class ExpertBias(nn.Module):
    """A bias for each expert; starts at 0."""

    matrices: tuple[str, ...] = ()

    def __init__(self, n_experts: int, width: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.width = width
        self.weight = nn.Parameter(torch.zeros(n_experts, width))

    def forward(self, rows: Tensor, expert: Tensor, empty: Tensor | None) -> Tensor:
        """Add to each of `rows` (N, F) the bias of its `expert` (N,).

        Nothing is added where `empty` (N, 1): the gradient of such a row is never written.
        """
        if on_cuda(rows):
            return rows + self.on_cuda(rows.dtype, expert, empty)
        added = self.weight.to(rows.dtype).index_select(0, expert)
        return rows + (added if empty is None else added.masked_fill(empty, 0))

    def on_cuda(self, dtype: torch.dtype, expert: Tensor, empty: Tensor | None) -> Tensor:
        """Return (N, F), what `forward` adds; the gradient is a product, whose order is fixed."""
        added = one_hot(expert, self.n_experts, dtype) @ self.weight.to(dtype)
        return added if empty is None else added.masked_fill(empty, 0)


class Experts(nn.Module):
    """E feed-forward networks in two stacked matrices; each slot passes through one of them.

    Slots are sorted by expert, so that each expert's rows lie together. One grouped matrix product
    serves all experts, without a loop and without a wait of the host for the device. A matrix is
    stored as a product reads it, (in, out), as in gpt-oss. With few rows, as in decoding, a CPU
    reads it up to 1.5 times as fast as the transposed form.
    """

    matrices = ("up", "down")

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        width: int,
        activation: Activation,
        bias: bool = False,
        weight_on: str = "output",
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.d_model = d_model
        self.width = width
        self.activation = activation
        self.bias = bias
        self.weight_on = weight_on
        up = up_width(width, activation.name)
        self.up = nn.Parameter(torch.empty(n_experts, d_model, up))
        self.down = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.up_bias = ExpertBias(n_experts, up) if bias else None
        self.down_bias = ExpertBias(n_experts, d_model) if bias else None

    def forward(self, x: Tensor, choice: RoutingDecision, kept: Tensor | None = None) -> Tensor:
        """Return (T, D): for each of the tokens `x` (T, D) the weighted sum over its experts.

        Slots that are not `kept`, in the shape of `choice.experts`, add nothing; slots of experts
        from number E on must not be kept.
        """
        if traced(x):
            return self.all_experts(x, choice, kept)
        if on_cuda(x):
            return self.on_cuda(x, choice, kept)
        # 1. Rows of slots, sorted by expert: `slot`, `token` and `expert` (N,), `weights` (N, 1).
        experts = choice.experts
        multiple = row_multiple(x, experts, self.n_experts)
        slot, ends, empty, all_read = sort_slots(experts, self.n_experts, kept, multiple)
        token = slot // experts.shape[1] if choice.tokens is None else choice.tokens[slot]
        weights = choice.weights.flatten()[slot].unsqueeze(-1).to(x.dtype)
        weights = weights if empty is None else weights.masked_fill(empty, 0)
        # 2. Gather the tokens, (N, D).
        rows = x.index_select(0, token)
        if self.weight_on == "input":
            rows = rows * weights
        # grouped_mm leaves rows behind the last end uninitialised, in its output and in the
        # gradient of its input: both sides are masked then.
        masked = None if all_read and self.weight_on == "output" else empty
        rows = rows if masked is None else rows.masked_fill(masked, 0)
        # Zero experts have numbers from E on; their rows are empty.
        expert = experts.flatten()[slot].clamp(max=self.n_experts - 1) if self.bias else None
        # 3. One grouped product for all experts up, (N, 2 F or F), one down, (N, D).
        h = grouped(rows, self.up.to(x.dtype), ends)
        h = h if self.up_bias is None else self.up_bias(h, expert, empty)
        h = self.activation(h)
        y = grouped(h, self.down.to(x.dtype), ends)
        y = y if self.down_bias is None else self.down_bias(y, expert, empty)
        y = y if masked is None else y.masked_fill(masked, 0)
        if self.weight_on == "output":
            y = y * weights
        # 4. Combine: each token gets the sum of its rows, (T, D).
        return torch.zeros_like(x).index_add(0, token, y)

    def all_experts(self, x: Tensor, choice: RoutingDecision, kept: Tensor | None) -> Tensor:
        """Return what `forward` does, from the products of all tokens with all experts.

        A tracer sees two products of fixed form, without a sort, at E / K times the operations.
        """
        # 1. The weight of each expert on each token, (T, E), 0 where it is not chosen or not kept.
        weights = choice.weights
        weights = weights if kept is None else weights.masked_fill(~kept, 0)
        factor = choice._replace(weights=weights).table()[:, : self.n_experts].to(x.dtype)
        rows = x.unsqueeze(0)
        if self.weight_on == "input":
            rows = rows * factor.T.unsqueeze(-1)  # (E, T, D)
            ones = torch.ones_like(weights)
            ones = ones if kept is None else ones.masked_fill(~kept, 0)
            factor = choice._replace(weights=ones).table()[:, : self.n_experts].to(x.dtype)
        # 2. The hidden layers of all experts, (E, T, F), each times its factor.
        h = rows @ self.up.to(x.dtype)
        if self.up_bias is not None:
            h = h + self.up_bias.weight.to(x.dtype).unsqueeze(1)
        h = self.activation(h) * factor.T.unsqueeze(-1)
        # 3. One product down adds up the experts, (T, D): the projection is linear.
        y: Tensor = h.transpose(0, 1).flatten(1) @ self.down.to(x.dtype).flatten(0, 1)
        if self.down_bias is not None:
            y = y + factor @ self.down_bias.weight.to(x.dtype)
        return y

    def on_cuda(self, x: Tensor, choice: RoutingDecision, kept: Tensor | None) -> Tensor:
        """Return what `forward` does, with sums in one order.

        A weight on the output is multiplied with the hidden layer, which is narrower for
        fine-grained experts. The projection after it is linear, up to its bias.
        """
        experts = choice.experts
        laid = sort_slots(experts, self.n_experts, kept, 1)
        at = rows_by_token(laid, len(x), experts.shape[1], choice.tokens)
        slot, ends, empty, _ = laid
        weights = choice.weights.flatten().index_select(0, slot).unsqueeze(-1).to(x.dtype)
        # Rows without an expert are not written, forward or backward. Each tensor with such a row
        # is masked, so that their content has no effect.
        weights = weights if empty is None else weights.masked_fill(empty, 0)
        rows = rows_of(x, at)
        rows = rows * weights if self.weight_on == "input" else rows
        rows = rows if empty is None else rows.masked_fill(empty, 0)
        expert = slot  # is read only with biases
        if self.bias:
            expert = experts.flatten().index_select(0, slot).clamp(max=self.n_experts - 1)
        h = grouped(rows, self.up.to(x.dtype), ends)
        h = h if self.up_bias is None else self.up_bias(h, expert, empty)
        h = self.activation(h)
        h = h * weights if self.weight_on == "output" else h
        y = grouped(h, self.down.to(x.dtype), ends)
        if self.down_bias is not None:
            added = self.down_bias.on_cuda(x.dtype, expert, empty)
            y = y + (added * weights if self.weight_on == "output" else added)
        return sums_of(y if empty is None else y.masked_fill(empty, 0), at)


class LatentExperts(nn.Module):
    """Experts at a smaller width: leave(experts(enter(x)))."""

    def __init__(self, inner: Experts, d_model: int) -> None:
        super().__init__()
        self.inner = inner
        self.d_model = d_model
        self.n_experts = inner.n_experts
        self.enter = Linear(d_model, inner.d_model)
        self.leave = Linear(inner.d_model, d_model)

    def forward(self, x: Tensor, choice: RoutingDecision, kept: Tensor | None = None) -> Tensor:
        """Return (T, D): for each of the tokens `x` (T, D) the weighted sum over its experts."""
        y: Tensor = self.leave(self.inner(self.enter(x), choice, kept))
        return y


class ZeroExperts(nn.Module):
    """Z experts without a network: identity gives x, zero gives 0, constant gives a x + b v.

    The constants have (a, b) = softmax(W x), with W and v of their own (MoE++, arXiv 2410.07348,
    eq. 5); they are worked out for all tokens, as two thin matrix products.
    """

    matrices = ("mix", "vector")

    mix: Tensor | None
    vector: Tensor | None

    def __init__(self, n_experts: int, d_model: int, kind: str) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.d_model = d_model
        self.kind = kind
        constant = kind == "constant"
        self.mix = nn.Parameter(torch.empty(2 * n_experts, d_model)) if constant else None
        self.vector = nn.Parameter(torch.empty(n_experts, d_model)) if constant else None

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the sum over the experts for tokens (T, D), with `weights` (T, Z)."""
        if self.kind == "zero":
            return torch.zeros_like(x)
        if self.mix is None or self.vector is None:
            return x * weights.sum(dim=-1, keepdim=True).to(x.dtype)
        mix = F.linear(x, self.mix.to(x.dtype)).float().unflatten(-1, (-1, 2)).softmax(dim=-1)
        part, whole = (mix * weights.unsqueeze(-1)).to(x.dtype).unbind(dim=-1)  # (T, Z) each
        y: Tensor = x * part.sum(dim=-1, keepdim=True) + whole @ self.vector.to(x.dtype)
        return y


class MoE(RoutedLayer, ReadsInputs):
    """Mixture of experts: sum over the chosen experts of weight * expert(x), plus the shared one.

    Shazeer et al., arXiv 1701.06538, eq. 1.
    """

    def __init__(
        self,
        router: Gating,
        balance: LoadBalancer,
        experts: Any,  # Experts or LatentExperts
        shared: nn.Module | None,
        zero: nn.Module | None,
        capacity_factor: float | None,
    ) -> None:
        super().__init__(router, balance, experts, capacity_factor)
        self.shared = shared
        self.zero = zero

    def run(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Map (B, S, D) to (B, S, D) with the token ids and what the router reads."""
        y: Tensor = self(x, inputs.token_ids, inputs.router_input(self.router.enter.source))
        return y

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:
        """Map (B, S, D) to (B, S, D) and note the routing.

        `token_ids` (B, S) are for selections by them. The router reads `source` (B, S, D), or x.
        """
        tokens = x.flatten(0, 1)
        read = tokens if source is None else source.flatten(0, 1)
        ids = None if token_ids is None else token_ids.flatten()
        choice: RoutingDecision = self.router(read, self.balance.bias, ids)
        kept, dropped = self.apply_capacity(choice, x.shape[0])
        y: Tensor = self.experts(tokens, choice, kept)
        if self.zero is not None:
            y = y + self.zero(tokens, choice.table()[:, self.experts.n_experts :])
        self.routing = self.balance(choice, dropped, x.shape[0])
        y = y.view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def with_network(self, choice: RoutingDecision) -> Tensor | None:
        """Return which slots count and go to an expert with a network; None if all do."""
        if self.zero is None:
            return choice.kept
        network: Tensor = choice.experts < self.experts.n_experts
        return network if choice.kept is None else choice.kept & network
