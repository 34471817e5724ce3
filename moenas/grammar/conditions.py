"""Conditions on the values of fields: sets of values, in the declaration of a field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Scalar: TypeAlias = "bool | int | float | str | None"


@dataclass(frozen=True)
class Values:
    """A set of values of a field; a component counts by the name of its kind."""

    listed: tuple[Scalar, ...]
    excluded: bool = False
    """The set holds every value but those listed."""

    def __contains__(self, value: Scalar) -> bool:
        is_listed = any(
            value == x and (type(value) is bool) is (type(x) is bool) for x in self.listed
        )
        return is_listed is not self.excluded


def one_of(*values: Scalar) -> Values:
    """Return the set of some values."""
    return Values(values)


def none_of(*values: Scalar) -> Values:
    """Return the set of all values but some."""
    return Values(values, excluded=True)


Conditions: TypeAlias = "tuple[Mapping[str, Values], ...]"
"""The field has no effect if, for one of the mappings, each named field has one of its values."""
