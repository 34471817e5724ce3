"""Counts of a corpus: tokens, pairs of neighbours, their entropy, a digest."""

from __future__ import annotations

import hashlib

import numpy as np

from moenas.data.shards import ShardedTokens, TokenArray, Tokens
from moenas.errors import DataError

MAX_ORDER_1 = 4096
"""Largest vocabulary whose table of pairs is counted."""
CHUNK = 1 << 20


class Counts:
    """Counts tokens and pairs of neighbours, and digests them, in one pass."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.ones = np.zeros(vocab_size, dtype=np.int64)
        has_pairs = vocab_size <= MAX_ORDER_1
        self.pairs = np.zeros(vocab_size**2, dtype=np.int64) if has_pairs else None
        self.digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Digest of all that was added."""
        return self.digest.hexdigest()

    def add(self, tokens: TokenArray, path: str = "", start: int = 0) -> None:
        """Count one split, which begins at token `start` of the file `path`; shards know theirs.

        Raises:
            DataError: at the first token that is not below `vocab_size`.
        """
        self.digest.update(f"{tokens.dtype.name}:{len(tokens)}\n".encode())
        before: int | None = None
        for i in range(0, len(tokens), CHUNK):
            part = np.ascontiguousarray(tokens[i : i + CHUNK])
            self.digest.update(part.data)
            wide = part.astype(np.int64)
            if len(strange := np.flatnonzero(wide >= self.vocab_size)):
                first = i + int(strange[0])
                file, at = path, start + first
                if isinstance(tokens, ShardedTokens):
                    file, at = tokens.place(first)
                raise DataError(
                    f"{file}: token {wide[first - i]} at position {at} is not below vocab_size"
                    f" {self.vocab_size}; give the tokenizer's vocab_size, or the right dtype",
                    path="data",
                )
            self.ones += np.bincount(wide, minlength=self.vocab_size)
            if self.pairs is not None:
                joined = wide if before is None else np.concatenate(([before], wide))
                np.add.at(self.pairs, joined[:-1] * self.vocab_size + joined[1:], 1)
            before = int(wide[-1])

    def entropy(self) -> list[float | None]:
        """Return [H(token), H(token | token before)] in nats; None where it was not counted."""
        if self.pairs is None:
            return [_entropy(self.ones), None]
        first = self.pairs.reshape(self.vocab_size, -1).sum(1)
        return [_entropy(self.ones), _entropy(self.pairs) - _entropy(first)]


def _entropy(counts: Tokens) -> float:
    """Return the entropy of a distribution given by counts, in nats."""
    some = counts[counts > 0]
    if not len(some):
        return 0.0
    return float(np.log(some.sum()) - (some * np.log(some)).sum() / some.sum())
