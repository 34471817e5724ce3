"""The choice of the next token from logits: the most likely one, or a draw."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token_scores(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the logits (B, V) that a draw uses: over the temperature, -inf outside of the nucleus.

    The nucleus is the smallest set of most likely tokens whose probability is at least `top_p`
    (Holtzman et al., arXiv 1904.09751, section 3.1). The temperature is over 0.
    """
    scores = logits / temperature
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[..., 0] = 0
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        scores = scores.masked_fill(outside, -torch.inf)
    return scores


class TokenSampler:
    """Takes the next token by logits: the most likely one with temperature 0, else a draw."""

    def __init__(
        self, device: torch.device, temperature: float, top_p: float, seed: int | None
    ) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature is at least 0, not {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is a probability above 0, not {top_p}")
        self.temperature = temperature
        self.top_p = top_p
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def next_tokens(self, logits: Tensor) -> Tensor:
        """Return a token for each of B logits (B, V), (B, 1), int64; see `next_token_scores`."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        chances = next_token_scores(logits, self.temperature, self.top_p).softmax(dim=-1)
        return chances.multinomial(1, generator=self.generator)
