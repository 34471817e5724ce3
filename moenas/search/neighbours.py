"""Feasible points of a space: drawn at random, or one mutation away from another point."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moenas.errors import PartError, SpaceError
from moenas.grammar.sampling import RandomSuggest
from moenas.search.points import HeldAnswers

if TYPE_CHECKING:
    from moenas.model.architecture import Architecture
    from moenas.records import Cost
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
    cost: Cost
    """Its exact cost at the training context of the space."""


def point(space: Space, seed: int, params: Mapping[str, Any] | None = None) -> Point | None:
    """Return the point of some parameters, with random values for the others.

    None if it breaks a requirement, its fields do not go together, or a part of the user's does not
    count its cost.
    """
    held = params or {}
    return _point(space, HeldAnswers(held, space.former_fields, RandomSuggest(seed, held)))


def held_point(space: Space, params: Mapping[str, Any]) -> Point | None:
    """Return the point of stored parameters, under present or former names of its holes.

    None if a hole has no parameter, or the point is infeasible.
    """
    return _point(space, HeldAnswers(params, space.former_fields))


def _point(space: Space, answers: HeldAnswers) -> Point | None:
    try:
        architecture = space.drawn(answers)
        if any(amount > 0 for amount in space.violations(architecture).values()):
            return None
        return Point(answers.answers, architecture, space.cost(architecture))
    except (SpaceError, LookupError, PartError):
        return None


def neighbour(space: Space, params: Mapping[str, Any], seed: int) -> Point | None:
    """Return a point that differs from another in one hole, and in the holes that depend on it.

    The hole is drawn uniformly from those of the point. None if no other value of it is feasible
    in MUTATIONS draws.
    """
    draw = random.Random(seed)
    name = draw.choice(sorted(params))
    others = {key: value for key, value in params.items() if key != name}
    for _ in range(MUTATIONS):
        changed = point(space, draw.getrandbits(32), others)
        # A stored parameter of a hole without effect is not among those of the point.
        if changed is not None and changed.params.get(name, params[name]) != params[name]:
            return changed
    return None
