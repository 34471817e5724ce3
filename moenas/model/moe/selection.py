"""Selections of experts for tokens, by their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from moenas.grammar.component import Component, changed, setting
from moenas.grammar.conditions import one_of

# Shapes: T tokens, E experts, K experts for each token (the mean if the number varies).


FORMER_ATTRIBUTES = {
    "alone": "per_token",
    "learned": "trainable_load",
    "by_expert": "expert_choice",
    "variable": "variable_k",
}
"""Former name of a class attribute of a selection -> its present name."""


@dataclass(frozen=True, kw_only=True)
class Selection(Component):
    """Selects the experts of each token by their scores."""

    causal: ClassVar[bool] = True
    """The experts of a token depend on no other token of its batch, in training too."""
    per_token: ClassVar[bool] = False
    """It ranks the experts of each token separately, so a bias on the scores has an effect."""
    trainable_load: ClassVar[bool] = True
    """The load depends on trained weights, so a load-balancing loss has an effect."""
    expert_choice: ClassVar[bool] = False
    """Experts choose tokens. The load is even, and top_k is the mean over the tokens."""
    variable_k: ClassVar[bool] = False
    """top_k is the target of the mean, and the cost counts top_k experts for each token."""
    noisy: ClassVar[bool] = False
    """In training, learned noise is added to the logits."""

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        """Register a kind; user files may set class attributes by their former names."""
        super().__init_subclass__(kind, **kwargs)
        for former, present in FORMER_ATTRIBUTES.items():
            if former in vars(cls):
                setattr(cls, present, vars(cls)[former])

    def build(self, top_k: int, n_experts: int) -> ExpertSelection:
        """Build the module that selects among E experts."""
        raise NotImplementedError

    def slots(self, top_k: int, n_tokens: int, n_experts: int) -> int:
        """Return the number of slots of a batch of tokens, masked slots included."""
        return top_k * n_tokens

    def invalid_with(self, top_k: int) -> str | None:
        """Return why top_k experts cannot be selected, or None."""
        return None

    def invalid_among(self, top_k: int, n_experts: int) -> str | None:
        """Return why top_k of E experts cannot be selected, or None."""
        return None

    def canonical_for(self, top_k: int) -> Self:
        """Return the selection with the fields that have no effect at their defaults."""
        return self

    def canonical_among(self, top_k: int, n_experts: int) -> Self:
        """Return the same among E experts, for a canonical selection."""
        return self


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """The fields of the selections that rank the experts of each token separately."""

    n_groups: int = setting("equal groups of experts", default=1, low=1)
    top_groups: int = setting(
        "number of groups that a token selects experts from; above n_groups: all",
        default=1,
        low=1,
        without_effect={"n_groups": one_of(1)},
    )
    group_score: Literal["max", "top2_sum"] = setting(
        "ranks groups by their best expert (DeepSeek-V2) or best two (DeepSeek-V3)",
        default="max",
        without_effect={"n_groups": one_of(1)},
    )
    even_groups: bool = setting(
        "select the same number of experts from each of the top_groups (MoGE, arXiv 2505.21411,"
        " with top_groups equal to n_groups)",
        default=False,
        without_effect={"n_groups": one_of(1)},
    )
    top_p: float | None = setting(
        "keep the best of the top_k experts until their scores reach this share of all scores"
        " (arXiv 2403.07652, where top_k is n_experts); the cost counts top_k, the maximum;"
        " null: all",
        default=None,
        low=1e-3,
        high=1.0,
    )
    sparsemixer_eps: float | None = setting(
        "weights of SparseMixer (Phi-3.5-MoE, its router_jitter_noise; GRIN, arXiv"
        " 2409.12136): the softmax over the logits of experts not taken before it that are at"
        " most 2 eps max(|z|, its own) below its own. The gradient of that weight trains it, not"
        " the paper's estimator. null: by the scores",
        default=None,
        low=1e-4,
    )

    @property
    def open_groups(self) -> int:
        """Number of groups that a token selects from."""
        return min(self.top_groups, self.n_groups)

    def cut(self, top_k: int) -> float | None:
        """Return `top_p` if a token can keep fewer than top_k experts, else None."""
        return self.top_p if top_k > 1 and (self.top_p or 1) < 1 else None

    def invalid_among(self, top_k: int, n_experts: int) -> str | None:
        """Return why top_k of E experts cannot be selected, or None."""
        top_p = self.cut(top_k)
        if top_p is not None and top_p * n_experts <= 1:
            return (
                f"top_p ({top_p:g}) is reached by one of {n_experts} experts; write top_k: 1,"
                f" or a top_p above {1 / n_experts:.3g}"
            )
        if self.n_groups == 1:
            return None
        if n_experts % self.n_groups:
            return f"n_groups ({self.n_groups}) must divide the number of experts ({n_experts})"
        available = n_experts // self.n_groups * self.open_groups
        if top_k > available:
            return f"top_k ({top_k}) must be at most the {available} experts of top_groups"
        if self.even_groups and top_k % self.open_groups:
            return (
                f"with even_groups: true top_k ({top_k}) must be a multiple of the"
                f" {self.open_groups} groups that a token chooses from"
            )
        return None

    def canonical_for(self, top_k: int) -> Self:
        """Reset groups and a top_p that have no effect."""
        has_groups = self.n_groups > 1
        even = has_groups and self.even_groups and self.open_groups > 1
        limited = has_groups and self.n_groups > self.top_groups
        # top_k or more open groups, ranked by their best experts, contain the top_k experts.
        free = self.group_score == "max" and self.top_groups >= top_k
        grouped = even or (limited and not free)
        return self._changed(
            n_groups=self.n_groups if grouped else 1,
            top_groups=self.open_groups if grouped else 1,
            group_score=self.group_score if grouped and limited else "max",
            even_groups=even,
            top_p=self.cut(top_k),
        )

    def canonical_among(self, top_k: int, n_experts: int) -> Self:
        """Return the same among E experts, for a canonical selection."""
        # Groups have no effect if all experts are selected, or if a group is one expert.
        if top_k == n_experts or self.n_groups == n_experts:
            return self._changed(n_groups=1).canonical_for(top_k)
        # All experts of the open groups are selected.
        if self.even_groups and top_k * self.n_groups == n_experts * self.top_groups:
            return self._changed(even_groups=False).canonical_for(top_k)
        return self

    def _changed(self, **fields: Any) -> Self:
        return cast(Self, changed(cast(Any, self), **fields))

    def build(self, top_k: int, n_experts: int) -> ExpertSelection:
        """Build the module that selects among E experts."""
        even = self.even_groups and self.open_groups > 1
        if self.n_groups > self.open_groups or even:
            return GroupedTopK(top_k, self.n_groups, self.open_groups, self.group_score, even)
        return TopK(top_k)


class SelectedSlots(NamedTuple):
    """Slots: pairs of a token and an expert."""

    experts: Tensor
    """Indices of experts, int64: (T, K) with a row for each token, or (N, 1)."""
    tokens: Tensor | None = None
    """(N,) positions of the tokens in the batch, if `experts` is (N, 1)."""
    kept: Tensor | None = None
    """Mask of the slots that count, in the shape of `experts`; None: all."""


class ExpertSelection(nn.Module):
    """Maps `ranked` (T, E), the scores with the bias on the selection, and the logits to slots.

    `tokens` (T,) are the token ids, if the model passes them.
    """

    capturable: bool = True
    """A pass reads no value on the host, so a CUDA graph can capture it (`Model.capturable`)."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def after_step(self) -> None:
        """Update the state of the selection after a training batch, if it has one."""


@dataclass(frozen=True, kw_only=True)
class TopKSelection(TokenChoice, Selection, kind="top_k"):
    """The top_k experts of each token with the highest scores."""

    per_token = True


@dataclass(frozen=True, kw_only=True)
class NoisyTopKSelection(TokenChoice, Selection, kind="noisy_top_k"):
    """The top_k experts of each token. In training, learned noise is added to the logits (arXiv
    1701.06538, eq. 4)."""

    per_token = True
    noisy = True


class TopK(ExpertSelection):
    """The K best experts of each token, without a bound on the load."""

    def forward(
        self, ranked: Tensor, logits: Tensor, tokens: Tensor | None = None
    ) -> SelectedSlots:
        """Select by `ranked` (T, E), the scores plus the bias on the selection."""
        return SelectedSlots(ranked.topk(self.top_k, dim=-1).indices)


class GroupedTopK(ExpertSelection):
    """The K best of each token among the experts of its `top_groups` best groups.

    Groups are contiguous and of equal size. The score of a group is the maximum of its experts
    (max: DeepSeek-V2, arXiv 2405.04434, section 2.2.2) or the sum of its best two (top2_sum:
    DeepSeek-V3, arXiv 2412.19437, section 2.1.2). With `even`, K / top_groups experts of each of
    these groups are selected (MoGE, arXiv 2505.21411, eq. 6, with all groups open).
    """

    def __init__(
        self, top_k: int, n_groups: int, top_groups: int, group_score: str, even: bool = False
    ) -> None:
        super().__init__(top_k)
        self.n_groups = n_groups
        self.top_groups = top_groups
        self.group_score = group_score
        self.even = even

    def forward(
        self, ranked: Tensor, logits: Tensor, tokens: Tensor | None = None
    ) -> SelectedSlots:
        """Select by `ranked` (T, E)."""
        # 1. Rank the groups (T, G) by their best experts.
        members = ranked.unflatten(-1, (self.n_groups, -1))  # (T, G, E / G)
        best = 1 if self.group_score == "max" else min(2, members.shape[-1])
        groups = members.topk(best, dim=-1).values.sum(dim=-1)
        inside = groups.topk(self.top_groups, dim=-1).indices
        outside = torch.ones_like(groups, dtype=torch.bool).scatter(-1, inside, 0)
        # 2. With `even`, close all but the best K / top_groups experts of each group.
        if self.even:
            first = members.topk(self.top_k // self.top_groups, dim=-1).indices
            rest = torch.ones_like(members, dtype=torch.bool).scatter(-1, first, 0)
            members = members.masked_fill(rest, -math.inf)
        # 3. Close the other groups, and take the K best experts that are left.
        open_to = members.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)
        return SelectedSlots(open_to.topk(self.top_k, dim=-1).indices)


@dataclass(frozen=True, kw_only=True)
class HashSelection(Selection, kind="hash"):
    """A fixed pseudo-random set of top_k experts for each token of the vocabulary (Hash layers,
    arXiv 2106.04426, section 3.2; the first layers of DeepSeek-V4)."""

    trainable_load = False

    def build(self, top_k: int, n_experts: int) -> ExpertSelection:
        """Build the module that selects among E experts."""
        return Hash(top_k, n_experts)


class Hash(ExpertSelection):
    """The K largest of E hashes, each of the token id and the expert.

    This is rendezvous hashing. The K experts are distinct, all sets have the same probability, and
    no table of the vocabulary is stored.
    """

    def __init__(self, top_k: int, n_experts: int) -> None:
        super().__init__(top_k)
        self.n_experts = n_experts

    def forward(
        self, ranked: Tensor, logits: Tensor, tokens: Tensor | None = None
    ) -> SelectedSlots:
        """Select by the token ids (T,)."""
        if tokens is None:
            raise ValueError("selection: hash needs the token ids")
        experts = torch.arange(self.n_experts, device=tokens.device)
        mixed = tokens.unsqueeze(-1) * 73856093 + (experts + 1) * 19349663
        for _ in range(2):  # an integer finaliser of shifts and odd factors, modulo 2^32
            mixed = ((mixed ^ (mixed >> 16)) * 73244475) & 0xFFFFFFFF
        return SelectedSlots((mixed ^ (mixed >> 16)).topk(self.top_k, dim=-1).indices)


@dataclass(frozen=True, kw_only=True)
class ThresholdSelection(Selection, kind="threshold"):
    """Each expert whose score for a token is above its moving threshold: the causal form of expert
    choice (arXiv 2603.11535)."""

    variable_k = True

    def build(self, top_k: int, n_experts: int) -> ExpertSelection:
        """Build the module that selects among E experts."""
        return Threshold(top_k, n_experts)

    def slots(self, top_k: int, n_tokens: int, n_experts: int) -> int:
        """Return the number of slots of a batch of tokens, masked slots included."""
        return min(2 * top_k, n_experts) * n_tokens


class Threshold(ExpertSelection):
    """Selects the experts whose score for a token is above the threshold of the expert.

    This is the causal form of expert choice (arXiv 2603.11535). The threshold is a moving average
    over earlier training batches of the score of rank ceil(K T / E) among the T tokens. Of several
    batches between two steps, the last one counts. At most the 2 K best experts are selected, which
    bounds the rows. Before the first step, the K best are selected.
    """

    cutoff: Tensor
    known: Tensor

    def __init__(self, top_k: int, n_experts: int, decay: float = 0.9) -> None:
        super().__init__(top_k)
        self.n_experts = n_experts
        self.decay = decay
        self.register_buffer("cutoff", torch.zeros(n_experts))
        self.register_buffer("known", torch.zeros(()))  # 1 once there are thresholds
        self.batch_cutoff: Tensor | None = None

    def forward(
        self, ranked: Tensor, logits: Tensor, tokens: Tensor | None = None
    ) -> SelectedSlots:
        """Select by `ranked` (T, E)."""
        n_tokens, n_experts = ranked.shape
        if self.training:
            capacity = math.ceil(self.top_k * n_tokens / n_experts)
            self.batch_cutoff = ranked.detach().topk(capacity, dim=0).values[-1]
        best = ranked.topk(min(2 * self.top_k, n_experts), dim=-1)
        cutoff = self.cutoff.float()[best.indices]
        place = torch.arange(best.indices.shape[-1], device=ranked.device)
        known = self.known > 0
        kept = (known & (best.values > cutoff)) | (~known & (place < self.top_k))
        return SelectedSlots(best.indices, kept=kept)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the thresholds towards the cutoffs of the last training batch."""
        if self.batch_cutoff is not None:
            moved = self.decay * self.cutoff + (1 - self.decay) * self.batch_cutoff
            self.cutoff.copy_(torch.where(self.known > 0, moved, self.batch_cutoff))
            self.known.fill_(1)
        self.batch_cutoff = None
