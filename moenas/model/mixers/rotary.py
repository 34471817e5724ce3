"""Rotary position embeddings, one component for all mixers that rotate queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moenas.grammar.component import Component, changed, setting
from moenas.grammar.conditions import one_of
from moenas.model.mixers.rope_scaling import RopeScaling, YarnScaling

THETA = 10000.0
"""The usual base (RoFormer, arXiv 2104.09864)."""
FORMER = {
    "rope_theta": "rope.theta",
    "rope_scaling": "rope.scaling",
    "rope_fraction": "rope.partial_rotary_factor",
}
"""Name that a field of a mixer had before `rope` -> its place; see `Component.former`."""


@dataclass(frozen=True, kw_only=True)
class Rope(Component):
    """`rope`: rotary position embeddings of queries and keys (RoFormer, arXiv 2104.09864).

    Of the first W dimensions of a head, pair i is rotated by theta^(-2i / W) radians a position.
    W is `partial_rotary_factor` times the width of a head, in `latent_attention` times `rope_dim`.
    """

    theta: float | None = setting(
        "base of the rotary wavelengths; null: nothing is rotated (NoPE)",
        default=THETA,
        low=1.0,
        without_effect={"partial_rotary_factor": one_of(0.0)},
    )
    scaling: RopeScaling | None = setting(
        "how the rotary wavelengths are scaled; null: not at all",
        default=None,
        without_effect=({"partial_rotary_factor": one_of(0.0)}, {"theta": one_of(None)}),
    )
    partial_rotary_factor: float = setting(
        "fraction of the dimensions that is rotated, rounded to an even number of them (ties: a"
        " multiple of 4); 0: nothing is rotated (NoPE)",
        default=1.0,
        low=0.0,
        high=1.0,
    )

    def rotary_dim(self, width: int) -> int:
        """Return how many of the `width` dimensions are rotated: pairs, rounded half to even."""
        return 0 if self.theta is None else 2 * round(self.partial_rotary_factor * width / 2)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if isinstance(self.scaling, YarnScaling) and self.theta == 1:
            return "scaling: yarn needs pairs of different wavelengths; give a theta above 1"
        return None

    def attention_factor(self, width: int) -> float:
        """Return the factor of the rotated dimensions in heads of `width`: 1, or YaRN's."""
        scaling = self.canonical_for(width).scaling
        return 1.0 if scaling is None else scaling.attention

    def canonical_for(self, width: int) -> Rope:
        """Return the one spelling of what rotates heads of `width` dimensions in the same way.

        Where nothing is rotated it is a `partial_rotary_factor` of 0.
        """
        dims = self.rotary_dim(width)
        if self.theta is None or not dims:
            return Rope(partial_rotary_factor=0.0)
        scaling = self.scaling and self.scaling.canonical_for(dims, self.theta)
        theta = _canonical_theta(dims, self.theta, scaling)
        return changed(self, theta=theta, scaling=scaling, partial_rotary_factor=dims / width)

    def fold_into_scale(self, width: int) -> tuple[Rope, float]:
        """Return the canonical `rope`, and the factor of the scores that its scaling gave up.

        Where a whole head is rotated, the square of YaRN's factor multiplies the scores. The
        mixer's `scale` could say the same, so YaRN keeps its default factor there.
        """
        rope = self.canonical_for(width)
        scaling, theta = rope.scaling, rope.theta
        if theta is None or rope.rotary_dim(width) != width or not isinstance(scaling, YarnScaling):
            return rope, 1.0
        plain = replace(scaling, attention_factor=1.0).canonical_for(width, theta)
        if isinstance(plain, YarnScaling):
            plain = replace(plain, attention_factor=None)
        kept = 1.0 if plain is None else plain.attention
        theta = _canonical_theta(width, theta, plain)
        return replace(rope, theta=theta, scaling=plain), (scaling.attention / kept) ** 2

    def build(self, width: int) -> Rotary | None:
        """Build the rotation of heads of `width` dimensions, or None where nothing is rotated."""
        dims = self.rotary_dim(width)
        if self.theta is None or not dims:
            return None
        return Rotary(dims, self.theta, self.scaling.build() if self.scaling else None)


def _canonical_theta(width: int, theta: float, scaling: RopeScaling | None) -> float:
    """Return theta, or the default where it has no effect.

    A single pair is rotated by the position, whatever theta is. There theta counts only if YaRN
    computes the factor of the pair from it.
    """
    if width > 2 and (scaling is None or any(scaling.ratios(width, theta)[1:])):
        return theta
    if scaling is None:
        return THETA
    own, usual = (scaling.ratios(2, base)[0] for base in (theta, THETA))
    return THETA if math.isclose(own, usual, rel_tol=1e-10) else theta


class Rotary(nn.Module):
    """Rotates the first W elements of a head: pair i by position * theta^(-2i / W).

    RoFormer (arXiv 2104.09864), eq. 34, with elements i and i + W/2 as a pair (GPT-NeoX). The
    other elements of a head stay. A `scaling` divides the speed of each pair, and its factor
    `attention` multiplies the rotated elements.
    """

    def __init__(self, width: int, theta: float, scaling: nn.Module | None = None) -> None:
        super().__init__()
        self.width = width
        self.theta = theta
        self.scaling = scaling
        self.table = torch.empty(2, 0, width)  # cos, sin; by position; grows as needed

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Rotate (B, H, S, C) queries or keys at positions start, start + 1, ..."""
        end = start + x.shape[2]
        if torch.compiler.is_compiling():  # a table that grows would fix the length
            table = self.angles(end, x.device)
            return self.rotate(x, table[:, start:end].to(x.dtype))
        if end > self.table.shape[1] or self.table.device != x.device:
            with torch.inference_mode(False):
                self.table = self.angles(max(end, 2 * self.table.shape[1]), x.device)
        return self.rotate(x, self.table[:, start:end].to(x.dtype))

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """Rotate (B, H, S, C) by the cosines and sines (2, S, W) of its positions."""
        cos, sin = table.unbind()
        rotary = x if x.shape[-1] == self.width else x[..., : self.width]
        left, right = rotary.chunk(2, dim=-1)
        rotated = rotary * cos + torch.cat((-right, left), dim=-1) * sin
        if x.shape[-1] == self.width:
            return rotated
        return torch.cat((rotated, x[..., self.width :]), dim=-1)

    def angles(self, length: int, device: torch.device) -> Tensor:
        """Return (2, length, W) cosines and sines, float32, fit for training and inference."""
        scaling: Any = self.scaling
        # 1. Speed of each pair in radians a position, float64: theta^(-2i / W), (W/2,).
        steps = torch.arange(0, self.width, 2, dtype=torch.float64, device=device)
        speeds = self.theta ** (-steps / self.width)
        # 2. The scaling multiplies each speed by its ratio of at most 1.
        if scaling is not None:
            ratios = scaling.ratios(self.width, self.theta)
            speeds = speeds * torch.tensor(ratios, dtype=torch.float64, device=device)
        # 3. Angle = position * speed, (length, W): both elements of a pair have the same one.
        angles = torch.arange(length, dtype=torch.float64, device=device).outer(speeds)
        angles = torch.cat((angles, angles), dim=-1)
        # 4. Cosines and sines, times the factor of the scaling.
        table = torch.stack((angles.cos(), angles.sin()))
        return (table if scaling is None else table * scaling.attention).float()
