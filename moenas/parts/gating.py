"""The gating network: logits, scores, the chosen experts and their weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.parts.selection import ExpertSelection, Picked

# Shapes: T tokens, D model width, E experts, K experts chosen for a token, N slots (N = T K where
# every token chooses K).


class Choice(NamedTuple):
    """What was decided for T tokens; float32 where not said otherwise."""

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


class RouterLogits(nn.Module):
    """z = W x + b in float32, or W gelu(V x) + b with a `hidden` layer.

    In training x is multiplied by noise from 1 - jitter to 1 + jitter (Switch Transformer, arXiv
    2101.03961, section 2.4).
    """

    bias: Tensor | None
    inner: Tensor | None

    def __init__(
        self, d_model: int, n_experts: int, hidden: int | None, has_bias: bool, jitter: float
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.n_experts = n_experts
        self.hidden = hidden
        self.has_bias = has_bias
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(n_experts, hidden or d_model))
        self.bias = nn.Parameter(torch.zeros(n_experts)) if has_bias else None
        self.inner = nn.Parameter(torch.empty(hidden, d_model)) if hidden else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, E)."""
        x = x.float()
        if self.jitter and self.training:
            x = x * (1 + self.jitter * (2 * torch.rand_like(x) - 1))
        if self.inner is not None:
            x = F.gelu(F.linear(x, self.inner.float()))
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x, self.weight.float(), bias)


class NoLogits(nn.Module):
    """0 for every expert."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, E)."""
        return torch.zeros(len(x), self.n_experts, device=x.device)


class Noise(nn.Module):
    """softplus(W_n x): the standard deviation of the noise (arXiv 1701.06538, eq. 4)."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.n_experts = n_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, E), float32."""
        return F.softplus(F.linear(x.float(), self.weight.float()))


def chance_over_noise(clean: Tensor, spread: Tensor, noisy: Tensor, top_k: int) -> Tensor:
    """Return Phi((z_i - the K-th largest of the others with noise) / spread_i), (T, E).

    Shazeer et al., arXiv 1701.06538, eq. 8 and 9; all (T, E), with K below E. It is the chance
    to be among the K best of all experts: groups and a bias on the selection, which the paper does
    not have, are left out.
    """
    best = noisy.topk(top_k + 1, dim=-1).values
    bar = torch.where(noisy >= best[:, -2:-1], best[:, -1:], best[:, -2:-1])
    x = (clean - bar) / spread.clamp_min(1e-6)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class Gating(nn.Module):
    """Scores, selection and weights of the experts of each token, all in float32.

    s = score(z), with noise z + noise(x) * normal in training. The `selection` chooses by s + bias.
    The weight is s without the bias, divided by the sum of the chosen if `normalize`, times
    `scale` (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16). A softmax over all experts that is
    normalised over the chosen is the softmax over the chosen (Mixtral, arXiv 2401.04088).
    """

    def __init__(
        self,
        logits: nn.Module,
        noise: nn.Module | None,
        selection: ExpertSelection,
        score: nn.Module,
        normalize: bool,
        scale: float,
    ) -> None:
        super().__init__()
        self.logits = logits
        self.noise = noise
        self.selection = selection
        self.top_k = selection.top_k
        self.score = score
        self.normalize = normalize
        self.scale = scale

    def forward(
        self, x: Tensor, bias: Tensor | None = None, tokens: Tensor | None = None
    ) -> Choice:
        """Choose for (T, D), with an (E,) bias on the selection.

        `tokens` (T,) are the numbers of the tokens in the vocabulary, for selections by them.
        """
        logits: Tensor = self.logits(x)
        chance = None
        if self.noise is not None and self.training:
            clean, spread = logits, self.noise(x)
            logits = clean + torch.randn_like(clean) * spread
            if self.top_k < logits.shape[-1]:
                chance = chance_over_noise(clean, spread, logits, self.top_k)
        scores: Tensor = self.score(logits)
        ranked = scores if bias is None else scores + bias.float()
        picked: Picked = self.selection(ranked, logits, tokens)
        weights = self.weigh(scores, picked) * self.scale
        return Choice(picked.experts, weights, scores, logits, picked.tokens, picked.kept, chance)

    def weigh(self, scores: Tensor, picked: Picked) -> Tensor:
        """Return the scores (T, E) of the slots, normalised over those of each token."""
        if picked.tokens is None:
            weights = scores.gather(-1, picked.experts)
        else:
            weights = scores[picked.tokens, picked.experts.flatten()].unsqueeze(-1)
        if picked.kept is not None:
            weights = weights.masked_fill(~picked.kept, 0)
        if not self.normalize:
            return weights
        if picked.tokens is None:
            whole = weights.sum(dim=-1, keepdim=True)
        else:
            sums = scores.new_zeros(len(scores)).index_add(0, picked.tokens, weights.flatten())
            whole = sums[picked.tokens].unsqueeze(-1)
        return weights / (whole + 1e-20)

    def after_step(self) -> None:
        """Let the selection learn from the last training batch."""
        self.selection.after_step()
