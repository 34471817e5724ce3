"""Non-dominated points: the mask, the hypervolume, the knee, the history and two fronts compared.

The hypervolume is exact up to EXACT_OBJECTIVES objectives, and approximate beyond.

Every function takes values as rows of points with one column per objective, and `directions`,
one "minimize" or "maximize" per column. Values that are not finite are refused: a comparison
with NaN is neither true nor false, and an infinite value has no volume.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moenas.errors import InputError
from moenas.records import FrontPoint

MARGIN = 0.1
"""The reference point lies this share of the range beyond the worst value."""

EXACT_OBJECTIVES = 5
"""The hypervolume of more objectives is approximate.

The exact one takes 0.09 s for 3,000 points of 5 objectives. It takes 2.3 s for 1,000 points of 6
objectives, and 3.5 s for 300 points of 7 (moocore, one core). Its time grows without a bound.
"""
RAYS = 8192
"""Directions that an approximate hypervolume is measured in."""
CHUNK = 128
"""Points that are measured at a time: 8 MB of numbers."""
VALUE_LIMIT = 1e150
"""Magnitude from which on a value of an objective cannot be used."""
LARGEST = sys.float_info.max / 4
"""No width and no volume is larger: a number that is not finite can neither be stored nor sent."""

Losses = NDArray[np.float64]
"""Points of shape (points, objectives), every column to be minimised, all finite."""


def _signs(directions: Sequence[str]) -> Losses:
    """Return 1.0 for each "minimize" and -1.0 for each "maximize"."""
    for direction in directions:
        if direction not in ("minimize", "maximize"):
            raise InputError(f"direction: '{direction}' is neither 'minimize' nor 'maximize'")
    if not directions:
        raise InputError("directions: empty; a front has at least one objective")
    return np.array([1.0 if direction == "minimize" else -1.0 for direction in directions])


def _losses(values: ArrayLike, directions: Sequence[str]) -> Losses:
    """Return `values` as points to be minimised."""
    signs = _signs(directions)
    points = np.asarray(values, dtype=np.float64)
    if points.size == 0:
        return np.empty((0, len(signs)))
    if points.ndim != 2 or points.shape[1] != len(signs):
        raise InputError(
            f"front: values of shape {points.shape} for {len(signs)} objectives;"
            f" one row per point and one column per objective"
        )
    if not np.isfinite(points).all():
        row, column = np.argwhere(~np.isfinite(points))[0]
        raise InputError(
            f"front: row {row}, objective {column} is {points[row, column]}; only finite values"
        )
    return points * signs


def dominates(a: Sequence[float], b: Sequence[float], directions: Sequence[str]) -> bool:
    """Say whether `a` is nowhere worse than `b` and somewhere better."""
    first, second = _losses([a, b], directions)
    return bool((first <= second).all() and (first < second).any())


def non_dominated(values: ArrayLike, directions: Sequence[str]) -> NDArray[np.bool_]:
    """Return a mask of the points that no other point dominates.

    Equal points do not dominate one another, so both stay; Optuna's `best_trials` has the same
    rule.
    """
    return _minimal(_losses(values, directions))


def _minimal(losses: Losses) -> NDArray[np.bool_]:
    """Return the mask of `non_dominated` for losses.

    In lexicographic order a point is dominated only by points before it. So the first remaining
    point is on the front, and strikes out the points that it dominates.
    """
    order = np.lexsort(losses.T[::-1])
    rest, keep = losses[order], np.zeros(len(losses), dtype=np.bool_)
    while len(rest):
        best = rest[0]
        equal = (rest == best).all(axis=1)
        keep[order[equal]] = True
        alive = (rest < best).any(axis=1)
        rest, order = rest[alive], order[alive]
    return keep


def is_exact(n_objectives: int) -> bool:
    """Whether the hypervolume of so many objectives is exact; an approximate one is said as such.

    The root of the mean square of its error was 1 % with 200 points of 6 objectives and 4 % with 20
    points of 10.
    """
    return n_objectives <= EXACT_OBJECTIVES


def unusable(values: Mapping[str, float]) -> str | None:
    """Say why the values of the objectives of a candidate cannot be used, or return None."""
    for name, value in values.items():
        if not math.isfinite(value):
            return f"'{name}' is {value}; a value must be finite"
        if abs(value) > VALUE_LIMIT:
            return (
                f"'{name}' is {value:.3g}; a value must lie between {-VALUE_LIMIT:.0e} and"
                f" {VALUE_LIMIT:.0e}; choose a larger unit"
            )
    return None


def reference_point(values: ArrayLike, directions: Sequence[str]) -> list[float]:
    """Return the common reference point of a study: the worst of all points, and a bit beyond.

    Each coordinate is the worst value of its objective over all points given (not over the front
    alone) plus 10 % of the range. So the extreme members of the front have a volume, too. Where the
    range is zero, 10 % of the value's size is added; where that is zero, 1.
    """
    losses = _losses(values, directions)
    if not len(losses):
        raise InputError("front: no points; a reference point needs at least one")
    worst, best = losses.max(axis=0), losses.min(axis=0)
    with np.errstate(over="ignore"):
        corner = worst + _padding(worst, worst - best)
    corner = np.clip(corner, -sys.float_info.max, sys.float_info.max)
    return [float(value) for value in _signs(directions) * corner]


def _padding(worst: Losses, width: Losses) -> Losses:
    """Return how far the reference point lies beyond the worst loss of each objective."""
    size = np.where(width > 0, width, np.abs(worst))
    return np.where(size > 0, MARGIN * size, 1.0)


def hypervolume(values: ArrayLike, reference: Sequence[float], directions: Sequence[str]) -> float:
    """Return the volume that the points dominate, bounded by the reference point.

    It is exact or approximate as `is_exact` says. The unit is the product of the objectives' units
    (Zitzler and Thiele 1998). A point that is not better than the reference in every objective
    dominates no volume. A volume that no float can hold is given as the largest one.
    """
    return _volume(_losses(values, directions), _losses([reference], directions)[0])


def _volume(losses: Losses, corner: Losses) -> float:
    """Return the hypervolume of losses below `corner`."""
    inside = losses[(losses < corner).all(axis=1)]
    if not len(inside):
        return 0.0
    if not is_exact(inside.shape[1]):
        widths = _widths(inside.min(axis=0), corner)
        return _times(float(_reach(inside, corner, widths)[-1].mean()), widths)
    if inside.shape[1] == 1:
        return float(_widths(inside.min(axis=0), corner)[0])
    from moocore import hypervolume as exact  # 50 ms that few commands need

    widths = _widths(inside.min(axis=0), corner)
    if _is_plain(widths):
        return float(exact(inside, ref=corner))
    # In units of the widths no product leaves the range of a float.
    scaled = 1.0 - _widths(inside, corner) / widths
    return _times(float(exact(scaled, ref=np.ones(len(corner)))), widths)


def _widths(losses: Losses, corner: Losses) -> Losses:
    """Return how far losses lie below `corner`, as finite numbers."""
    with np.errstate(over="ignore"):
        return np.minimum(corner - losses, LARGEST)


def _is_plain(widths: Losses) -> bool:
    """Whether products of widths stay well within the range of a float."""
    return bool((widths < 1e60).all() and (widths > 1e-60).all())


def _times(share: float, widths: Losses) -> float:
    """Return a share of a box."""
    if share <= 0:
        return 0.0
    logarithm = math.log(share) + float(np.log(widths).sum())
    return LARGEST if logarithm >= math.log(LARGEST) else math.exp(logarithm)


@cache
def _rays(n_objectives: int) -> Losses:
    """Return directions spread over the positive orthant, the same at every call."""
    drawn = np.abs(np.random.default_rng(0).standard_normal((RAYS, n_objectives)))
    directions: Losses = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return np.maximum(directions, 1e-12)


def _reach(losses: Losses, corner: Losses, widths: Losses, after_each: bool = False) -> Losses:
    """Return the share of the box that points dominate, by directions.

    From the corner a ray passes through dominated space up to the farthest reach of any point. The
    mean of this length to the power of the number of objectives is the volume, up to a factor (Deng
    and Zhang 2019, "Approximating hypervolume and hypervolume contributions using polar
    coordinate"). The factor is such that the box itself has its own volume. With `after_each` there
    is the share after each point in turn; it never falls.
    """
    rays, n = _rays(losses.shape[1]), losses.shape[1]
    factor = 1.0 / float(((1.0 / rays.max(axis=1)) ** n).mean())
    scaled = _widths(losses, corner) / widths
    best, rows = np.zeros(RAYS), []
    for start in range(0, len(scaled), CHUNK):
        chunk = scaled[start : start + CHUNK]
        lengths = chunk[:, :1] / rays[:, 0]
        for i in range(1, n):
            np.minimum(lengths, chunk[:, i : i + 1] / rays[:, i], out=lengths)
        if after_each:
            lengths[0] = np.maximum(lengths[0], best)
            lengths = np.maximum.accumulate(lengths, axis=0)
            best = lengths[-1]
            rows.append((lengths**n).mean(axis=1))
        else:
            best = np.maximum(best, lengths.max(axis=0))
    if after_each:
        return np.asarray(factor * np.concatenate(rows))
    return np.asarray(factor * best**n)[None]


def _exclusive(point: Losses, others: Losses, corner: Losses) -> float:
    """Return the volume that `point` alone dominates: its box less what others cover of it."""
    if (point >= corner).any():
        return 0.0
    widths = _widths(point, corner)
    box = _times(1.0, widths) if not _is_plain(widths) else float(np.prod(widths))
    return max(0.0, box - _volume(np.maximum(others, point), corner))


def hypervolume_improvement(
    values: ArrayLike,
    point: Sequence[float],
    reference: Sequence[float],
    directions: Sequence[str],
) -> float:
    """Return by how much `point` would raise the hypervolume of `values`; never below 0."""
    corner, newcomer = _losses([reference, point], directions)
    losses = _losses(values, directions)
    if is_exact(len(corner)):
        return _exclusive(newcomer, losses, corner)
    before, after = _approximate(np.vstack([losses, newcomer]), corner)[-2:]
    return after - before


def _approximate(losses: Losses, corner: Losses) -> list[float]:
    """Return 0 and the approximate hypervolume after each point in turn; it never falls."""
    inside = np.asarray((losses < corner).all(axis=1))
    volumes, latest = [0.0], 0.0
    if not inside.any():
        return [0.0] * (len(losses) + 1)
    widths = _widths(losses[inside].min(axis=0), corner)
    shares = iter(_reach(losses[inside], corner, widths, after_each=True))
    for is_inside in inside:
        if is_inside:
            latest = _times(float(next(shares)), widths)
        volumes.append(latest)
    return volumes


def knee(values: ArrayLike, directions: Sequence[str]) -> int:
    """Return the row of the front's knee: the point farthest below the plane of its extremes.

    The front is scaled to [0, 1] in each objective between its best and its worst member. The plane
    goes through the unit points, so the knee has the smallest sum of scaled losses. For two
    objectives this is the knee of Das (1999), farthest from the chord between the extremes. Of
    equally good rows the first is taken.
    """
    losses = _losses(values, directions)
    if not len(losses):
        raise InputError("front: no points; a knee needs at least one")
    rows = np.flatnonzero(_minimal(losses))
    front = losses[rows]
    best = front.min(axis=0)
    width = front.max(axis=0) - best
    scaled = (front - best) / np.where(width > 0, width, 1.0)
    return int(rows[int(scaled.sum(axis=1).argmin())])


def history(
    values: ArrayLike,
    directions: Sequence[str],
    reference: Sequence[float],
    trials: Sequence[int],
) -> list[FrontPoint]:
    """Return the front after each point in turn; `trials` names the rows.

    All hypervolumes are measured from the one reference point given, so they compare and never
    fall.
    """
    losses, corner = _losses(values, directions), _losses([reference], directions)[0]
    front, members, volume = losses[:0], list[int](), 0.0
    points, approximate = [], None if is_exact(len(corner)) else _approximate(losses, corner)
    for i, (trial, point) in enumerate(zip(trials, losses, strict=True), start=1):
        entered, falls = _challenge(front, point)
        left = [member for member, fell in zip(members, falls, strict=True) if fell]
        if approximate is not None:
            volume = approximate[i]
        if entered:
            volume += _exclusive(point, front, corner) if approximate is None else 0.0
            volume = min(volume, LARGEST)
            members = [m for m, fell in zip(members, falls, strict=True) if not fell] + [trial]
            front = np.vstack([front[~falls], point])
        points.append(FrontPoint(trial, volume, entered, left, len(members)))
    return points


def insertion(
    values: ArrayLike, point: Sequence[float], directions: Sequence[str]
) -> tuple[bool, list[int]]:
    """Say whether `point` joins the front `values`, and which rows of it then leave."""
    entered, falls = _challenge(_losses(values, directions), _losses([point], directions)[0])
    return entered, [int(row) for row in np.flatnonzero(falls)]


def _challenge(front: Losses, point: Losses) -> tuple[bool, NDArray[np.bool_]]:
    """Return whether no row of the front dominates `point`, and the mask of those that it does."""
    nowhere_worse = np.asarray((front <= point).all(axis=1))
    nowhere_better = np.asarray((front >= point).all(axis=1))
    entered = not (nowhere_worse & ~nowhere_better).any()
    return bool(entered), nowhere_better & ~nowhere_worse


@dataclass(frozen=True)
class Comparison:
    """Two fronts measured from one reference point."""

    reference: list[float]
    hypervolume_a: float
    hypervolume_b: float
    coverage_ab: float
    """Share of b's front that some point of a equals or dominates; 1.0 is all of it."""
    coverage_ba: float
    """The same with a and b exchanged. The two need not add up to 1."""

    @property
    def difference(self) -> float:
        """The hypervolume of a minus the hypervolume of b."""
        return self.hypervolume_a - self.hypervolume_b


def compare(
    a: ArrayLike,
    b: ArrayLike,
    directions: Sequence[str],
    reference: Sequence[float] | None = None,
) -> Comparison:
    """Compare the fronts of two sets of points.

    Without a reference point, the one of all points of both sets is taken. Coverage is the C metric
    of Zitzler and Thiele (1998, "Multiobjective optimization using evolutionary algorithms").
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    losses_a, losses_b = _losses(first, directions), _losses(second, directions)
    if not len(losses_a) or not len(losses_b):
        raise InputError("front: one of the two sets is empty; both need at least one point")
    if reference is None:
        reference = reference_point(np.vstack([first, second]), directions)
    corner = _losses([reference], directions)[0]
    front_a, front_b = losses_a[_minimal(losses_a)], losses_b[_minimal(losses_b)]
    return Comparison(
        reference=[float(value) for value in reference],
        hypervolume_a=_volume(front_a, corner),
        hypervolume_b=_volume(front_b, corner),
        coverage_ab=_coverage(front_a, front_b),
        coverage_ba=_coverage(front_b, front_a),
    )


def _coverage(a: Losses, b: Losses) -> float:
    """Return the share of the rows of `b` that some row of `a` equals or dominates."""
    return float((a[:, None, :] <= b[None, :, :]).all(axis=2).any(axis=0).mean())
