"""The points of a space that a study has drawn, and those of a finite space that are left."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moenas.errors import InputError
from moenas.grammar.enumeration import enumerate_points

if TYPE_CHECKING:
    from moenas.space.space import Space

ENUMERATED = 20_000
"""Points of the largest space that is enumerated."""


def check_grid(space: Space) -> None:
    """Refuse `sampler: grid` for a space that cannot be enumerated.

    Raises:
        InputError: naming the hole that is continuous, or the number of points.
    """
    if space.search.sampler != "grid":
        return
    for hole in space.holes:
        if getattr(hole.tree, "count", 1) is None:
            raise InputError(
                f"search.sampler: grid needs a finite space, and '{hole.name}' is a continuous"
                " range; give it a step, or choose another sampler"
            )
    if space.size > ENUMERATED:
        raise InputError(
            f"search.sampler: grid evaluates every point of at most {ENUMERATED:,}, and the space"
            " has more; choose another sampler, such as qmc or random"
        )


class Points:
    """Points by their drawn parameters: parameter name -> value."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._size = math.inf if space.continuous else space.size
        self._drawn: set[str] = set()
        self._left: list[dict[str, Any]] | None = None

    def add(self, params: Mapping[str, Any]) -> None:
        """Take in a point that was drawn."""
        self._drawn.add(_key(params))

    @property
    def exhausted(self) -> bool:
        """Whether every point of a finite space was drawn."""
        return len(self._drawn) >= self._size

    @property
    def enumerable(self) -> bool:
        """Whether the points that are left can be listed."""
        return self._size <= ENUMERATED

    def unseen(self) -> dict[str, Any] | None:
        """Return a point that was not drawn, in an order that the study's seed decides."""
        if self._left is None:
            self._left = list(enumerate_points(self._space.tree, ENUMERATED))
            random.Random(self._space.search.seed).shuffle(self._left)
            self._left.reverse()  # taken from the end
        while self._left and _key(self._left[-1]) in self._drawn:
            self._left.pop()
        return self._left[-1] if self._left else None


def _key(params: Mapping[str, Any]) -> str:
    # Optuna holds a whole number that was enqueued as 2.0 as such until the study is opened again.
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in params.items()}
    return repr(sorted(whole.items()))
