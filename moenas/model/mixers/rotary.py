"""Rotary positions, and how they are stretched. Kinds: linear, yarn, llama3, proportional."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moenas.grammar.component import Component, setting

# Of the first W elements of a head, pair i turns by theta^(-2i / W) radians a position.

THETA = 10000.0
"""The usual base (RoFormer, arXiv 2104.09864)."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Component):
    """`rope_scaling`: how rotary positions are stretched, so that a longer context fits.

    A fixed function of the position, whatever the length of the text is. Scalings that follow the
    running length (dynamic NTK, LongRoPE's switch) are left out: with them the output at a token
    depends on later tokens.
    """

    @property
    def attention(self) -> float:
        """What the cosines and sines are multiplied with."""
        return 1.0

    def build(self) -> nn.Module:
        """Build what stretches the wavelengths of a `Rotary`."""
        raise NotImplementedError

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return by how much each of the width / 2 pairs turns slower, 1 for as before."""
        module: Any = self.build()
        found: list[float] = module.ratios(width, theta)
        return found

    def changes(self) -> list[dict[str, Any]]:
        """Return plainer values of fields, to be taken one after another where nothing changes."""
        return []

    def canonical_for(self, width: int, theta: float) -> RopeScaling | None:
        """Return the one spelling of what turns the pairs like this, or None if none is needed."""
        own = self.ratios(width, theta)
        if self.attention == 1 and all(_same(ratio, own[0]) for ratio in own):
            return None if _same(own[0], 1.0) else LinearScaling(factor=_rounded(1 / own[0]))
        found = self
        for change in self.changes():
            other = replace(found, **change)
            pairs = zip(own, other.ratios(width, theta), strict=True)
            if _same(other.attention, self.attention) and all(_same(a, b) for a, b in pairs):
                found = other
        return found


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-10)


def _rounded(x: float) -> float:
    """Return a number without the last digits, which the order of operations decides."""
    return float(f"{x:.12g}")


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling, kind="linear"):
    """Every pair turns slower by one factor (position interpolation, arXiv 2306.15595)."""

    factor: float = setting("how many times longer all wavelengths become", low=1.0)

    def build(self) -> nn.Module:
        """Build the stretch."""
        return Interpolation(self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling, kind="yarn"):
    """YaRN: fast pairs stay, slow ones turn slower (arXiv 2309.00071, "NTK-by-parts").

    Between them a ramp over the pairs, as its released code has it. What DeepSeek's configurations
    call `mscale` m and `mscale_all_dim` a is an `attention_factor` of
    (0.1 m ln(factor) + 1) / (0.1 a ln(factor) + 1), and (0.1 a ln(factor) + 1)^2 more in the
    mixer's `scale`.
    """

    factor: float = setting("how many times longer the slow wavelengths become", low=1.0)
    original_max_position_embeddings: int = setting("tokens of the context before", low=7)
    beta_fast: float = setting(
        "a pair that turns so many times in that context stays", default=32.0, low=1e-3
    )
    beta_slow: float = setting(
        "a pair that turns so many times only becomes `factor` times longer",
        default=1.0,
        low=1e-3,
    )
    truncate: bool = setting(
        "the ramp begins and ends at whole pairs (gpt-oss: false)", default=True
    )
    attention_factor: float | None = setting(
        "factor of cosines and sines: its square is that of the scores of what turns; null:"
        " 0.1 ln(factor) + 1",
        default=None,
        low=1e-3,
    )

    @property
    def attention(self) -> float:
        """What the cosines and sines are multiplied with."""
        return yarn_attention(self.factor, self.attention_factor)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        turns = self.original_max_position_embeddings / (2 * math.pi)
        if not self.beta_slow <= self.beta_fast:
            return f"beta_slow ({self.beta_slow:g}) must not be above beta_fast"
        if self.beta_slow > turns:
            return (
                f"beta_slow ({self.beta_slow:g}): no pair turns that often in"
                f" {self.original_max_position_embeddings} tokens; at most {turns:.3g}"
            )
        return None

    def build(self) -> nn.Module:
        """Build the stretch."""
        return Yarn(
            self.factor,
            self.original_max_position_embeddings,
            self.beta_fast,
            self.beta_slow,
            self.truncate,
            self.attention_factor,
        )

    def changes(self) -> list[dict[str, Any]]:
        """Return plainer values of fields: none of a stretch, turns in units of beta_slow."""
        tokens = self.original_max_position_embeddings / self.beta_slow
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
        still = {"factor": 1.0, "original_max_position_embeddings": 4096, **usual}
        units = {
            "original_max_position_embeddings": int(tokens),
            "beta_fast": _rounded(self.beta_fast / self.beta_slow),
            "beta_slow": 1.0,
        }
        return [
            {"attention_factor": None},
            *([units] if tokens.is_integer() else []),
            {"truncate": True},
            {"beta_fast": max(32.0, self.beta_slow)},
            {**still, "attention_factor": _rounded(self.attention)},
        ]


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling, kind="llama3"):
    """Llama 3.1: short wavelengths stay, long ones become longer, between them by frequency.

    As Meta's released code has it (llama-models, `apply_scaling`).
    """

    factor: float = setting("how many times longer the long wavelengths become", low=1.0)
    original_max_position_embeddings: int = setting("tokens of the context before", low=1)
    low_freq_factor: float = setting(
        "a wavelength of over original_max_position_embeddings / this many tokens is long",
        default=1.0,
        low=1e-3,
    )
    high_freq_factor: float = setting(
        "one of under original_max_position_embeddings / this many tokens is short",
        default=4.0,
        low=1e-3,
    )

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.low_freq_factor > self.high_freq_factor:
            return f"low_freq_factor ({self.low_freq_factor:g}) must not be above high_freq_factor"
        return None

    def build(self) -> nn.Module:
        """Build the stretch."""
        return Llama3(
            self.factor,
            self.original_max_position_embeddings,
            self.low_freq_factor,
            self.high_freq_factor,
        )

    def changes(self) -> list[dict[str, Any]]:
        """Return plainer values of fields: frequencies in units of low_freq_factor."""
        tokens = self.original_max_position_embeddings / self.low_freq_factor
        units = {
            "original_max_position_embeddings": int(tokens),
            "low_freq_factor": 1.0,
            "high_freq_factor": _rounded(self.high_freq_factor / self.low_freq_factor),
        }
        return [units] if tokens.is_integer() else []


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling(RopeScaling, kind="proportional"):
    """Only the fastest pairs of the whole width turn, the others stay (Gemma 4).

    Unlike `rope_fraction`, which spreads the wavelengths over a part of a head.
    """

    fraction: float = setting(
        "share of the pairs that turn, rounded down to whole pairs, at least one",
        low=0.0,
        high=1.0,
    )
    factor: float = setting("how many times longer their wavelengths become", default=1.0, low=1.0)

    def build(self) -> nn.Module:
        """Build the stretch."""
        return Proportional(self.fraction, self.factor)

    def canonical_for(self, width: int, theta: float) -> RopeScaling | None:
        """Return the one spelling of what turns the pairs like this, or None if none is needed."""
        turning = sum(ratio > 0 for ratio in self.ratios(width, theta))
        found = replace(self, fraction=turning / (width // 2))
        return super(ProportionalScaling, found).canonical_for(width, theta)


def canonical_theta(width: int, theta: float, scaling: RopeScaling | None) -> float:
    """Return theta, or the default where it has no effect: a single pair turns by the position.

    Unless it tells YaRN by how much to stretch that pair.
    """
    if width > 2 and (scaling is None or any(scaling.ratios(width, theta)[1:])):
        return theta
    told = scaling is not None and not _same(
        scaling.ratios(2, theta)[0], scaling.ratios(2, THETA)[0]
    )
    return theta if told else THETA


def fold_into_scale(
    scaling: RopeScaling, width: int, theta: float
) -> tuple[RopeScaling | None, float]:
    """Return the one spelling where whole heads turn, and a factor of the scores in exchange.

    There YaRN's factor is one of the scores, and each of the two could say the other.
    """
    if not isinstance(scaling, YarnScaling):
        return scaling, 1.0
    found = replace(scaling, attention_factor=1.0).canonical_for(width, theta)
    if isinstance(found, YarnScaling):
        found = replace(found, attention_factor=None)
    now = 1.0 if found is None else found.attention
    return found, (scaling.attention / now) ** 2


class Interpolation(nn.Module):
    """All wavelengths `factor` times longer."""

    attention = 1.0

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return by how much each of the width / 2 pairs turns slower."""
        return [1 / self.factor] * (width // 2)


class Proportional(nn.Module):
    """A share of the pairs turns, `factor` times slower; the slow ones stay."""

    attention = 1.0

    def __init__(self, fraction: float, factor: float) -> None:
        super().__init__()
        self.fraction = fraction
        self.factor = factor

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return by how much each of the width / 2 pairs turns slower."""
        turning = max(1, math.floor(self.fraction * (width // 2) + 1e-9))
        return [1 / self.factor] * turning + [0.0] * (width // 2 - turning)


def yarn_attention(factor: float, attention_factor: float | None) -> float:
    """Return the factor of cosines and sines: the given one, or YaRN's."""
    return 0.1 * math.log(factor) + 1 if attention_factor is None else attention_factor


class Yarn(nn.Module):
    """YaRN's wavelengths (arXiv 2309.00071), with the ramp of its released code."""

    def __init__(
        self,
        factor: float,
        tokens: int,
        beta_fast: float,
        beta_slow: float,
        truncate: bool,
        attention_factor: float | None,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.tokens = tokens
        self.beta_fast = beta_fast
        self.beta_slow = beta_slow
        self.truncate = truncate
        self.attention_factor = attention_factor
        self.attention = yarn_attention(factor, attention_factor)

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return by how much each of the width / 2 pairs turns slower."""
        low, high = (self.pair(turns, width, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        high = min(high, width - 1)
        low = min(max(low, 0), high)
        span = high - low or 0.001
        slow = [min(max((i - low) / span, 0.0), 1.0) for i in range(width // 2)]
        return [1 - share + share / self.factor for share in slow]

    def pair(self, turns: float, width: int, theta: float) -> float:
        """Return which pair, in fractions of one, turns so often in the context before."""
        return width * math.log(self.tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))


class Llama3(nn.Module):
    """Llama 3.1's wavelengths."""

    attention = 1.0

    def __init__(
        self, factor: float, tokens: int, low_freq_factor: float, high_freq_factor: float
    ) -> None:
        super().__init__()
        self.factor = factor
        self.tokens = tokens
        self.low_freq_factor = low_freq_factor
        self.high_freq_factor = high_freq_factor

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return by how much each of the width / 2 pairs turns slower."""
        low, high = self.low_freq_factor, self.high_freq_factor
        found = []
        for i in range(width // 2):
            turns = self.tokens * theta ** (-2 * i / width) / (2 * math.pi)
            fast = float(turns >= high) if high == low else (turns - low) / (high - low)
            fast = min(max(fast, 0.0), 1.0)
            found.append(fast + (1 - fast) / self.factor)
        return found


class Rotary(nn.Module):
    """Rotary positions: of the first W elements, pair i turns by position * theta^(-2i / W).

    RoFormer (arXiv 2104.09864), eq. 34, with elements i and i + W/2 as a pair (GPT-NeoX). The
    other elements of a head stay. With a `scaling` the pairs turn slower, and its factor
    `attention` multiplies what turns.
    """

    def __init__(self, width: int, theta: float, scaling: nn.Module | None = None) -> None:
        super().__init__()
        self.width = width
        self.theta = theta
        self.scaling = scaling
        self.table = torch.empty(2, 0, width)  # cos, sin; by position; grows as needed

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Turn (B, H, S, C) queries or keys that stand at positions start, start + 1, ..."""
        end = start + x.shape[2]
        if torch.compiler.is_compiling():  # a table that grows would fix the length
            table = self.angles(end, x.device)
            return self.turn(x, table[:, start:end].to(x.dtype))
        if end > self.table.shape[1] or self.table.device != x.device:
            with torch.inference_mode(False):
                self.table = self.angles(max(end, 2 * self.table.shape[1]), x.device)
        return self.turn(x, self.table[:, start:end].to(x.dtype))

    def turn(self, x: Tensor, table: Tensor) -> Tensor:
        """Turn (B, H, S, C) by the cosines and sines (2, S, W) of its positions."""
        cos, sin = table.unbind()
        turning = x if x.shape[-1] == self.width else x[..., : self.width]
        left, right = turning.chunk(2, dim=-1)
        turned = turning * cos + torch.cat((-right, left), dim=-1) * sin
        if x.shape[-1] == self.width:
            return turned
        return torch.cat((turned, x[..., self.width :]), dim=-1)

    def angles(self, length: int, device: torch.device) -> Tensor:
        """Return (2, length, W) cosines and sines, float32, fit for training and inference."""
        scaling: Any = self.scaling
        steps = torch.arange(0, self.width, 2, dtype=torch.float64, device=device)
        speeds = self.theta ** (-steps / self.width)
        if scaling is not None:
            ratios = scaling.ratios(self.width, self.theta)
            speeds = speeds * torch.tensor(ratios, dtype=torch.float64, device=device)
        turns = torch.arange(length, dtype=torch.float64, device=device).outer(speeds)
        turns = torch.cat((turns, turns), dim=-1)
        table = torch.stack((turns.cos(), turns.sin()))
        return (table if scaling is None else table * scaling.attention).float()
