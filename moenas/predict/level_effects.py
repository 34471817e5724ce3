"""Effects of one hole on an objective, between models of equal active parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moenas.records import Evaluation

MIN_CANDIDATES = 8
"""Complete candidates that a report draws conclusions from, at least."""
CONFIDENCE = 0.95
LEVELS = 5
"""Levels of a number that has more values: ranges with about equal counts."""
SPARE = 3
"""Candidates beyond the coefficients that an interval needs at least."""


@dataclass(frozen=True)
class LevelEffect:
    """What one value of a hole does to an objective."""

    level: str
    n: int
    """Candidates with this level."""
    effect: float
    """Adjusted mean of the level minus the mean of all candidates, in the objective's unit."""
    half_width: float | None
    """Half of the 95 % confidence interval; None with too few candidates."""


@dataclass(frozen=True)
class HoleEffect(LevelEffect):
    """What one value of one hole does to an objective."""

    hole: str = field(kw_only=True)


EvaluatedDraws = Sequence[tuple[Evaluation, Mapping[str, Any]]]
"""Complete candidates, each with its drawn parameters."""


def drawn_holes(rows: EvaluatedDraws) -> list[str]:
    """Return the holes that any candidate has, in the order of the space."""
    return list(dict.fromkeys(hole for _, params in rows for hole in params))


def hole_effects(rows: EvaluatedDraws, objective: str) -> list[HoleEffect]:
    """Return the effect of each level of each hole on an objective, in order of the holes.

    Only candidates that have the hole are compared. Holes of fewer than MIN_CANDIDATES candidates,
    or of one level, are left out, and so are all where the objective has one value.
    """
    all_effects: list[HoleEffect] = []
    if len({e.values[objective] for e, _ in rows}) < 2:
        return all_effects
    for hole in drawn_holes(rows):
        there = [(e, params[hole]) for e, params in rows if hole in params]
        levels = named_levels([value for _, value in there])
        if len(there) < MIN_CANDIDATES or len(set(levels)) < 2:
            continue
        values = [e.values[objective] for e, _ in there]
        sizes = [float(e.cost.get("active_params", 1)) for e, _ in there]
        effects = sorted(level_effects(values, sizes, levels), key=_order)
        all_effects += [
            HoleEffect(x.level, x.n, x.effect, x.half_width, hole=hole) for x in effects
        ]
    return all_effects


def _order(effect: LevelEffect) -> tuple[float, str]:
    """Order levels that are numbers by their size, others by name."""
    try:
        return float(effect.level.split(" to ")[0]), ""
    except ValueError:
        return math.inf, effect.level


def level_effects(values: ArrayLike, sizes: ArrayLike, levels: Sequence[str]) -> list[LevelEffect]:
    """Return the effect of each level on values (N,), adjusted for the logarithm of sizes (N,).

    It is an analysis of covariance: value = c + a x + b x^2 + effect of the level, x the logarithm
    of the size. The effects, weighted by their counts, add up to 0. The interval belongs to a
    least-squares estimate with normal errors of one variance.
    """
    y, logs = np.asarray(values, dtype=np.float64), np.log2(np.asarray(sizes, dtype=np.float64))
    names = list(dict.fromkeys(levels))
    member = np.array([[level == name for name in names] for level in levels], dtype=np.float64)
    shares = member.mean(axis=0)
    # 1. The design: covariates that vary, and a column for each level instead of a constant.
    x = logs - logs.mean()
    covariates = [x, x**2] if len(np.unique(logs)) > 2 else [x] * bool(x.any())
    design = np.column_stack([member, *covariates])
    # 2. Least squares; a covariate that the levels determine gets the smallest coefficient.
    inverse = np.linalg.pinv(design.T @ design)
    coefficients = inverse @ design.T @ y
    spare = len(y) - np.linalg.matrix_rank(design)
    residual = float(((y - design @ coefficients) ** 2).sum())
    # 3. Contrasts: each level against the weighted mean of all.
    contrasts = np.zeros((len(names), design.shape[1]))
    contrasts[:, : len(names)] = np.eye(len(names)) - shares
    effects = contrasts @ coefficients
    widths: list[float | None] = [None] * len(names)
    if spare >= SPARE:
        from scipy.stats import t

        errors = np.sqrt(residual / spare * np.einsum("ij,jk,ik->i", contrasts, inverse, contrasts))
        widths = [float(w) for w in t.ppf((1 + CONFIDENCE) / 2, spare) * errors]
    counts = member.sum(axis=0)
    return [
        LevelEffect(name, int(count), float(effect), width)
        for name, count, effect, width in zip(names, counts, effects, widths, strict=True)
    ]


def named_levels(values: Sequence[object]) -> list[str]:
    """Return the level of each value: itself, or a range if a number has over LEVELS values.

    A range names its smallest and largest value, so that ranges have no value in common.
    """
    distinct = set(values)
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct)
    if not numeric or len(distinct) <= LEVELS:
        return [str(value) for value in values]
    numbers = np.array(values, dtype=np.float64)
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, LEVELS + 1)))
    places = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    digits = _digits(numbers)
    names = {int(place): _range(numbers[places == place], digits) for place in set(places)}
    return [names[int(place)] for place in places]


def _digits(numbers: NDArray[np.float64]) -> int:
    """Return the fewest significant digits, from 6 on, that tell different numbers apart."""
    different = np.unique(numbers)
    for digits in range(6, 17):
        if len({f"{number:.{digits}g}" for number in different}) == len(different):
            return digits
    return 17


def _range(numbers: NDArray[np.float64], digits: int) -> str:
    low, high = (f"{end:.{digits}g}" for end in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} to {high}"
