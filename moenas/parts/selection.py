"""Selections: which experts a token goes to, from its scores. One class for each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Shapes: T tokens, E experts, K experts chosen for a token (a mean of K, where tokens differ).


class Picked(NamedTuple):
    """Slots: pairs of a token and an expert."""

    experts: Tensor
    """Numbers of experts, int64: (T, K), row by row those of a token; or (N, 1)."""
    tokens: Tensor | None = None
    """(N,) numbers of the tokens where `experts` is (N, 1)."""
    kept: Tensor | None = None
    """Which slots count, in the shape of `experts`; None: all."""


class ExpertSelection(nn.Module):
    """Maps `ranked` (T, E), the scores with the bias on the selection, and the logits to slots."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def after_step(self) -> None:
        """Learn from the last training batch; most have nothing to learn."""


class TopK(ExpertSelection):
    """The K best of each token, where the load may fall as it likes."""

    def forward(self, ranked: Tensor, logits: Tensor) -> Picked:
        """Choose by `ranked` (T, E): the scores, with the bias on the selection."""
        return Picked(ranked.topk(self.top_k, dim=-1).indices)


class GroupedTopK(ExpertSelection):
    """The K best of each token among the experts of its `top_groups` best groups.

    Groups are of equal size, one after another. The score of a group is the best of its experts
    (max: DeepSeek-V2, arXiv 2405.04434, section 2.2.2) or the sum of its best two (top2_sum:
    DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """

    def __init__(self, top_k: int, n_groups: int, top_groups: int, group_score: str) -> None:
        super().__init__(top_k)
        self.n_groups = n_groups
        self.top_groups = top_groups
        self.group_score = group_score

    def forward(self, ranked: Tensor, logits: Tensor) -> Picked:
        """Choose by `ranked` (T, E)."""
        members = ranked.unflatten(-1, (self.n_groups, -1))  # (T, G, E / G)
        best = 1 if self.group_score == "max" else min(2, members.shape[-1])
        groups = members.topk(best, dim=-1).values.sum(dim=-1)
        inside = groups.topk(self.top_groups, dim=-1).indices
        outside = torch.ones_like(groups, dtype=torch.bool).scatter(-1, inside, False)
        open_to = members.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)
        return Picked(open_to.topk(self.top_k, dim=-1).indices)


class Sinkhorn(ExpertSelection):
    """In training the K best of a balanced plan, else the K best scores.

    The plan scales exp(logits) until every expert has the same share of all tokens (Clark et al.,
    arXiv 2202.01169, section 3.1: S-BASE, which softens the linear assignment of BASE, arXiv
    2103.16716). It sees all tokens of the batch, so training is not causal.
    """

    def __init__(self, top_k: int, rounds: int = 8) -> None:
        super().__init__(top_k)
        self.rounds = rounds

    def forward(self, ranked: Tensor, logits: Tensor) -> Picked:
        """Choose by `logits` in training and by `ranked` otherwise, both (T, E)."""
        if self.training:
            plan = logits.detach()
            for _ in range(self.rounds):
                plan = plan - plan.logsumexp(dim=0, keepdim=True)
                plan = plan - plan.logsumexp(dim=1, keepdim=True)
            ranked = plan
        return Picked(ranked.topk(self.top_k, dim=-1).indices)


class ExpertChoice(ExpertSelection):
    """Each expert takes its ceil(K T / E) best tokens of the batch (arXiv 2202.09368, section 3.2).

    A token may get any number of experts. Whether it gets one depends on the tokens after it, so
    this is not causal, in training or evaluation.
    """

    def forward(self, ranked: Tensor, logits: Tensor) -> Picked:
        """Choose by `ranked` (T, E)."""
        n_tokens, n_experts = ranked.shape
        room = math.ceil(self.top_k * n_tokens / n_experts)
        tokens = ranked.topk(room, dim=0).indices.T  # (E, room)
        experts = torch.arange(n_experts, device=tokens.device).unsqueeze(-1).expand_as(tokens)
        return Picked(experts.reshape(-1, 1), tokens.flatten())


class Threshold(ExpertSelection):
    """Each token goes to the experts where it scores above the expert's cut-off.

    The causal form of expert choice (arXiv 2603.11535): the cut-off is a moving average of the
    score of the last token that the expert would have taken, ceil(K T / E) of T, in the training
    batches before this one. At most the 2 K best experts take a token, which bounds the rows; an
    expert without a cut-off yet takes the tokens that have it among their K best.
    """

    cutoff: Tensor

    def __init__(self, top_k: int, n_experts: int, decay: float = 0.9) -> None:
        super().__init__(top_k)
        self.n_experts = n_experts
        self.decay = decay
        self.register_buffer("cutoff", torch.zeros(n_experts))  # 0: none yet
        self.seen: Tensor | None = None

    def forward(self, ranked: Tensor, logits: Tensor) -> Picked:
        """Choose by `ranked` (T, E)."""
        n_tokens, n_experts = ranked.shape
        if self.training:
            room = math.ceil(self.top_k * n_tokens / n_experts)
            self.seen = ranked.detach().topk(room, dim=0).values[-1]
        best = ranked.topk(min(2 * self.top_k, n_experts), dim=-1)
        cutoff = self.cutoff.float()[best.indices]
        place = torch.arange(best.indices.shape[-1], device=ranked.device)
        kept = torch.where(cutoff == 0, place < self.top_k, best.values > cutoff)
        return Picked(best.indices, kept=kept)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the cut-offs towards those of the last training batch."""
        if self.seen is not None:
            moved = self.decay * self.cutoff + (1 - self.decay) * self.seen
            self.cutoff.copy_(torch.where(self.cutoff == 0, self.seen, moved))
