"""Load balancing: by an auxiliary loss, or by a bias on the selection.

Kinds: none, aux_loss, importance_load, bias, bias_and_loss, quantile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moenas.grammar.component import Component, setting
from moenas.grammar.conditions import one_of
from moenas.model.layers.linear import on_cuda
from moenas.model.moe.gating import RoutingDecision

# Shapes: T tokens in B sequences, E experts, K slots for each token, G groups of tokens (1 or B)
# whose load is balanced separately.


Scope = Literal["batch", "sequence"]
Reduce = Literal["sum", "mean", "pooled"]

COEF = "weight of the load-balancing loss"
SCOPE = (
    "tokens whose load the loss balances: of each sequence (arXiv 2412.19437, eq. 17 to 20), or of"
    " the batch. One device holds the whole batch: it is the global batch of arXiv 2501.11873"
)
RATE = (
    "step of the selection bias after each optimizer step; in short runs the best one depends on"
    " the router (docs/learning_rate.md), and `quantile` needs none"
)


@dataclass(frozen=True, kw_only=True)
class Balance(Component):
    """How training balances the load of the experts."""

    loss: ClassVar[Literal["load", "importance"] | None] = None
    """What the loss of this kind balances; None without a loss."""
    has_bias: ClassVar[bool] = False
    """This kind adjusts a bias on the selection."""

    @property
    def coef(self) -> float:
        """The weight of the loss."""
        return 0.0

    @property
    def scope(self) -> Scope:
        """Whether the loss balances the load of a batch or of each sequence."""
        return "batch"

    @property
    def rate(self) -> float:
        """The step of the bias."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class NoBalance(Balance, kind="none"):
    """The load is not balanced."""


@dataclass(frozen=True, kw_only=True)
class AuxLossBalance(Balance, kind="aux_loss"):
    """The load-balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4 to 6)."""

    loss = "load"

    coef: float = setting(COEF, default=0.01, low=0.0)
    scope: Scope = setting(SCOPE, default="batch", without_effect={"coef": one_of(0.0)})


@dataclass(frozen=True, kw_only=True)
class ImportanceLoadBalance(Balance, kind="importance_load"):
    """The losses of importance and load (arXiv 1701.06538, eq. 6 to 11)."""

    loss = "importance"

    coef: float = setting(COEF, default=0.01, low=0.0)


@dataclass(frozen=True, kw_only=True)
class BiasBalance(Balance, kind="bias"):
    """A bias on the selection, without a loss (DeepSeek-V3; arXiv 2408.15664).

    It has an effect with the selections top_k and noisy_top_k alone.
    """

    has_bias = True

    rate: float = setting(RATE, default=0.001, low=0.0)


@dataclass(frozen=True, kw_only=True)
class BiasAndLossBalance(Balance, kind="bias_and_loss"):
    """Both `bias` and `aux_loss` (arXiv 2412.19437)."""

    loss = "load"
    has_bias = True

    coef: float = setting(COEF, default=0.01, low=0.0)
    scope: Scope = setting(SCOPE, default="batch", without_effect={"coef": one_of(0.0)})
    rate: float = setting(RATE, default=0.001, low=0.0)


@dataclass(frozen=True, kw_only=True)
class QuantileBalance(Balance, kind="quantile"):
    """Quantile Balancing (Su, kexue.fm/archives/11619; Kimi K3): a bias without a step size.

    After each optimizer step, the bias of an expert is set by a quantile of the ranks over the
    tokens of the batch. With it every expert would have the same load, at the cut-offs of the
    tokens. It has an effect with the selections top_k and noisy_top_k alone, and counts all
    experts, whatever groups these have.
    """

    has_bias = True

    @property
    def rate(self) -> float:
        """The bias moves all the way at once."""
        return 1.0


@dataclass
class Routing:
    """The routing of the last forward pass: load, losses and slots."""

    load: Tensor
    """(E,) number of slots of each expert before dropping, int64."""
    dropped: Tensor
    """Fraction of the slots that were dropped, a scalar."""
    balance_loss: Tensor
    """Differentiable scalar; 0 outside training. For an even load it is 1 (aux_loss) or 0
    (importance_load)."""
    z_loss: Tensor
    """Differentiable scalar; 0 outside training."""
    entropy: Tensor
    """Mean entropy of s_i / sum s of a token, differentiable. It is 0 outside training, and if its
    weight in the loss is 0."""
    choice: RoutingDecision
    """The slots, and the logits of the router."""
    slots: Tensor | None = None
    """(G, E) mean number of slots of a token at each expert, in training."""
    probabilities: Tensor | None = None
    """(G, E) mean of s_i / sum s over the tokens, differentiable, in training."""

    def detached(self) -> Routing:
        """Return the same values without their autograd graph."""
        values = {name: _detached(value) for name, value in vars(self).items() if name != "choice"}
        choice = self.choice._replace(
            **{name: _detached(value) for name, value in self.choice._asdict().items()}
        )
        return Routing(choice=choice, **values)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def squared_variation(x: Tensor) -> Tensor:
    """Return (standard deviation / mean)^2 of the elements, a scalar."""
    return x.var(correction=0) / (x.mean().square() + 1e-20)


def switch_loss(slots: Tensor, probabilities: Tensor) -> Tensor:
    """Return E sum_i f_i P_i for (G, E) slots and P, the mean over the groups.

    f_i is the share of the slots at expert i and P_i the mean of s_i / sum s: Switch Transformer
    (arXiv 2101.03961), eq. 4 to 6, for K slots a token; for each sequence DeepSeek-V3 (arXiv
    2412.19437), eq. 17 to 20.
    """
    shares = slots / slots.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return slots.shape[-1] * (shares * probabilities).sum(dim=-1).mean()


def mean_entropy(scores: Tensor) -> Tensor:
    """Return the mean over T tokens of -sum_i p_i log p_i, p = s / sum s, for scores (T, E).

    The loss of dynamic routing (arXiv 2403.07652) is this, of softmax scores.
    """
    p = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return -(p * (p + 1e-20).log()).sum(dim=-1).mean()


def quantile_bias(ranks: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Return the next selection bias (E,) by the ranks (T, E) of a batch and its bias.

    One step of coordinate descent on the dual of the best even assignment (Su,
    kexue.fm/archives/11619, practical form; beta there is the negative bias). The cut-off of a
    token is the (K + 1)-th largest of its ranks plus bias. The bias of an expert is the negative
    (T K / E + 1)-th largest of its ranks minus the cut-offs of the tokens.
    """
    n_tokens, n_experts = ranks.shape
    cutoffs = (ranks + bias).topk(top_k + 1, dim=-1).values[:, -1:]
    ordered = (ranks - cutoffs).sort(dim=0, descending=True).values
    return -ordered[n_tokens * top_k // n_experts]


def unbiased(choice: RoutingDecision) -> RoutingDecision:
    """Return the decision with the K best scores of each token, without bias and groups.

    The loss of DeepSeek-V3 (arXiv 2412.19437, eq. 18) counts these slots.
    """
    best = choice.scores.topk(choice.experts.shape[-1], dim=-1)
    return choice._replace(experts=best.indices, weights=best.values, tokens=None, kept=None)


class LoadBalancer(nn.Module):
    """Counts the load of the experts, and balances it by a loss or a bias on the selection.

    `loss` is "load" (Switch) or "importance" (Shazeer), with the weight `aux_coef`. `scope` is the
    part whose load is balanced: the "batch" or each "sequence". `reduce` is the reduction over
    layers (see `total_auxiliary_loss`). Without a `bias_rate` there is no bias. The bias is added
    to `bias_on`, and moves by its rate, or with `by_quantile` as `quantile_bias` says.
    """

    bias: Tensor | None

    def __init__(
        self,
        n_experts: int,
        *,
        loss: str = "load",
        aux_coef: float = 0.0,
        scope: str = "batch",
        reduce: str = "sum",
        z_coef: float = 0.0,
        entropy_coef: float = 0.0,
        bias_rate: float | None = None,
        bias_on: str = "score",
        by_quantile: bool = False,
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.loss = loss
        self.aux_coef = aux_coef
        self.scope = scope
        self.reduce = reduce
        self.z_coef = z_coef
        self.entropy_coef = entropy_coef
        self.bias_rate = bias_rate
        self.bias_on = bias_on
        self.by_quantile = by_quantile
        self.register_buffer("bias", None if bias_rate is None else torch.zeros(n_experts))
        self.last_load: Tensor | None = None
        """(E,) load of the latest training pass since the last optimizer step."""
        self.last_ranks: Tensor | None = None
        """(T, E) what the bias was added to in that pass, for quantiles; None without them."""
        self.top_k = 0
        """Experts of a token in that pass."""

    def forward(self, choice: RoutingDecision, dropped: Tensor, sequences: int = 1) -> Routing:
        """Count the load and, in training, compute the losses over B `sequences`."""
        # 1. The load of each group (G, E), and of the whole batch (E,).
        groups = sequences if self.scope == "sequence" else 1
        load = self.load(choice, groups)
        whole = load.sum(dim=0)
        nothing = choice.scores.new_zeros(())
        if not self.training:
            return Routing(whole, dropped, nothing, nothing, nothing, choice)
        self.last_load = whole
        if self.by_quantile:
            ranks = choice.logits if self.bias_on == "logits" else choice.scores
            self.last_ranks, self.top_k = ranks.detach(), choice.experts.shape[-1]
        # 2. The z-loss of ST-MoE (arXiv 2202.08906, eq. 5), and the entropy.
        z_loss = choice.logits.logsumexp(dim=-1).square().mean()
        entropy = mean_entropy(choice.scores) if self.entropy_coef else nothing
        if self.loss == "importance":
            return Routing(whole, dropped, self.importance_loss(choice), z_loss, entropy, choice)
        # 3. Slots of a token at each expert (G, E), and mean normalised scores (G, E).
        if self.bias is not None:
            load = self.load(unbiased(choice), groups)
        slots = load * groups / choice.scores.shape[0]
        scores = choice.scores / (choice.scores.sum(dim=-1, keepdim=True) + 1e-20)
        mean = scores.view(groups, -1, self.n_experts).mean(dim=1)
        even = switch_loss(slots, mean)
        return Routing(whole, dropped, even, z_loss, entropy, choice, slots, mean)

    def load(self, choice: RoutingDecision, groups: int) -> Tensor:
        """Count the slots (groups, E) of each expert in equal parts of the batch, int64."""
        if on_cuda(choice.scores):
            return self.load_on_cuda(choice, groups)
        group = choice.slot_tokens() // (choice.scores.shape[0] // groups)
        slots = choice.experts.flatten() + self.n_experts * group
        ones = torch.ones_like(slots) if choice.kept is None else choice.kept.flatten().long()
        load = torch.zeros(groups * self.n_experts, dtype=slots.dtype, device=slots.device)
        return load.scatter_add(0, slots, ones).view(groups, self.n_experts)

    def load_on_cuda(self, choice: RoutingDecision, groups: int) -> Tensor:
        """Return the load by a table of tokens and experts, which needs no atomic adds."""
        place = choice.slot_tokens() * self.n_experts + choice.experts.flatten()
        kept = torch.ones_like(place, dtype=torch.bool)
        kept = kept if choice.kept is None else choice.kept.flatten()
        table = torch.zeros_like(choice.scores, dtype=torch.bool).flatten().scatter(0, place, kept)
        return table.view(groups, -1, self.n_experts).sum(dim=1)

    def importance_loss(self, choice: RoutingDecision) -> Tensor:
        """Return CV(importance)^2 + CV(load)^2 (Shazeer et al., arXiv 1701.06538, eq. 6 to 11).

        The importance of an expert is the sum of its weights. Its load is the expected number of
        tokens under the noise. Without noise the load has no gradient, and its term is left out.
        """
        loss = squared_variation(choice.table().sum(dim=0))
        return loss if choice.chance is None else loss + squared_variation(choice.chance.sum(dim=0))

    def auxiliary_loss(self, routing: Routing) -> Tensor:
        """Return the weighted sum of the losses of one forward pass, a scalar."""
        return self.aux_coef * routing.balance_loss + self.other_losses(routing)

    def other_losses(self, routing: Routing) -> Tensor:
        """Return the weighted z-loss and entropy loss of one forward pass, a scalar."""
        return self.z_coef * routing.z_loss + self.entropy_coef * routing.entropy

    @torch.no_grad()
    def step(self) -> None:
        """Update the bias: b_i += rate * sign(mean load - load_i) (arXiv 2408.15664, algorithm 1).

        By quantiles it is replaced, see `quantile_bias`.

        The load was counted in the latest training pass since the previous step. Earlier passes
        since that step, such as other micro-batches, do not count.
        """
        ranks = self.last_ranks
        if ranks is not None and self.bias is not None and self.top_k < self.n_experts:
            self.bias.copy_(quantile_bias(ranks.float(), self.bias, self.top_k))
        elif self.last_load is not None and self.bias is not None and self.bias_rate is not None:
            load = self.last_load.float()
            self.bias += self.bias_rate * torch.sign(load.mean() - load)
        self.last_load = self.last_ranks = None


def total_auxiliary_loss(layers: Sequence[tuple[LoadBalancer, Routing]]) -> Tensor:
    """Return the weighted losses of the L layers of a model that have a router, a scalar.

    The reduction of each layer is its `reduce`. "sum" adds the losses of the layers, and "mean"
    divides the sum by L (MegaBlocks). "pooled" treats the tokens of all layers as tokens of one
    layer: E sum_i n_i P_i, with n_i the slots of a token at expert i (load_balancing_loss_func of
    transformers). An even load then gives K, not 1. Pooled layers are grouped by E, K, coefficient
    and scope, and the loss of a group is weighted by its share of the L layers.
    """
    # 1. Losses of single layers; pooled ones are collected by group.
    losses = []
    pooled: dict[tuple[int, int, float, str], list[Routing]] = {}
    for balance, routing in layers:
        parts = 1 if balance.reduce == "sum" else len(layers)
        if balance.reduce == "pooled" and routing.slots is not None:
            top_k = routing.choice.experts.shape[-1]
            kind = (balance.n_experts, top_k, balance.aux_coef, balance.scope)
            pooled.setdefault(kind, []).append(routing)
            losses.append(balance.other_losses(routing) / parts)
        else:
            losses.append(balance.auxiliary_loss(routing) / parts)
    # 2. One loss for each group, of the means (G, E) over its layers.
    for (n_experts, _, coefficient, _), routings in pooled.items():
        slots = torch.stack([x.slots for x in routings if x.slots is not None]).mean(dim=0)
        means = [x.probabilities for x in routings if x.probabilities is not None]
        even = n_experts * (slots * torch.stack(means).mean(dim=0)).sum(dim=-1).mean()
        losses.append(coefficient * even * len(routings) / len(layers))
    return torch.stack(losses).sum()
