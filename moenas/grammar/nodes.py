"""The nodes of a tree: components, lists and values, and the holes among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.component import Component, join
from moenas.grammar.conditions import Scalar

TOLERANCE = 1e-9
"""How far a number may lie from a step of its range, in steps."""
LAYERS = "layers"
"""The section of named layers, and the first part of the paths of their holes."""


@dataclass(frozen=True)
class Fixed:
    """A value that is the same in every architecture of the space."""

    value: Scalar
    mark: SourceLocation


@dataclass(frozen=True)
class Choice:
    """A hole: one of several options, each of which may have holes of its own."""

    labels: tuple[Scalar, ...]
    """What the sampler sees: the value of a scalar option, the kind or preset of a component."""
    options: tuple[Tree, ...]
    mark: SourceLocation
    shared: str = ""
    """The name of a hole that several places share: of a named layer, or of tied values."""


@dataclass(frozen=True)
class Range:
    """A hole: a number from low to high, both inclusive."""

    low: float
    high: float
    step: float | None
    log: bool
    whole: bool
    mark: SourceLocation
    shared: str = ""
    """As of a `Choice`."""

    @property
    def count(self) -> int | None:
        """How many values the range holds; None if it is continuous."""
        if self.step is None:
            return None
        if self.whole:
            return int(self.high - self.low) // int(self.step) + 1
        return round((self.high - self.low) / self.step) + 1

    def holds(self, number: Scalar) -> bool:
        """Whether a value is one of the range."""
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False
        if not self.low <= number <= self.high:
            return False
        if self.log and self.whole:
            return number % self.unit == 0
        if self.step is None:
            return True
        steps = (number - self.low) / self.step
        return abs(steps - round(steps)) <= TOLERANCE

    @property
    def unit(self) -> int:
        """What the sampler counts in. Optuna has no step beside `log`: multiples of 8 are drawn
        as a number of eights."""
        return int(self.step or 1) if self.log else 1

    @property
    def name(self) -> str:
        """The end of the hole's name: `/8` if it is drawn as a number of eights."""
        return f"/{self.unit}" if self.unit > 1 else ""


@dataclass(frozen=True)
class Fit:
    """A width that is solved after each draw, so that the architecture has a given cost.

    It is no hole: no sampler sees it.
    """

    cost: str
    """The name of the cost, as in requirements."""
    target: int
    within: float
    """Largest accepted difference over the target; 0: the cost is exactly the target."""
    low: int
    high: int
    step: int
    """Widths are its multiples from `low` to `high`."""
    mark: SourceLocation
    path: str
    """Where it is in the space file."""

    @property
    def text(self) -> str:
        """What an architecture has to meet, as a requirement."""
        tolerance = f" within {100 * self.within:g}%" if self.within else ""
        return f"fit: {self.cost} = {self.target:,}{tolerance}"

    def violation(self, amount: int) -> float:
        """Return by how much a cost is off: over 0 if too much, else 0 or less."""
        return abs(amount - self.target) / self.target - self.within

    def holds(self, number: Scalar) -> bool:
        """Whether a value is a width that the fit may choose."""
        if isinstance(number, bool) or not isinstance(number, int):
            return False
        return self.low <= number <= self.high and number % self.step == 0


ORIGIN = "_origin"
"""Where a component keeps its `Origin`; it is no field, so it does not count in comparisons."""


@dataclass(frozen=True)
class Origin:
    """Where a component is written: its path in the space file, and its place."""

    path: str
    mark: SourceLocation
    fields: Mapping[str, SourceLocation]

    def error(self, reason: str) -> SpaceError:
        """Build the error for this component, or for the field that a reason begins with."""
        name, colon, rest = reason.partition(": ")
        if colon and name in self.fields:
            return SpaceError(rest, location=self.fields[name], path=join(self.path, name))
        return SpaceError(reason, location=self.mark, path=self.path)


@dataclass(frozen=True)
class Record:
    """A component whose fields may hold holes."""

    cls: type[Component]
    fields: dict[str, Tree]
    mark: SourceLocation
    path: str = ""
    """Where it is in the space file: the fields above it and the options that hold it."""
    former: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """A line for each former name of a field that the text uses."""

    @cached_property
    def origin(self) -> Origin:
        """Where the component is written."""
        fields = {name: value.mark for name, value in self.fields.items()}
        return Origin(self.path, self.mark, fields)

    @cached_property
    def has_holes(self) -> bool:
        """Whether a hole stands anywhere in it."""
        return any(map(has_holes, self.fields.values()))

    @cached_property
    def drawn(self) -> dict[Any, Any]:
        """What `sampling.drawn` made of it, to be made once: equal layers are one object."""
        return {}


@dataclass(frozen=True)
class Listing:
    """A list of components, or of values outside of `architecture`."""

    items: tuple[Tree, ...]
    mark: SourceLocation
    first: int = 0
    """Number of the first item in paths."""

    @cached_property
    def has_holes(self) -> bool:
        """Whether a hole stands anywhere in it."""
        return any(map(has_holes, self.items))


Tree: TypeAlias = Fixed | Choice | Range | Fit | Record | Listing


def has_holes(tree: Tree) -> bool:
    """Whether a tree is a hole or a fit, or contains one."""
    return tree.has_holes if isinstance(tree, Record | Listing) else not isinstance(tree, Fixed)


def walk(tree: Tree) -> Iterator[Tree]:
    """Yield a tree and all trees in it; a named layer is yielded at each use."""
    yield tree
    inner: Iterable[Tree] = ()
    if isinstance(tree, Record):
        inner = tree.fields.values()
    elif isinstance(tree, Choice | Listing):
        inner = tree.options if isinstance(tree, Choice) else tree.items
    for value in inner:
        yield from walk(value)


def fits(tree: Tree) -> Iterator[Fit]:
    """Yield every fit of a tree; one in a named layer is yielded at each use."""
    return (node for node in walk(tree) if isinstance(node, Fit))
