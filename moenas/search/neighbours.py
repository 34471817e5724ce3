"""Feasible points of a space: drawn at random, or one mutation away from another point."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moenas.errors import SpaceError
from moenas.grammar.sampling import RandomSuggest, drawn
from moenas.search.points import HeldAnswers

if TYPE_CHECKING:
    from moenas.model.architecture import Architecture
    from moenas.space.space import Space

MUTATIONS = 20
"""Draws of a hole in search of another value."""


@dataclass(frozen=True)
class Point:
    """A feasible point of a space."""

    params: dict[str, Any]
    """Hole -> drawn value, under the names that Optuna sees."""
    architecture: Architecture
    """The architecture of the point in canonical form."""


class _Recorder(RandomSuggest):
    """Draws at random, and keeps what was drawn."""

    def __init__(self, seed: int, forced: Mapping[str, Any] | None = None) -> None:
        super().__init__(seed, forced)
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the forced or a random choice."""
        self.params[name] = super().suggest_categorical(name, choices)
        return self.params[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return the forced or a random whole number."""
        self.params[name] = super().suggest_int(name, low, high, step=step, log=log)
        return int(self.params[name])

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return the forced or a random number."""
        self.params[name] = super().suggest_float(name, low, high, step=step, log=log)
        return float(self.params[name])


def point(space: Space, seed: int, params: Mapping[str, Any] | None = None) -> Point | None:
    """Return the point of some parameters, with random values for the others.

    None if it breaks a requirement, or its fields do not go together.
    """
    recorder = _Recorder(seed, params)
    try:
        architecture = cast("Architecture", drawn(space.tree, recorder)).canonical()
    except SpaceError:
        return None
    return _feasible(space, recorder.params, architecture)


def held_point(space: Space, params: Mapping[str, Any]) -> Point | None:
    """Return the point of stored parameters, under present or former names of its holes.

    None if a hole has no parameter, or the point is infeasible.
    """
    held = HeldAnswers(params, space.former_fields)
    try:
        architecture = cast("Architecture", drawn(space.tree, held)).canonical()
    except (SpaceError, LookupError):
        return None
    return _feasible(space, held.answers, architecture)


def _feasible(space: Space, params: dict[str, Any], architecture: Architecture) -> Point | None:
    if any(amount > 0 for amount in space.violations(architecture).values()):
        return None
    return Point(params, architecture)


def neighbour(space: Space, params: Mapping[str, Any], seed: int) -> Point | None:
    """Return a point that differs from another in one hole, and in the holes that depend on it.

    The hole is drawn uniformly from those of the point. None if no other value of it is feasible
    in MUTATIONS draws.
    """
    draw = random.Random(seed)
    name = draw.choice(sorted(params))
    others = {key: value for key, value in params.items() if key != name}
    for _ in range(MUTATIONS):
        found = point(space, draw.getrandbits(32), others)
        if found is not None and found.params.get(name) != params[name]:
            return found
    return None
