"""Expected losses of a factorial table: main effects of all holes, and interactions of two.

A recorded loss has the noise of one seed. The rows of a factorial design share effects. So a linear
model of them averages the noise away (Box, Hunter and Hunter, Statistics for Experimenters, ch. 5).
It shares no code with the surrogate of the sampler `gray_box`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
FOLDS = 10


def design(points: Sequence[Mapping[str, Any]]) -> Array:
    """Return the columns (N, D) of points: a constant, the effects of holes, and their products."""
    levels = sorted({(name, str(value)) for point in points for name, value in point.items()})
    written = [{(name, str(value)) for name, value in point.items()} for point in points]
    single = np.array([[level in held for level in levels] for held in written], dtype=np.float64)
    pairs = [
        single[:, i] * single[:, j]
        for i, j in combinations(range(len(levels)), 2)
        if levels[i][0] != levels[j][0]
    ]
    columns = np.column_stack([np.ones(len(points)), single, *pairs])
    kept = columns.std(axis=0) > 0
    kept[0] = True
    unique: Array = np.unique(columns[:, kept], axis=1)
    return unique


def fitted(columns: Array, losses: Array, penalty: float) -> Array:
    """Return the coefficients (D,) of a ridge regression of losses (N,); the mean is not shrunk."""
    center = losses.mean()
    gram = columns.T @ columns + penalty * np.eye(columns.shape[1])
    solved: Array = np.linalg.solve(gram, columns.T @ (losses - center))
    return solved


def expected(points: Sequence[Mapping[str, Any]], losses: Array) -> tuple[Array, float]:
    """Return expected losses (N,), and the root mean square error of losses that were left out.

    The penalty is the one with the smallest error in a cross-validation of FOLDS parts.
    """
    columns = design(points)
    fold = np.random.default_rng(0).permutation(len(losses)) % FOLDS
    errors = []
    for penalty in PENALTIES:
        missed = np.empty_like(losses)
        for part in range(FOLDS):
            out = fold == part
            coefficients = fitted(columns[~out], losses[~out], penalty)
            missed[out] = losses[out] - losses[~out].mean() - columns[out] @ coefficients
        errors.append(float(np.sqrt(np.mean(missed**2))))
    best = int(np.argmin(errors))
    prediction: Array = losses.mean() + columns @ fitted(columns, losses, PENALTIES[best])
    return prediction, errors[best]
