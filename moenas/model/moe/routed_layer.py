"""The base of mixtures of networks and of attention heads: routing, capacity, balancing."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from moenas.model.moe.balance import LoadBalancer, Routing, total_auxiliary_loss
from moenas.model.moe.dispatch import within_capacity
from moenas.model.moe.gating import Gating, RoutingDecision

# Shapes: B sequences of S tokens, T = B S tokens, E experts, K experts chosen for a token.


class RoutedLayer(nn.Module):
    """A layer whose router sends each token to a few experts.

    In training each expert may have a capacity for a sequence (Switch Transformer, arXiv
    2101.03961, eq. 3): a slot without room adds nothing, and the residual stream carries its token
    on. Evaluation drops nothing.
    """

    routing: Routing
    """Of the last forward pass."""

    def __init__(
        self,
        router: Gating,
        balance: LoadBalancer,
        experts: Any,  # Experts, LatentExperts or HeadExperts
        capacity_factor: float | None,
    ) -> None:
        super().__init__()
        self.router = router
        self.balance = balance
        self.experts = experts
        self.capacity_factor = capacity_factor

    def with_network(self, choice: RoutingDecision) -> Tensor | None:
        """Return which slots count and go to an expert with a network; None if all do.

        In the shape of `choice.experts`, (T, K).
        """
        return choice.kept

    def apply_capacity(
        self, choice: RoutingDecision, sequences: int
    ) -> tuple[Tensor | None, Tensor]:
        """Return which slots pass through a network, None if all do, and the share dropped."""
        wanted, none_dropped = self.with_network(choice), choice.weights.new_zeros(())
        n_choices = choice.scores.shape[-1]
        if self.capacity_factor is None or not self.training or choice.tokens is not None:
            return wanted, none_dropped
        # 1. Slots that need no network get a number of their own, behind the last expert.
        experts = choice.experts
        experts = experts if wanted is None else experts.masked_fill(~wanted, n_choices)
        experts = experts.unflatten(0, (sequences, -1))  # (B, S, K)
        # 2. The capacity: slots of an expert in one sequence. `round` takes rounding errors out.
        slots = self.capacity_factor * self.router.top_k * experts.shape[1]
        fits = within_capacity(experts, n_choices + 1, math.ceil(round(slots / n_choices, 6)))
        # 3. The slots that are kept, and the fraction of the slots that are dropped.
        kept = fits.flatten(0, 1) if wanted is None else fits.flatten(0, 1) & wanted
        share = 1 - kept.float().mean()
        if wanted is not None:
            share = 1 - kept.sum() / wanted.sum().clamp_min(1)
        return kept, share

    def auxiliary_loss(self) -> Tensor:
        """Return the weighted losses of the last forward pass, a scalar."""
        return total_auxiliary_loss([(self.balance, self.routing)])

    def after_step(self) -> None:
        """Move selection bias and cut-offs by the last training pass, and let its graph go."""
        self.balance.step()
        self.router.after_step()
        if "routing" in self.__dict__:
            self.routing = self.routing.detached()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: of the last pass the values, as its graph cannot be copied."""
        state = dict(self.__dict__)
        if "routing" in state:
            state["routing"] = self.routing.detached()
        return state
