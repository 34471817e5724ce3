"""A small family of components for tests of the grammar, and every point of a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moenas.grammar.component import Component, setting
from moenas.grammar.nodes import Tree
from moenas.grammar.sampling import draw
from moenas.records import Plain


@dataclass(frozen=True, kw_only=True)
class Wheel(Component):
    """A toy family."""


@dataclass(frozen=True, kw_only=True)
class Disc(Wheel, kind="disc"):
    """A toy kind."""

    radius: int = setting("radius", default=8, low=1, high=64, multiple=4)
    colour: Literal["red", "blue"] = setting("colour", default="red")


@dataclass(frozen=True, kw_only=True)
class Spoked(Wheel, kind="spoked"):
    """A toy kind with bounds that can clash."""

    spokes: int = setting("spokes", default=4, low=1)
    used: int = setting("spokes in use", default=2, low=1)
    tension: float | None = setting("tension", default=None, low=0.0)
    presets: ClassVar[dict[str, Plain]] = {"light": {"spokes": 3, "used": 1}}

    def invalid(self) -> str | None:
        """Used spokes must exist."""
        if self.used > self.spokes:
            return f"used ({self.used}) must be at most spokes ({self.spokes})"
        return None


@dataclass(frozen=True, kw_only=True)
class Axle(Component):
    """A toy group of layers."""

    repeat: int = setting("wheels in a row", default=1, low=1)
    vary: bool = setting("draw each by itself", default=False)
    wheel: Wheel = setting("the wheel")


@dataclass(frozen=True, kw_only=True)
class Cart(Component):
    """A toy architecture."""

    width: int = setting("width", default=10, low=1)
    slack: float = setting("slack", default=0.5, low=0.0, high=1.0)
    name: str = setting("name", default="cart")
    axles: tuple[Axle, ...] = setting("axles")


class _Ask(Exception):
    """More answers are needed here: these are the possible ones."""

    def __init__(self, options: Sequence[Any]) -> None:
        super().__init__()
        self.options = options


class _Replay:
    """Answers from a list; at its end, says what could be answered."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self.answers = list(answers)

    def _next(self, options: Sequence[Any]) -> Any:
        if not self.answers:
            raise _Ask(options)
        return self.answers.pop(0)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._next(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return int(self._next(range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float:
        assert step is not None
        return float(self._next([low + i * step for i in range(round((high - low) / step) + 1)]))


def every_point(tree: Tree, answers: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield every point of a tree by brute force."""
    try:
        yield draw(tree, _Replay(answers))
    except _Ask as ask:
        for option in ask.options:
            yield from every_point(tree, (*answers, option))
