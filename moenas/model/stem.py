"""The way from token embeddings into the residual stream, and the caches of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moenas.model.layers.linear import size

# Shapes: B sequences of S tokens, D model width.


class EmbeddingStem(nn.Module):
    """The way into the stream: embedding times a multiplier, plus the position's vector, normed."""

    matrices = ("positions",)

    def __init__(
        self,
        d_model: int,
        max_positions: int | None,
        multiplier: float,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.max_positions = max_positions
        self.multiplier = multiplier
        self.norm = norm
        empty = None if max_positions is None else torch.empty(max_positions, d_model)
        self.positions = None if empty is None else nn.Parameter(empty)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Map the embeddings (B, S, D) of tokens at start, start + 1, ... to the stream."""
        x = x if self.multiplier == 1 else x * self.multiplier
        if self.positions is not None:
            end = start + size(x.shape[1])  # a tensor while the model is traced
            if end > len(self.positions):
                raise ValueError(f"{end} tokens; max_positions is {len(self.positions)}")
            x = x + self.positions[start:end].to(x.dtype)
        normed: Tensor = x if self.norm is None else self.norm(x)
        return normed


class Caches(list[Any]):
    """The cache of each layer, None where it needs none."""

    length = 0
    """Tokens seen so far."""
