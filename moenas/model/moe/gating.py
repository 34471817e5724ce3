"""The gating network: scores, the chosen experts and their weights."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.model.layers.linear import on_cuda
from moenas.model.moe.logits import RouterInput
from moenas.model.moe.selection import ExpertSelection, SelectedSlots

BiasOn = Literal["score", "logits"]

# Shapes: T tokens, D model width, E experts, K experts chosen for a token, N slots (N = T K where
# every token chooses K).


class RoutingDecision(NamedTuple):
    """The routing of T tokens; float32 where not said otherwise."""

    experts: Tensor
    """(T, K) numbers of the chosen experts, int64; or (N, 1), then `tokens` says whose."""
    weights: Tensor
    """Factors on their outputs (or inputs), in the shape of `experts`."""
    scores: Tensor
    """(T, E) scores of all experts."""
    logits: Tensor
    """(T, E)"""
    tokens: Tensor | None = None
    """(N,) number of the token of each slot; None: row by row."""
    kept: Tensor | None = None
    """Which slots count, in the shape of `experts`; None: all."""
    chance: Tensor | None = None
    """(T, E) probability over the noise that the expert is chosen, if there is noise."""

    def slot_tokens(self) -> Tensor:
        """Return the number of the token of each slot, (N,)."""
        if self.tokens is not None:
            return self.tokens
        return (
            torch.arange(self.experts.numel(), device=self.experts.device)
            // (self.experts.shape[-1])
        )

    def table(self) -> Tensor:
        """Return the weights as (T, E), 0 where an expert is not chosen."""
        n_tokens, n_experts = self.scores.shape
        place = self.slot_tokens() * n_experts + self.experts.flatten()
        table = self.weights.new_zeros(n_tokens * n_experts)
        return table.index_add(0, place, self.weights.flatten()).view(n_tokens, n_experts)


def at_slots(table: Tensor, slots: SelectedSlots) -> Tensor:
    """Return the numbers of a table (T, E) at the slots, in their shape."""
    if slots.tokens is None:
        return table.gather(-1, slots.experts)
    if on_cuda(table):
        place = slots.tokens * table.shape[-1] + slots.experts.flatten()
        return table.flatten().index_select(0, place).unsqueeze(-1)
    return table[slots.tokens, slots.experts.flatten()].unsqueeze(-1)


def chance_over_noise(clean: Tensor, spread: Tensor, noisy: Tensor, top_k: int) -> Tensor:
    """Return Phi((z_i - the K-th largest of the others with noise) / spread_i), (T, E).

    Shazeer et al., arXiv 1701.06538, eq. 8 and 9; all (T, E), with K below E. It is the chance to
    be among the K best of all experts. Groups and a bias on the selection are left out, because the
    paper does not have them.
    """
    best = noisy.topk(top_k + 1, dim=-1).values
    bar = torch.where(noisy >= best[:, -2:-1], best[:, -1:], best[:, -2:-1])
    x = (clean - bar) / spread.clamp_min(1e-6)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class Weights(nn.Module):
    """The weights of the slots, and which of them count.

    A weight is the score of the expert, divided by the sum of the chosen if `normalize`, times
    `scale`. With `n_scales` each expert has a trained factor, too (Gemma 4). With a `top_p` only
    the first experts of a token count that reach this share of all its scores together (arXiv
    2403.07652). With an `eps`, SparseMixer gives the weights in place of the scores.
    """

    matrices: tuple[str, ...] = ()

    expert_scale: Tensor | None

    def __init__(
        self,
        *,
        normalize: bool,
        scale: float,
        n_scales: int | None = None,
        top_p: float | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.scale = scale
        self.n_scales = n_scales
        self.top_p = top_p
        self.eps = eps
        self.expert_scale = None if n_scales is None else nn.Parameter(torch.ones(n_scales))

    def forward(
        self, scores: Tensor, logits: Tensor, slots: SelectedSlots
    ) -> tuple[Tensor, Tensor | None]:
        """Return weights and what is kept, for scores and logits (T, E)."""
        kept = slots.kept
        if self.top_p is not None:
            enough = self.top_p_mask(scores, slots.experts)
            kept = enough if kept is None else kept & enough
        if self.eps is not None:
            weights = self.sparsemixer_weights(logits, slots.experts)
        else:
            weights = at_slots(scores, slots)
        weights = weights if kept is None else weights.masked_fill(~kept, 0)
        if self.normalize:
            weights = weights / (self.sums(weights, slots, scores) + 1e-20)
        if self.expert_scale is not None:
            weights = weights * self.factors(self.expert_scale.float(), slots, scores)
        return weights * self.scale, kept

    def sums(self, weights: Tensor, slots: SelectedSlots, scores: Tensor) -> Tensor:
        """Return the sum of the weights of each slot's token, (T, 1) or (N, 1)."""
        if slots.tokens is None:
            return weights.sum(dim=-1, keepdim=True)
        if on_cuda(scores):  # through a table, whose sums have one order
            place = slots.tokens * scores.shape[-1] + slots.experts.flatten()
            table = torch.zeros_like(scores).flatten().index_add(0, place, weights.flatten())
            whole = table.view_as(scores).sum(dim=-1, keepdim=True)
            return at_slots(whole.expand_as(scores), slots)
        sums = weights.new_zeros(scores.shape[0]).index_add(0, slots.tokens, weights.flatten())
        return sums[slots.tokens].unsqueeze(-1)

    def factors(self, scale: Tensor, slots: SelectedSlots, scores: Tensor) -> Tensor:
        """Return the factor of the expert of each slot, in the shape of the slots."""
        if on_cuda(scores):  # the gradient goes to a table first, where no two slots meet
            return at_slots(scale.expand_as(scores), slots)
        return scale.index_select(0, slots.experts.flatten()).view_as(slots.experts)

    def top_p_mask(self, scores: Tensor, experts: Tensor) -> Tensor:
        """Return (T, K): whether the experts before it have less than `top_p` of all scores."""
        shares = scores.gather(-1, experts) / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        return (shares.cumsum(dim=-1) - shares) < (self.top_p or 1)

    def sparsemixer_weights(self, logits: Tensor, experts: Tensor) -> Tensor:
        """Return SparseMixer's weights (T, K) (GRIN, arXiv 2409.12136; released Phi-3.5-MoE).

        Experts are taken one after another. The weight of an expert with the logit z is its softmax
        over a set. The set has the experts not taken before it whose logit z_j is at most 2 eps
        max(|z_j|, z) below z.
        """
        # 1. Logits z of the chosen experts (T, K, 1) against the logits of all experts (T, 1, E).
        best, each = logits.gather(-1, experts).unsqueeze(-1), logits.unsqueeze(1)
        # 2. Leave out experts that are too far below: z - z_j > 2 eps max(|z_j|, z), (T, K, E).
        far = best - each > 2 * (self.eps or 0) * torch.maximum(each.abs(), best)
        # 3. Leave out experts taken before: the running sum of the one-hot rows exceeds its row.
        own = F.one_hot(experts, logits.shape[-1])
        # 4. The softmax over the rest, at the chosen expert, (T, K).
        near = each.masked_fill(far, -math.inf).masked_fill(own.cumsum(dim=1) > own, -math.inf)
        return near.softmax(dim=-1).gather(-1, experts.unsqueeze(-1)).squeeze(-1)


class Gating(nn.Module):
    """Scores, selection and weights of the experts of each token, all in float32.

    s = score(z), with noise z + noise(x) * normal in training. The `selection` chooses by s + bias,
    or by z + bias with `bias_on` "logits" (Kolibri 1). The `weights` are made of s without the bias
    (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16). A softmax over all experts that is normalised
    over the chosen is the softmax over the chosen (Mixtral, arXiv 2401.04088).
    """

    def __init__(
        self,
        enter: RouterInput,
        logits: nn.Module,
        noise: nn.Module | None,
        selection: ExpertSelection,
        score: nn.Module,
        *,
        weights: Weights,
        bias_on: str = "score",
    ) -> None:
        super().__init__()
        self.enter = enter
        self.logits = logits
        self.noise = noise
        self.selection = selection
        self.top_k = selection.top_k
        self.score = score
        self.weights = weights
        self.bias_on = bias_on

    def forward(
        self, x: Tensor, bias: Tensor | None = None, tokens: Tensor | None = None
    ) -> RoutingDecision:
        """Choose for (T, D), with an (E,) bias on the selection.

        `tokens` (T,) are the token ids, for selections that use them.
        """
        # 1. Logits z (T, E); in training with noise (Shazeer et al., eq. 4).
        x = self.enter(x)
        logits: Tensor = self.logits(x)
        chance = None
        if self.noise is not None and self.training:
            clean, spread = logits, self.noise(x)
            logits = clean + torch.randn_like(clean) * spread
            if self.top_k < logits.shape[-1]:
                chance = chance_over_noise(clean, spread, logits, self.top_k)
        # 2. Scores s (T, E); the bias acts on the selection alone (DeepSeek-V3, eq. 16).
        scores: Tensor = self.score(logits)
        ranked = scores
        if bias is not None:
            ranked = (logits if self.bias_on == "logits" else scores) + bias.float()
        slots: SelectedSlots = self.selection(ranked, logits, tokens)
        # 3. The weights of the selected slots, from scores without the bias.
        weights, kept = self.weights(scores, logits, slots)
        return RoutingDecision(slots.experts, weights, scores, logits, slots.tokens, kept, chance)

    def after_step(self) -> None:
        """Let the selection learn from the last training batch."""
        self.selection.after_step()
