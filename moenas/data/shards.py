"""Shards: arrays of tokens that are read one after another as one array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Tokens = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Shard:
    """A piece of one file of tokens."""

    path: str
    tokens: Tokens
    """1-D; may be memory-mapped."""
    start: int = 0
    """Place of the first token in the file."""


class ShardedTokens:
    """Tokens of several files as one 1-D array; nothing is read until it is indexed.

    It knows len, dtype, slices, arrays of places of any shape, and `numpy.asarray`.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._ends = np.cumsum([len(shard.tokens) for shard in self.shards])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a token, the same in all shards."""
        return self.shards[0].tokens.dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Tokens:
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: slice | Tokens) -> Tokens:
        """Return a copy of the tokens of a slice without a step, or at places from 0 on."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1
            return np.concatenate(
                [shard.tokens for shard in self.part(start, max(start, stop)).shards]
            )
        number = np.searchsorted(self._ends, key, side="right")
        first = number.flat[0]
        if (number == first).all():
            return self._gathered(int(first), key)
        gathered = np.empty(key.shape, dtype=self.dtype)
        for one in np.unique(number):
            here = number == one
            gathered[here] = self._gathered(int(one), key[here])
        return gathered

    def _gathered(self, number: int, places: Tokens) -> Tokens:
        """Return the tokens at some places, which all lie in one shard."""
        tokens = self.shards[number].tokens
        gathered: Tokens = tokens[places - (self._ends[number] - len(tokens))]
        return gathered

    def part(self, start: int, stop: int) -> ShardedTokens:
        """Return the tokens from `start` to before `stop`, as views of the shards."""
        parts = []
        for shard, end in zip(self.shards, self._ends.tolist(), strict=True):
            begin = end - len(shard.tokens)
            low, high = max(start, begin) - begin, min(stop, end) - begin
            if low < high:
                parts.append(Shard(shard.path, shard.tokens[low:high], shard.start + low))
        return ShardedTokens(parts or [Shard(self.shards[0].path, self.shards[0].tokens[:0])])

    def place(self, at: int) -> tuple[str, int]:
        """Return the file of a token and its place there."""
        number = int(np.searchsorted(self._ends, at, side="right"))
        shard = self.shards[number]
        return shard.path, shard.start + at - int(self._ends[number]) + len(shard.tokens)


TokenArray = Tokens | ShardedTokens
"""One array of tokens, or several that are read as one."""


def joined(shards: Sequence[Shard]) -> TokenArray:
    """Return the tokens of some files in order: the array itself if there is one file."""
    return shards[0].tokens if len(shards) == 1 else ShardedTokens(shards)


def divided(tokens: TokenArray, at: int) -> tuple[TokenArray, TokenArray]:
    """Return the tokens before a place, and those from it on."""
    if isinstance(tokens, ShardedTokens):
        return tokens.part(0, at), tokens.part(at, len(tokens))
    return tokens[:at], tokens[at:]
