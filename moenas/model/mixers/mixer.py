"""The family of mixers: how a token reads the tokens before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from moenas.grammar.component import Part

# Shapes: B sequences, S tokens of a sequence, D model width, H heads, K key-value heads, C width
# of a head, L tokens so far, with the tokens in the cache.


MOST = 2**16
"""Heads of a layer, and elements of a head: some numbers are worked out for each."""


@dataclass(frozen=True, kw_only=True)
class Mixer(Part):
    """The family of mixers: modules (B, S, D) -> (B, S, D) that never look ahead.

    The module is called as `mixer(x, cache)`. One that derives from `ReadsInputs` is run with the
    `LayerInputs` of the pass. One that derives from `LayerIndexed` is told the number of its layer;
    then the property `layer_indexed` of the config is True.
    """

    def canonical_at(self, d_model: int) -> Self:
        """Return the canonical form with all that follows from the width written out."""
        return self.canonical()


class KVCache:
    """Keys and values of the tokens seen so far, with room for `context` of them."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch = batch
        self.context = context
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, S, C) keys and values; return the keys and values of all tokens so far.

        The room is taken at the first call, in the dtype and on the device of `keys`. Keys and
        values may differ in width.

        Raises:
            ValueError: if there are more or fewer sequences than the cache was made for, or there
                is no room left.
        """
        if len(keys) != self.batch:
            raise ValueError(f"{len(keys)} sequences; the cache was made for {self.batch}")
        end = self.length + keys.shape[2]
        if end > self.context:
            raise ValueError(
                f"{end} tokens; the cache was made for {self.context}: give new_cache a longer"
                " context"
            )
        if self.keys is None or self.values is None:
            shape = (self.batch, keys.shape[1], self.context)
            self.keys = keys.new_empty(*shape, keys.shape[3])
            self.values = values.new_empty(*shape, values.shape[3])
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class StateCache:
    """What a mixer of linear time keeps: it does not grow with the tokens."""

    def __init__(self) -> None:
        self.length = 0
        self.before: Tensor | None = None
        """The last tokens that went into the convolution, (B, kernel - 1, width)."""
        self.state: Tensor | None = None
        """The recurrent state, float32."""

    def check_batch(self, batch: int) -> None:
        """Raise ValueError if the state is of another number of sequences; 1 would be repeated."""
        if self.state is not None and len(self.state) != batch:
            raise ValueError(f"{batch} sequences; the cache is for {len(self.state)}")
