"""The held-out loss of a bigram model, which knows the previous token alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from moenas.data.entropy import CHUNK
from moenas.data.shards import TokenArray, Tokens

MOST_TRAIN, MOST_VAL = 1 << 23, 1 << 21
"""Tokens from the start of each split that are read; a longer one is cut there."""
STRENGTHS = 2.0 ** np.arange(-6, 15)

Numbers = np.ndarray[Any, np.dtype[Any]]


def bigram_loss(train: TokenArray, val: TokenArray, vocab_size: int) -> float | None:
    """Return the cross entropy of a smoothed bigram on the validation split, nats per token.

    Counted on `train`: p(w | v) = (c(v w) + a p(w)) / (c(v) + a), where p(w) = (c(w) + 1) / (N + V)
    (MacKay and Peto, 1995, eq. 15, with one prior). The strength a is the one of STRENGTHS under
    which each pair of `train` is most probable given all others. None if a split has no pair.
    """
    train, val = train[:MOST_TRAIN], val[:MOST_VAL]
    if len(train) < 2 or len(val) < 2:
        return None
    ones = np.zeros(vocab_size)
    for part in _parts(train, 0):
        ones += np.bincount(part, minlength=vocab_size)
    share = (ones + 1.0) / (len(train) + vocab_size)
    codes, often = _pairs(train, vocab_size)
    before, word = codes // vocab_size, codes % vocab_size
    context = np.bincount(before, weights=often, minlength=vocab_size)
    left = [_left_out(often, context[before], share[word], a) for a in STRENGTHS]
    strength = STRENGTHS[int(np.argmin(left))]
    total = 0.0
    for part in _parts(val, 1):
        asked = part[:-1] * vocab_size + part[1:]
        at = np.searchsorted(codes, asked).clip(max=len(codes) - 1)
        seen = np.where(codes[at] == asked, often[at], 0)
        p = (seen + strength * share[part[1:]]) / (context[part[:-1]] + strength)
        total -= float(np.log(p).sum())
    return total / (len(val) - 1)


def _left_out(often: Numbers, context: Numbers, share: Numbers, strength: float) -> float:
    """Return the loss on the pairs of training, each left out of the counts once."""
    p = (often - 1 + strength * share) / (context - 1 + strength)
    return -float((often * np.log(p)).sum())


def _parts(tokens: Tokens, overlap: int) -> list[Numbers]:
    """Cut tokens into pieces, as int64; each begins with the last `overlap` of the one before."""
    starts = range(0, max(1, len(tokens) - overlap), CHUNK)
    return [tokens[i : i + CHUNK + overlap].astype(np.int64) for i in starts]


def _pairs(tokens: Tokens, vocab_size: int) -> tuple[Numbers, Numbers]:
    """Return the different pairs of neighbours, sorted, as v * V + w, and how often each is."""
    pair_counts = [
        np.unique(part[:-1] * vocab_size + part[1:], return_counts=True)
        for part in _parts(tokens, 1)
    ]
    codes = np.concatenate([codes for codes, _ in pair_counts])
    often = np.concatenate([often for _, often in pair_counts])
    order = np.argsort(codes, kind="stable")
    codes, often = codes[order], often[order]
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    return codes[first], np.add.reduceat(often, first)
