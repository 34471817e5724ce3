"""How rotary wavelengths are scaled. Kinds: linear, yarn, llama3, proportional."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from moenas.grammar.component import Component, setting

# Of the first W dimensions of a head, pair i is rotated by theta^(-2i / W) radians a position.


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Component):
    """`rope.scaling`: how rotary wavelengths are scaled, so that a longer context fits.

    The scaling is a fixed function of the position and does not depend on the length of the text.
    Scalings by the running length (dynamic NTK, LongRoPE's switch) are no kinds: with them the
    output at a token depends on later tokens.
    """

    @property
    def attention(self) -> float:
        """The factor of the cosines and sines."""
        return 1.0

    def build(self) -> nn.Module:
        """Build what scales the wavelengths of a `Rotary`."""
        raise NotImplementedError

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return the factor of the speed of each of the width / 2 pairs; 1: no change."""
        module: Any = self.build()
        ratios: list[float] = module.ratios(width, theta)
        return ratios

    def changes(self) -> list[dict[str, Any]]:
        """Return plainer values of fields; the canonical form takes each that changes no ratio."""
        return []

    def canonical_for(self, width: int, theta: float) -> RopeScaling | None:
        """Return the one spelling of these ratios and this factor, or None if all are 1."""
        own = self.ratios(width, theta)
        if self.attention == 1 and all(_same(ratio, own[0]) for ratio in own):
            return None if _same(own[0], 1.0) else LinearScaling(factor=_rounded(1 / own[0]))
        canonical = self
        for change in self.changes():
            candidate = replace(canonical, **change)
            pairs = zip(own, candidate.ratios(width, theta), strict=True)
            if _same(candidate.attention, self.attention) and all(_same(a, b) for a, b in pairs):
                canonical = candidate
        return canonical


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-10)


def _rounded(x: float) -> float:
    """Return a number to 12 digits; the later ones depend on the order of operations."""
    return float(f"{x:.12g}")


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling, kind="linear"):
    """Position interpolation: all pairs are slower by one factor (arXiv 2306.15595)."""

    factor: float = setting("how many times longer all wavelengths become", low=1.0)

    def build(self) -> nn.Module:
        """Build the scaling."""
        return Interpolation(self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling, kind="yarn"):
    """YaRN: fast pairs stay, slow ones become slower (arXiv 2309.00071, "NTK-by-parts").

    A ramp over the pairs lies between them, as in the released code. DeepSeek's `mscale` m and
    `mscale_all_dim` a are two factors here: `attention_factor` is
    (0.1 m ln(factor) + 1) / (0.1 a ln(factor) + 1), and the mixer's `scale` is multiplied by
    (0.1 a ln(factor) + 1)^2.
    """

    factor: float = setting("how many times longer the slow wavelengths become", low=1.0)
    original_max_position_embeddings: int = setting("tokens of the original context", low=7)
    beta_fast: float = setting(
        "a pair with at least this many rotations in that context stays", default=32.0, low=1e-3
    )
    beta_slow: float = setting(
        "a pair with at most this many rotations becomes `factor` times longer",
        default=1.0,
        low=1e-3,
    )
    truncate: bool = setting(
        "the ramp begins and ends at whole pairs (gpt-oss: false)", default=True
    )
    attention_factor: float | None = setting(
        "factor of cosines and sines; the scores of the rotated dimensions get its square; null:"
        " 0.1 ln(factor) + 1",
        default=None,
        low=1e-3,
    )

    @property
    def attention(self) -> float:
        """The factor of the cosines and sines."""
        return yarn_attention(self.factor, self.attention_factor)

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        rotations = self.original_max_position_embeddings / (2 * math.pi)
        if not self.beta_slow <= self.beta_fast:
            return f"beta_slow ({self.beta_slow:g}) must not be above beta_fast"
        if self.beta_slow > rotations:
            return (
                f"beta_slow ({self.beta_slow:g}): no pair has that many rotations in"
                f" {self.original_max_position_embeddings} tokens; give at most {rotations:.3g}"
            )
        return None

    def build(self) -> nn.Module:
        """Build the scaling."""
        return Yarn(
            self.factor,
            self.original_max_position_embeddings,
            self.beta_fast,
            self.beta_slow,
            self.truncate,
            self.attention_factor,
        )

    def changes(self) -> list[dict[str, Any]]:
        """Return plainer values of fields: beta_slow is 1, and a factor of 1 has usual values."""
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
    """Llama 3.1: short wavelengths stay, long ones become longer.

    Between them the ratio is linear in the frequency (llama-models, `apply_scaling`).
    """

    factor: float = setting("how many times longer the long wavelengths become", low=1.0)
    original_max_position_embeddings: int = setting("tokens of the original context", low=1)
    low_freq_factor: float = setting(
        "a wavelength of over original_max_position_embeddings / this many tokens is long",
        default=1.0,
        low=1e-3,
    )
    high_freq_factor: float = setting(
        "a wavelength of under original_max_position_embeddings / this many tokens is short",
        default=4.0,
        low=1e-3,
    )

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.low_freq_factor > self.high_freq_factor:
            return f"low_freq_factor ({self.low_freq_factor:g}) must not be above high_freq_factor"
        return None

    def build(self) -> nn.Module:
        """Build the scaling."""
        return Llama3(
            self.factor,
            self.original_max_position_embeddings,
            self.low_freq_factor,
            self.high_freq_factor,
        )

    def changes(self) -> list[dict[str, Any]]:
        """Return plainer values of fields: low_freq_factor is 1."""
        tokens = self.original_max_position_embeddings / self.low_freq_factor
        units = {
            "original_max_position_embeddings": int(tokens),
            "low_freq_factor": 1.0,
            "high_freq_factor": _rounded(self.high_freq_factor / self.low_freq_factor),
        }
        return [units] if tokens.is_integer() else []


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling(RopeScaling, kind="proportional"):
    """Only the fastest pairs of the whole width are rotated (Gemma 4).

    Unlike this, `rope.partial_rotary_factor` spreads all wavelengths over a part of a head.
    """

    fraction: float = setting(
        "fraction of the pairs that is rotated, rounded down to whole pairs, at least one",
        low=0.0,
        high=1.0,
    )
    factor: float = setting("how many times longer their wavelengths become", default=1.0, low=1.0)

    def build(self) -> nn.Module:
        """Build the scaling."""
        return Proportional(self.fraction, self.factor)

    def canonical_for(self, width: int, theta: float) -> RopeScaling | None:
        """Return the one spelling of these ratios, or None if all are 1."""
        rotated = sum(ratio > 0 for ratio in self.ratios(width, theta))
        whole = replace(self, fraction=rotated / (width // 2))
        return super(ProportionalScaling, whole).canonical_for(width, theta)


class Interpolation(nn.Module):
    """All wavelengths `factor` times longer."""

    attention = 1.0

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return the factor of the speed of each of the width / 2 pairs."""
        return [1 / self.factor] * (width // 2)


class Proportional(nn.Module):
    """A fraction of the pairs is rotated, `factor` times slower; the slow ones are not."""

    attention = 1.0

    def __init__(self, fraction: float, factor: float) -> None:
        super().__init__()
        self.fraction = fraction
        self.factor = factor

    def ratios(self, width: int, theta: float) -> list[float]:
        """Return the factor of the speed of each of the width / 2 pairs."""
        rotated = max(1, math.floor(self.fraction * (width // 2) + 1e-9))
        return [1 / self.factor] * rotated + [0.0] * (width // 2 - rotated)


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
        """Return the factor of the speed of each of the width / 2 pairs."""
        # 1. The ramp begins at the pair of beta_fast rotations and ends at the pair of beta_slow
        # rotations.
        low, high = self.pair(self.beta_fast, width, theta), self.pair(self.beta_slow, width, theta)
        # 2. The released code rounds both ends to whole pairs and cuts them to 0..width - 1.
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        high = min(high, width - 1)
        low = min(max(low, 0), high)
        # 3. 1 - gamma of the paper: 0 before the ramp, 1 after it, linear in the pair between.
        span = high - low or 0.001
        slow = [min(max((i - low) / span, 0.0), 1.0) for i in range(width // 2)]
        # 4. h(theta_i) / theta_i = gamma + (1 - gamma) / factor (definition 2, "NTK-by-parts").
        return [1 - share + share / self.factor for share in slow]

    def pair(self, rotations: float, width: int, theta: float) -> float:
        """Return the pair, as a fraction, that has so many rotations in the original context.

        Solves tokens theta^(-2i / width) = 2 pi rotations for i.
        """
        return width * math.log(self.tokens / (rotations * 2 * math.pi)) / (2 * math.log(theta))


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
        """Return the factor of the speed of each of the width / 2 pairs."""
        low, high = self.low_freq_factor, self.high_freq_factor
        ratios = []
        for i in range(width // 2):
            # 1. Rotations of pair i in the original context.
            rotations = self.tokens * theta ** (-2 * i / width) / (2 * math.pi)
            # 2. `smooth`: 0 for a long wavelength, 1 for a short one, linear in the frequency.
            smooth = float(rotations >= high) if high == low else (rotations - low) / (high - low)
            smooth = min(max(smooth, 0.0), 1.0)
            # 3. Interpolate between the scaled speed and the original one.
            ratios.append(smooth + (1 - smooth) / self.factor)
        return ratios
