"""Selections that look at all tokens of a batch: not causal, where their class says so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from moenas.model.moe.selection import ExpertSelection, SelectedSlots, Selection

# Shapes: T tokens, E experts, K experts chosen for a token (a mean of K, where tokens differ).


@dataclass(frozen=True, kw_only=True)
class SinkhornSelection(Selection, kind="sinkhorn"):
    """In training the best top_k of a plan with an even load, else the best top_k scores (S-BASE,
    arXiv 2202.01169, section 3.1). Training is not causal."""

    causal = False

    def build(self, top_k: int, n_experts: int) -> ExpertSelection:
        """Build the part that chooses among E experts."""
        return Sinkhorn(top_k)


class Sinkhorn(ExpertSelection):
    """In training the K best of a balanced plan, else the K best scores.

    The plan scales exp(logits) until every expert has the same share of all tokens (Clark et al.,
    arXiv 2202.01169, section 3.1: S-BASE, which softens the linear assignment of BASE, arXiv
    2103.16716). It sees all tokens of the batch, so training is not causal.
    """

    def __init__(self, top_k: int, rounds: int = 8) -> None:
        super().__init__(top_k)
        self.rounds = rounds

    def forward(
        self, ranked: Tensor, logits: Tensor, tokens: Tensor | None = None
    ) -> SelectedSlots:
        """Choose by `logits` in training and by `ranked` otherwise, both (T, E)."""
        if self.training:
            # Sinkhorn's algorithm in logarithms; `plan` (T, E) is the log of the plan.
            plan = logits.detach()
            for _ in range(self.rounds):
                # 1. Columns: the shares of all tokens at an expert add up to 1.
                plan = plan - plan.logsumexp(dim=0, keepdim=True)
                # 2. Rows: the shares of a token at all experts add up to 1.
                plan = plan - plan.logsumexp(dim=1, keepdim=True)
            # 3. The K largest entries of each row of the balanced plan are chosen.
            ranked = plan
        return SelectedSlots(ranked.topk(self.top_k, dim=-1).indices)


@dataclass(frozen=True, kw_only=True)
class BaseSelection(Selection, kind="base"):
    """In training each token gets one expert so that the load is even and the sum of logits is the
    largest, else its best one (BASE, arXiv 2103.16716, section 3). Training is not causal."""

    causal = False

    def build(self, top_k: int, n_experts: int) -> ExpertSelection:
        """Build the part that chooses among E experts."""
        return Base(top_k)

    def invalid_with(self, top_k: int) -> str | None:
        """Return why so many experts cannot be chosen, or None."""
        return None if top_k == 1 else "selection: 'base' assigns one expert; write top_k: 1"


class Base(ExpertSelection):
    """In training a balanced assignment of the most logits, at most ceil(T / E) tokens an expert.

    An auction (Bertsekas, 1992): Each token without an expert makes an offer to its best expert:
    the gain over the second best, plus a step. An expert keeps its highest offers. Its price is the
    least offer that it keeps. The step is `share` of the spread of the logits, so that the number
    of rounds is bounded for logits of any size. The sum of the chosen logits is within T steps of
    the largest possible one.
    """

    capturable = False  # in training the number of rounds depends on values

    def __init__(self, top_k: int, share: float = 0.005) -> None:
        super().__init__(top_k)
        self.share = share

    def forward(
        self, ranked: Tensor, logits: Tensor, tokens: Tensor | None = None
    ) -> SelectedSlots:
        """Choose by `logits` in training and by `ranked` otherwise, both (T, E)."""
        if not self.training:
            return SelectedSlots(ranked.argmax(dim=-1, keepdim=True))
        return SelectedSlots(self.assigned(logits.detach()).unsqueeze(-1))

    def assigned(self, value: Tensor) -> Tensor:
        """Return the expert of each token, (T,), for what each is worth to each (T, E).

        The rounds end when every token has an expert, so the host waits for the device.
        """
        n_tokens, n_experts = value.shape
        # Without values (the meta device, fake tensors) only the shape is asked for.
        if n_experts == 1 or value.is_meta or is_fake(value):
            return torch.zeros(n_tokens, dtype=torch.int64, device=value.device)
        # 1. Each expert takes at most `capacity` tokens. `offers` (T, E) holds at most one a row.
        capacity = math.ceil(n_tokens / n_experts)
        value = value.nan_to_num().double()  # a model that diverges is found by its loss
        step = (value.max() - value.min()) * self.share + 1e-9
        offers = torch.full_like(value, -math.inf)
        prices = value.new_zeros(n_experts)
        while True:
            # 2. Tokens without an expert; the auction ends when there are none.
            free = (offers == -math.inf).all(dim=-1)
            if not free.any():
                return offers.argmax(dim=-1)
            # 3. Each offers its best expert the gain over its second best expert, plus the step.
            best = (value[free] - prices).topk(2, dim=-1)
            chosen = best.indices[:, :1]
            rise = best.values[:, :1] - best.values[:, 1:] + step
            made = torch.full_like(value[free], -math.inf)
            offers[free] = made.scatter(-1, chosen, prices[chosen] + rise)
            # 4. Each expert keeps its highest offers; a full one costs the least of them.
            kept = offers.topk(capacity, dim=0)
            offers = torch.full_like(value, -math.inf).scatter(0, kept.indices, kept.values)
            full = kept.values[-1] > -math.inf
            prices = torch.where(full, kept.values[-1], prices)


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceSelection(Selection, kind="expert_choice"):
    """Each expert takes its best ceil(top_k T / E) of T tokens (arXiv 2202.09368, section 3.2). Not
    causal."""

    causal = False
    expert_choice = True

    def build(self, top_k: int, n_experts: int) -> ExpertSelection:
        """Build the part that chooses among E experts."""
        return ExpertChoice(top_k)

    def slots(self, top_k: int, n_tokens: int, n_experts: int) -> int:
        """Return how many slots a batch of tokens has."""
        return n_experts * math.ceil(top_k * n_tokens / n_experts)


class ExpertChoice(ExpertSelection):
    """Each expert takes its ceil(K T / E) best tokens of the batch (arXiv 2202.09368, section 3.2).

    A token may get any number of experts. Whether it gets one depends on the tokens after it, so
    this is not causal, in training or evaluation.
    """

    def forward(
        self, ranked: Tensor, logits: Tensor, tokens: Tensor | None = None
    ) -> SelectedSlots:
        """Choose by `ranked` (T, E)."""
        n_tokens, n_experts = ranked.shape
        capacity = math.ceil(self.top_k * n_tokens / n_experts)  # tokens of an expert
        tokens = ranked.topk(capacity, dim=0).indices.T  # (E, capacity)
        experts = torch.arange(n_experts, device=tokens.device).unsqueeze(-1).expand_as(tokens)
        return SelectedSlots(experts.reshape(-1, 1), tokens.flatten())
