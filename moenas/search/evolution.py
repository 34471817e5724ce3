"""The sampler `evolution`: regularised evolution over the neighbourhoods of a space."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from moenas import pareto
from moenas.search.neighbours import Point, held_point, neighbour, point

if TYPE_CHECKING:
    from moenas.space.space import Space

Array = NDArray[np.float64]

POPULATION = 24
"""Complete trials that may be parents: the latest ones."""
TOURNAMENT = 6
"""Members of the population that are drawn for a tournament: a quarter, as 25 of 100 in the
paper."""
INITIAL_DRAWS = 1000
"""Random draws in search of a feasible architecture that no trial had."""
CHILDREN = 100
"""Mutations in search of an architecture that no trial had, each of a new parent."""


class Evolution:
    """Proposes the points of one study by regularised evolution (Real et al., arXiv 1802.01548).

    The oldest member of the population dies, however good it is. A parent is the best of a
    tournament by its non-dominated rank in the population, then by its crowding distance (Deb et
    al., NSGA-II, IEEE TEC 2002). A child differs from its parent in one hole and is feasible.
    """

    def __init__(self, space: Space) -> None:
        self._space, self._seed = space, space.search.seed
        self._signs = np.array([1 if o.direction == "minimize" else -1 for o in space.objectives])
        self._points: dict[int, Point | None] = {}

    def propose(self, number: int, trials: Iterable[FrozenTrial]) -> dict[str, Any] | None:
        """Return the parameters of trial `number`, or None if nothing new was found.

        The result depends on the trials and the seed alone, so a resumed study goes on as an
        uninterrupted one does.
        """
        draw = random.Random(f"{self._seed}:{number}:evolution")
        complete, seen = list[tuple[FrozenTrial, Point]](), set[str]()
        for trial in trials:
            if trial.number == number or (proposed := self._point(trial)) is None:
                continue
            seen.add(proposed.architecture.fingerprint)
            feasible = all(amount <= 0 for amount in trial.constraints.values())
            if trial.state == TrialState.COMPLETE and feasible:
                complete.append((trial, proposed))
        if len(complete) < POPULATION:
            return self._random_point(draw, seen)
        # In the order in which they ended: the latest POPULATION trials are alive.
        complete.sort(key=lambda member: (member[0].datetime_complete, member[0].number))
        alive = complete[-POPULATION:]
        order = ranking(np.array([trial.values for trial, _ in alive]) * self._signs)
        for _ in range(CHILDREN):
            parent = min(draw.sample(range(len(alive)), TOURNAMENT), key=order.__getitem__)
            child = neighbour(self._space, alive[parent][1].params, draw.getrandbits(48))
            if child is not None and child.architecture.fingerprint not in seen:
                return child.params
        return None

    def _point(self, trial: FrozenTrial) -> Point | None:
        """Return the point of a trial; None if it is infeasible or has no parameters yet."""
        if trial.number not in self._points and trial.params:
            self._points[trial.number] = held_point(self._space, trial.params)
        return self._points.get(trial.number)

    def _random_point(self, draw: random.Random, seen: set[str]) -> dict[str, Any] | None:
        for _ in range(INITIAL_DRAWS):
            drawn = point(self._space, draw.getrandbits(48))
            if drawn is not None and drawn.architecture.fingerprint not in seen:
                return drawn.params
        return None


def ranking(losses: Array) -> list[int]:
    """Return the place of each row of `losses` (N, M), all minimised: 0 is the best.

    By non-dominated rank, then by crowding distance, largest first, then by row.
    """
    ranks = np.zeros(len(losses), dtype=int)
    left, rank = np.arange(len(losses)), 0
    distances = np.zeros(len(losses))
    while len(left):
        front = left[pareto.non_dominated(losses[left], ["minimize"] * losses.shape[1])]
        ranks[front] = rank
        distances[front] = crowding(losses[front])
        left, rank = np.setdiff1d(left, front), rank + 1
    order = sorted(range(len(losses)), key=lambda i: (ranks[i], -distances[i], i))
    places = [0] * len(order)
    for place, i in enumerate(order):
        places[i] = place
    return places


def crowding(losses: Array) -> Array:
    """Return the crowding distance of each row (N, M): infinite at the ends of an objective."""
    distances = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distances[order[[0, -1]]] = np.inf
        if span > 0:
            distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distances
