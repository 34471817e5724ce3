"""How the load of the experts is kept even: by a loss, or by a bias on the selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moenas.parts.gating import Choice

# Shapes: T tokens in B sequences, E experts.


@dataclass
class Routing:
    """What the last forward pass sent where."""

    load: Tensor
    """(E,) slots that chose each expert, before any were dropped, int64."""
    dropped: Tensor
    """Share of the slots that found no room, a scalar."""
    balance_loss: Tensor
    """Differentiable scalar; 0 outside training. When the load is even it is 1 (aux_loss) or 0
    (importance_load)."""
    z_loss: Tensor
    """Differentiable scalar; 0 outside training."""
    choice: Choice
    """What was decided: the slots, and the logits of the router."""


def squared_variation(x: Tensor) -> Tensor:
    """Return (standard deviation / mean)^2 of the elements, a scalar."""
    return x.var(correction=0) / (x.mean().square() + 1e-20)


class Balance(nn.Module):
    """Keeps the load of the experts even: by a loss, or by a bias on the selection.

    `loss` is "load" (Switch) or "importance" (Shazeer), `scope` is "batch" or "sequence".
    """

    bias: Tensor | None

    def __init__(
        self,
        n_experts: int,
        aux_coef: float,
        z_coef: float,
        bias_rate: float | None,
        loss: str = "load",
        scope: str = "batch",
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.aux_coef = aux_coef
        self.z_coef = z_coef
        self.bias_rate = bias_rate
        self.loss = loss
        self.scope = scope
        self.register_buffer("bias", None if bias_rate is None else torch.zeros(n_experts))

    def forward(self, choice: Choice, dropped: Tensor, sequences: int = 1) -> Routing:
        """Count the load and, in training, work out the losses over B `sequences`."""
        groups = sequences if self.scope == "sequence" else 1
        load = self.load(choice, groups)
        if not self.training:
            nothing = choice.scores.new_zeros(())
            return Routing(load.sum(dim=0), dropped, nothing, nothing, choice)
        balance_loss = (
            self.even_importance(choice)
            if self.loss == "importance"
            else self.even_load(choice, load)
        )
        # ST-MoE (arXiv 2202.08906), eq. 5.
        z_loss = choice.logits.logsumexp(dim=-1).square().mean()
        return Routing(load.sum(dim=0), dropped, balance_loss, z_loss, choice)

    def load(self, choice: Choice, groups: int) -> Tensor:
        """Count the slots (groups, E) of each expert in equal parts of the batch, int64."""
        group = choice.slot_tokens() // (len(choice.scores) // groups)
        slots = choice.experts.flatten() + self.n_experts * group
        ones = torch.ones_like(slots) if choice.kept is None else choice.kept.flatten().long()
        load = torch.zeros(groups * self.n_experts, dtype=slots.dtype, device=slots.device)
        return load.scatter_add(0, slots, ones).view(groups, self.n_experts)

    def even_load(self, choice: Choice, load: Tensor) -> Tensor:
        """Return E sum_i f_i P_i, the mean over the groups of the `load`.

        f_i is the share of the slots at expert i and P_i the mean of s_i / sum s: Switch
        Transformer (arXiv 2101.03961), eq. 4 to 6, for K slots a token; for each sequence
        DeepSeek-V3 (arXiv 2412.19437), eq. 17 to 20.
        """
        share = load / load.sum(dim=-1, keepdim=True).clamp_min(1)
        scores = choice.scores / (choice.scores.sum(dim=-1, keepdim=True) + 1e-20)
        mean = scores.view(len(load), -1, self.n_experts).mean(dim=1)
        return self.n_experts * (share * mean).sum(dim=-1).mean()

    def even_importance(self, choice: Choice) -> Tensor:
        """Return CV(importance)^2 + CV(load)^2 (Shazeer et al., arXiv 1701.06538, eq. 6 to 11).

        The importance of an expert is the sum of its weights, its load the expected number of
        tokens over the noise; without noise the load has no gradient and is left out.
        """
        loss = squared_variation(choice.table().sum(dim=0))
        return loss if choice.chance is None else loss + squared_variation(choice.chance.sum(dim=0))

    def auxiliary_loss(self, routing: Routing) -> Tensor:
        """Return the weighted sum of the losses of one forward pass, a scalar."""
        return self.aux_coef * routing.balance_loss + self.z_coef * routing.z_loss

    @torch.no_grad()
    def step(self, routing: Routing) -> None:
        """Move the bias: b_i += rate * sign(mean load - load_i) (arXiv 2408.15664, algorithm 1)."""
        if self.bias is not None and self.bias_rate is not None:
            load = routing.load.float()
            self.bias += self.bias_rate * torch.sign(load.mean() - load)
