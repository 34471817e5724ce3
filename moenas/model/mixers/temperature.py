"""The temperature of attention scores by position."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moenas.model.layers.linear import size

ScaleGrowth = Literal["logarithm", "power"]


def build_temperature(
    floor_scale: int | None, attn_scale: float, floor_offset: int, growth: str
) -> PositionTemperature | None:
    """Build the temperature of the fields of a mixer; None where there is none."""
    if floor_scale is None:
        return None
    return PositionTemperature(floor_scale, attn_scale, floor_offset, growth)


def canonical_temperature(
    floor_scale: int | None, attn_scale: float, floor_offset: int, growth: str
) -> dict[str, Any]:
    """Return the fields of a temperature, those without effect reset."""
    if floor_scale is None or not attn_scale:
        floor_scale, attn_scale, floor_offset, growth = None, 0.1, 1, "logarithm"
    return {
        "floor_scale": floor_scale,
        "attn_scale": attn_scale,
        "floor_offset": floor_offset,
        "scale_growth": growth,
    }


class PositionTemperature(nn.Module):
    """Temperature of the scores by position (scalable softmax, arXiv 2501.19399, as in Llama 4).

    It multiplies the query at position p, from 0, by a factor of p' = p + floor_offset:
    1 + attn_scale ln(1 + floor(p' / floor_scale)) with the growth `logarithm`, and
    (1 + p' / floor_scale)^attn_scale with `power` (Beam).
    """

    def __init__(
        self,
        floor_scale: int,
        attn_scale: float,
        floor_offset: int = 1,
        growth: str = "logarithm",
    ) -> None:
        super().__init__()
        self.floor_scale = floor_scale
        self.attn_scale = attn_scale
        self.floor_offset = floor_offset
        self.growth = growth

    def forward(self, q: Tensor, start: int) -> Tensor:
        """Scale (B, H, S, C) queries at positions start, start + 1, ..."""
        first, length = start + self.floor_offset, size(q.shape[2])
        at = torch.arange(first, first + length, device=q.device)
        if self.growth == "power":
            factors = (self.attn_scale * (1 + at.float() / self.floor_scale).log()).exp()
        elif not torch.compiler.is_compiling() and first + length - 1 < self.floor_scale:
            return q  # all factors are 1
        else:
            factors = 1 + self.attn_scale * (1.0 + at // self.floor_scale).log()
        return (q * factors.unsqueeze(-1)).to(q.dtype)
