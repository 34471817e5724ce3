"""Every point of a finite space, one after another, with nothing held but the current one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moenas.errors import SpaceError
from moenas.grammar.nodes import Range, Tree
from moenas.grammar.sampling import draw, holes


class _Walk:
    """Answers each question with the option at a given place, and the first where none is given."""

    def __init__(self, places: Sequence[int]) -> None:
        self.places = list(places)
        self.last: list[int] = []
        """The place of the last option of each question."""
        self.answers: dict[str, Any] = {}

    def _next(self, name: str, options: Sequence[Any]) -> Any:
        at = len(self.last)
        if at == len(self.places):
            self.places.append(0)
        self.last.append(len(options) - 1)
        self.answers[name] = options[self.places[at]]
        return self.answers[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the choice at the place."""
        return self._next(name, choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """Return the whole number at the place."""
        return int(self._next(name, range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        """Return the number at the place."""
        assert step is not None, "continuous ranges are refused before"
        count = round((high - low) / step) + 1
        at = self._next(name, range(count))
        self.answers[name] = min(high, low + step * at)
        return float(self.answers[name])

    def advanced(self) -> list[int] | None:
        """Return the places of the next point: the last place that can move on does."""
        places = self.places
        while places and places[-1] == self.last[len(places) - 1]:
            places = places[:-1]
        return [*places[:-1], places[-1] + 1] if places else None


def enumerate_points(tree: Tree, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield each point of a finite space, at most `limit`: what `draw` asks for -> the answer.

    The order is fixed, the last hole moves first. Nothing is held but the current point.

    Raises:
        SpaceError: at once, naming a hole that is a continuous range.
    """
    for hole in holes(tree):
        if isinstance(hole.tree, Range) and hole.tree.count is None:
            raise SpaceError(
                "a continuous range has no end of values; give it a step",
                location=hole.tree.mark,
                path=hole.name,
            )
    return _points(tree, limit)


def _points(tree: Tree, limit: int | None) -> Iterator[dict[str, Any]]:
    places: list[int] | None = []
    yielded = 0
    while places is not None and (limit is None or yielded < limit):
        walk = _Walk(places)
        draw(tree, walk)
        yield walk.answers
        yielded += 1
        places = walk.advanced()
