"""Importances of holes by a surrogate: how far an objective moves while one hole alone varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moenas.predict.features import Encoder, features
from moenas.search.neighbours import held_point, point

if TYPE_CHECKING:
    from moenas.model.architecture import Architecture
    from moenas.space.space import Space

MIN_CANDIDATES = 8
"""Candidates that the surrogate is fitted to at least."""
VARIED = 40
"""Candidates that are varied at most."""
LEVELS = 4
"""Other values that a hole takes at most."""


def surrogate_importances(
    space: Space, known: Sequence[tuple[Mapping[str, Any], float]], objective: str
) -> dict[str, float]:
    """Return hole -> mean deviation of an objective while the hole alone takes other values.

    `known` has the drawn parameters and the value of each complete candidate. A Gaussian process
    over the features of the architectures predicts the objective; one that equals a cost is
    computed. The values of a hole are those that any candidate has. With too few candidates the
    result is empty.
    """
    drawn = [(held_point(space, params), value) for params, value in known]
    origins = [(origin, value) for origin, value in drawn if origin is not None]
    if len(origins) < MIN_CANDIDATES:
        return {}
    architectures = [origin.architecture for origin, _ in origins]
    # 1. Each hole of some candidates varies alone: (hole, candidate) -> places in `architectures`.
    places: dict[tuple[str, int], list[int]] = {}
    for hole in dict.fromkeys(hole for params, _ in known for hole in params):
        values = list(dict.fromkeys(params[hole] for params, _ in known if hole in params))
        for index, (origin, _) in enumerate(origins[:VARIED]):
            others = [value for value in values if value != origin.params.get(hole)][:LEVELS]
            if hole in origin.params and others:
                made = [point(space, 0, {**origin.params, hole: value}) for value in others]
                feasible = [found.architecture for found in made if found is not None]
                first = len(architectures)
                places[hole, index] = [index, *range(first, first + len(feasible))]
                architectures += feasible
    # 2. The objective of all of them.
    values_of = np.array(_objective_values(space, architectures, origins, objective))
    # 3. The deviations, averaged over the candidates.
    deviations: dict[str, list[float]] = {}
    for (hole, _), rows in places.items():
        deviations.setdefault(hole, []).append(float(values_of[rows].std()))
    return {hole: float(np.mean(parts)) for hole, parts in deviations.items()}


def _objective_values(
    space: Space,
    architectures: Sequence[Architecture],
    origins: Sequence[tuple[object, float]],
    objective: str,
) -> list[float]:
    """Compute or predict an objective; the first architectures are those of the candidates."""
    costs = [space.cost(architecture) for architecture in architectures]
    exact = next(o for o in space.objectives if o.name == objective).exact
    if exact is not None:
        return [float(getattr(cost, exact)) for cost in costs]
    from moenas.predict.surrogate import Surrogate

    rows = [features(one, cost) for one, cost in zip(architectures, costs, strict=True)]
    x = Encoder(rows).encode(rows)
    measured = np.array([value for _, value in origins])
    return [float(v) for v in Surrogate(x[: len(origins)], measured).predict(x)[0]]
