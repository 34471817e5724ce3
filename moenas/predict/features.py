"""Features of an architecture: the inputs of a surrogate."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moenas.records import Cost

if TYPE_CHECKING:
    from moenas.model.architecture import Architecture

Array = NDArray[np.float64]
Features = dict[str, float]

WHOLE_NAMES = ("architecture.", "block.")
"""Beginnings of names that are whole, of those that a requirement can use."""
WIDE = 4.0
"""Ratio of the largest to the smallest value above which a positive feature is taken as its log."""


def features(architecture: Architecture, cost: Cost) -> Features:
    """Return the features of an architecture: name -> number.

    A number of a component, such as `n_experts`, is its mean over the layers that have it. A word,
    such as `ffn=moe`, is the share of layers that hold it. Costs are base-2 logarithms. All fields
    of all components are there, so a surrogate sees a user's component too.
    """
    layers = architecture.names()
    numbers, words = defaultdict[str, list[float]](list), Counter[str]()
    for layer in layers:
        for name, value in layer.items():
            if not name.startswith(WHOLE_NAMES):
                continue  # a shorter name of the same field
            if isinstance(value, str):
                words[f"{name}={value}"] += 1
            else:
                numbers[name].append(float(value))
    numbers_by_name = {name: math.fsum(values) / len(values) for name, values in numbers.items()}
    numbers_by_name |= {name: count / len(layers) for name, count in words.items()}
    return numbers_by_name | {
        f"cost.{name}": float(np.log2(1 + n)) for name, n in cost.plain().items()
    }


@dataclass(frozen=True)
class _Column:
    """One feature as numbers from 0 to 1 over the set that it was made by."""

    name: str
    logarithm: bool
    low: float
    high: float
    mean: float

    @classmethod
    def of(cls, name: str, values: Array) -> _Column:
        """Make the column of a feature by its values in the set, NaN where it is absent."""
        there = values[~np.isnan(values)]
        logarithm = bool(there.min() > 0 and there.max() / there.min() > WIDE)
        shown = np.log(there) if logarithm else there
        return cls(name, logarithm, shown.min(), shown.max(), shown.mean())

    def encode(self, values: Array) -> Array:
        """Return the values of the column, with the set's mean where the feature is absent."""
        if self.logarithm:
            values = np.log(np.where(values > 0, values, np.nan))
        return (np.nan_to_num(values, nan=self.mean) - self.low) / (self.high - self.low)


class Encoder:
    """Turns features into columns of 0 to 1, by the features of a set of architectures.

    Features that are equal in all of them are left out, and those that say what an earlier one
    says. A positive number that varies by more than WIDE is taken as its logarithm.
    """

    def __init__(self, rows: Sequence[Features]) -> None:
        self._columns: list[_Column] = []
        seen: set[bytes] = set()
        for name in sorted({name for row in rows for name in row}):
            values = _values(rows, name)
            if np.isclose(np.nanmin(values), np.nanmax(values), rtol=1e-9, atol=0.0):
                continue
            column = _Column.of(name, values)
            encoded = np.round(column.encode(values), 9)
            if {encoded.tobytes(), np.round(1 - encoded, 9).tobytes()} & seen:
                continue
            seen.add(encoded.tobytes())
            self._columns.append(column)

    @property
    def names(self) -> list[str]:
        """The features that have a column."""
        return [column.name for column in self._columns]

    def encode(self, rows: Sequence[Features]) -> Array:
        """Return the columns of architectures, (N, D). Values beyond the set's range are kept."""
        columns = [column.encode(_values(rows, column.name)) for column in self._columns]
        return np.stack(columns, axis=1) if columns else np.empty((len(rows), 0))


def _values(rows: Sequence[Features], name: str) -> Array:
    """Return one feature of each row; NaN where a number is absent, 0 where a word is."""
    absent = 0.0 if "=" in name else np.nan
    return np.array([row.get(name, absent) for row in rows], dtype=np.float64)
