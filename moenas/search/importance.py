"""Importances of holes by a surrogate: how far an objective moves while one hole alone varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moenas.predict.features import Encoder, features
from moenas.predict.level_effects import MIN_CANDIDATES
from moenas.search.neighbours import Point, held_point, point

if TYPE_CHECKING:
    from moenas.space.space import Space

Array = NDArray[np.float64]

VARIED = 40
"""Candidates that are varied at most."""
LEVELS = 4
"""Other values that a hole takes at most."""


def surrogate_importances(
    space: Space, known: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]]
) -> dict[str, dict[str, float]]:
    """Return objective -> hole -> mean deviation while the hole alone takes other values.

    `known` has the drawn parameters and the values of each complete candidate. A Gaussian process
    over the features of the architectures predicts an objective; one that equals a cost is
    computed. The values of a hole are those that any candidate has. With too few candidates the
    result is empty.
    """
    drawn = [(held_point(space, params), values) for params, values in known]
    origins = [(origin, values) for origin, values in drawn if origin is not None]
    if len(origins) < MIN_CANDIDATES:
        return {}
    points = [origin for origin, _ in origins]
    # 1. Each hole of some candidates varies alone: (hole, candidate) -> places in `points`.
    places: dict[tuple[str, int], list[int]] = {}
    for hole in dict.fromkeys(hole for params, _ in known for hole in params):
        options = list(dict.fromkeys(params[hole] for params, _ in known if hole in params))
        for index, (origin, _) in enumerate(origins[:VARIED]):
            others = [value for value in options if value != origin.params.get(hole)][:LEVELS]
            if hole in origin.params and others:
                made = [point(space, 0, {**origin.params, hole: value}) for value in others]
                feasible = [candidate for candidate in made if candidate is not None]
                first = len(points)
                places[hole, index] = [index, *range(first, first + len(feasible))]
                points += feasible
    # 2. The objectives of all of them, and the deviations, averaged over the candidates.
    importances: dict[str, dict[str, float]] = {}
    for name, column in _objectives(space, points, [v for _, v in origins]).items():
        deviations: dict[str, list[float]] = {}
        for (hole, _), rows in places.items():
            deviations.setdefault(hole, []).append(float(column[rows].std()))
        importances[name] = {hole: float(np.mean(parts)) for hole, parts in deviations.items()}
    return importances


def _objectives(
    space: Space, points: Sequence[Point], measured: Sequence[Mapping[str, float]]
) -> dict[str, Array]:
    """Compute or predict each objective (N,) of some points; the first ones are measured."""
    from moenas.predict.surrogate import Surrogate

    rows = [features(one.architecture, one.cost) for one in points]
    x = Encoder(rows).encode(rows)
    columns: dict[str, Array] = {}
    for objective in space.objectives:
        if objective.exact is not None:
            columns[objective.name] = np.array([objective.exact_value(one.cost) for one in points])
        else:
            values = np.array([row[objective.name] for row in measured])
            columns[objective.name] = Surrogate(x[: len(values)], values).predict(x)[0]
    return columns
