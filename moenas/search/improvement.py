"""Expected hypervolume improvement where one objective is uncertain and the others are known."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from moenas.pareto import non_dominated

Array = NDArray[np.float64]

HELD = 2**22
"""Cells of the known objectives that are held at a time, times candidates."""
CELLS = 2**14
"""Cells of the known objectives at most: 127 members of a front with two of them, 24 with three."""


def expected_improvement(
    mean: Array, deviation: Array, known: Array, front: Array, reference: Array
) -> Array:
    """Return the expected gain of hypervolume of each candidate; all objectives are minimised.

    The loss of candidate i is normal with `mean[i]` and `deviation[i]` (N,), its other objectives
    are `known[i]` (N, M - 1). `front` (K, M) and `reference` (M,) hold the loss in column 0.

    A(t) is the volume of known objectives that a candidate dominates and that no front member with
    a loss of at most t dominates. The gain at a loss of y is the integral of A(t) from y to the
    reference. Its expectation is the integral of A(t) Phi((t - mean) / deviation). A(t) is constant
    between the losses of the front, so the sum below is exact. A front with more than CELLS cells
    is thinned evenly along the losses first, and the gain is then an upper bound.
    """
    inside = front[(front < reference).all(axis=1)]
    inside = inside[non_dominated(inside, ["minimize"] * len(reference))]
    inside = inside[np.argsort(inside[:, 0], kind="stable")]
    most = max(2, int(CELLS ** (1 / max(1, len(reference) - 1))) - 1)
    if len(inside) > most:
        inside = inside[np.linspace(0, len(inside) - 1, most).round().astype(int)]
    losses = np.concatenate([inside[:, 0], reference[:1]])
    below = _integral(losses, mean, deviation)  # (N, K + 1): up to each loss
    slabs = np.diff(below, axis=1, prepend=0.0)  # between two losses of the front
    return cast(Array, (slabs * _areas(known, inside[:, 1:], reference[1:])).sum(axis=1))


def _integral(losses: Array, mean: Array, deviation: Array) -> Array:
    """Return the integral of Phi((t - mean) / deviation) from minus infinity to each loss: (N, L).

    It is deviation * (z Phi(z) + phi(z)); without deviation it is max(0, loss - mean).
    """
    gap = losses[None] - mean[:, None]
    spread = np.maximum(deviation, 1e-12)[:, None]
    z = gap / spread
    density = np.exp(-0.5 * np.square(z)) / np.sqrt(2 * np.pi)
    return cast(Array, spread * (z * ndtr(z) + density))


def _areas(known: Array, front: Array, corner: Array) -> Array:
    """Return (N, K + 1): the volume from a candidate to the corner that the first k members leave.

    Each axis is cut at the coordinates of the front. A cell of the grid is dominated by the first
    k members or by none of them, as a whole.
    """
    n_axes, n_front = front.shape[1], len(front)
    edges = [np.append(np.unique(front[:, axis]), corner[axis]) for axis in range(n_axes)]
    lows = [np.insert(edge[:-1], 0, -np.inf) for edge in edges]
    # First member, in order of losses, that dominates each cell; n_front where none does.
    first = np.full([len(low) for low in lows], n_front)
    for k in range(n_front - 1, -1, -1):
        first[np.ix_(*[low >= front[k, axis] for axis, low in enumerate(lows)])] = k
    # Cells in the order of the member that dominates them, and where each member's begin.
    order = np.argsort(first, axis=None, kind="stable")
    members, starts = np.unique(first.ravel()[order], return_index=True)
    areas = np.zeros((len(known), n_front + 1))
    step = max(1, HELD // first.size)
    for at in range(0, len(known), step):
        part = known[at : at + step]
        volume = np.ones((len(part), 1))
        for axis, (low, high) in enumerate(zip(lows, edges, strict=True)):
            length = np.maximum(0.0, high - np.maximum(low, part[:, axis, None]))
            volume = (volume[:, :, None] * length[:, None, :]).reshape(len(part), -1)
        areas[at : at + step, members] = np.add.reduceat(volume[:, order], starts, axis=1)
    # Slab k, below the loss of member k, is free where no member before k dominates.
    return np.cumsum(areas[:, ::-1], axis=1)[:, ::-1]
