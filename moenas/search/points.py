"""The points of a space that a study has drawn, and those of a finite space that are left."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moenas.errors import InputError
from moenas.grammar.enumeration import enumerate_points
from moenas.grammar.sampling import Suggest, depends_on_other_fields, draw
from moenas.grammar.spellings import former_hole_name

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
        self._former = space.former_fields
        self._depends = depends_on_other_fields(space.tree)

    def add(self, params: Mapping[str, Any]) -> None:
        """Take in a point that was drawn, by present or by former names of its holes.

        Studies of earlier versions drew holes without effect, too; these do not count.
        """
        if self._depends or any(not _steps(name).isdisjoint(self._former) for name in params):
            held = HeldAnswers(params, self._former)
            with suppress(LookupError):  # the point of another space: it counts as it is
                draw(self._space.tree, held)
                params = held.answers
        self._drawn.add(_key(params))

    def held(self, params: Mapping[str, Any], rest: Suggest) -> HeldAnswers:
        """Return what draws a point of which some answers are known, by former names, too."""
        return HeldAnswers(params, self._former, rest)

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


class HeldAnswers:
    """Answers a hole from known answers by its former name, else from `rest`.

    `rest`, such as an Optuna trial, holds the answers by present names. Without it they are taken
    from the known answers, too.

    Studies of earlier versions drew the fields of a router and of `rope` under other names.
    """

    def __init__(
        self, held: Mapping[str, Any], former: Mapping[str, str], rest: Suggest | None = None
    ) -> None:
        self._held = held
        self._former = former
        self._rest = rest
        self.answers: dict[str, Any] = {}
        """All answers so far, by present names."""

    def _answer(self, name: str, ask: Callable[[Suggest], Any]) -> Any:
        before = None if name in self._held else former_hole_name(name, self._former)
        if before is not None and before in self._held:
            value = self._held[before]
        elif self._rest is not None:
            value = ask(self._rest)
        else:
            value = self._held[name]
        self.answers[name] = value
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        return self._answer(name, lambda rest: rest.suggest_categorical(name, choices))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return a whole number from low to high."""
        ask = lambda rest: rest.suggest_int(name, low, high, step=step, log=log)  # noqa: E731
        return int(self._answer(name, ask))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return a number from low to high."""
        ask = lambda rest: rest.suggest_float(name, low, high, step=step, log=log)  # noqa: E731
        return float(self._answer(name, ask))


def _steps(name: str) -> set[str]:
    """Return the fields and options in the name of a hole."""
    return set(name.partition("/")[0].split("."))


def _key(params: Mapping[str, Any]) -> str:
    # Optuna holds a whole number that was enqueued as 2.0 as such until the study is opened again.
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in params.items()}
    return repr(sorted(whole.items()))
