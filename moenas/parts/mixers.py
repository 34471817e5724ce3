"""Mixers: how a token reads the tokens before it; what their kinds share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from moenas.component import Part

# Shapes: B sequences, S tokens of a sequence, D model width, H heads, K key-value heads, C width
# of a head, L tokens so far, those of the cache included.


@dataclass(frozen=True, kw_only=True)
class Mixer(Part):
    """The family of mixers: modules (B, S, D) -> (B, S, D) that never look ahead.

    A module with a method `stand(layer, n_layers)` is told its place in the model, from 0.
    """

    def canonical_at(self, d_model: int) -> Self:
        """Return the canonical form with all that follows from the width written out."""
        return self.canonical()


class KVCache:
    """Keys and values of the tokens seen so far, with room for `context` of them."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch = batch
        self.context = context
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, S, C) keys and values and return those of all tokens so far.

        The room is taken at the first call, in the dtype and on the device of `keys`. Keys and
        values may differ in width.
        """
        if self.keys is None or self.values is None:
            shape = (self.batch, keys.shape[1], self.context)
            self.keys = keys.new_empty(*shape, keys.shape[3])
            self.values = values.new_empty(*shape, values.shape[3])
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class StateCache:
    """What a mixer of linear time keeps: it does not grow with the tokens."""

    def __init__(self) -> None:
        self.length = 0
        self.before: Tensor | None = None
        """The last tokens that went into the convolution, (B, kernel - 1, width)."""
        self.state: Tensor | None = None
        """The recurrent state, float32."""


class Rotary(nn.Module):
    """Rotary positions: of the first W elements, pair i turns by position * theta^(-2i / W).

    RoFormer (arXiv 2104.09864), eq. 34, with elements i and i + W/2 as a pair (GPT-NeoX). The
    other elements of a head stay.
    """

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        self.width = width
        self.theta = theta
        self.table = torch.empty(2, 0, width)  # cos, sin; by position; grows as needed

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Turn (B, H, S, C) queries or keys that stand at positions start, start + 1, ..."""
        end = start + x.shape[2]
        if end > self.table.shape[1] or self.table.device != x.device:
            with torch.inference_mode(False):
                self.table = self.angles(max(end, 2 * self.table.shape[1]), x.device)
        cos, sin = self.table[:, start:end].to(x.dtype).unbind()
        turning = x if x.shape[-1] == self.width else x[..., : self.width]
        left, right = turning.chunk(2, dim=-1)
        turned = turning * cos + torch.cat((-right, left), dim=-1) * sin
        if x.shape[-1] == self.width:
            return turned
        return torch.cat((turned, x[..., self.width :]), dim=-1)

    def angles(self, length: int, device: torch.device) -> Tensor:
        """Return (2, length, W) cosines and sines, float32, fit for training and inference."""
        steps = torch.arange(0, self.width, 2, dtype=torch.float64, device=device)
        speeds = self.theta ** (-steps / self.width)
        turns = torch.arange(length, dtype=torch.float64, device=device).outer(speeds)
        turns = torch.cat((turns, turns), dim=-1)
        return torch.stack((turns.cos(), turns.sin())).float()
