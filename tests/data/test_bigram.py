"""The held-out loss of a bigram, against one that is written out."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from moenas.data.bigram import STRENGTHS, bigram_loss

RNG = np.random.default_rng(0)


def chain(length: int, seed: int) -> np.ndarray:
    """Return tokens in which each follows from the one before, with some noise."""
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append(int((tokens[-1] * 3 + 1) % 7 if rng.random() < 0.8 else rng.integers(7)))
    return np.array(tokens, dtype=np.uint16)


def by_hand(train: list[int], val: list[int], size: int, strength: float) -> float:
    pairs = list(pairwise(train))
    total = 0.0
    for v, w in pairwise(val):
        share = (train.count(w) + 1) / (len(train) + size)
        seen, context = pairs.count((v, w)), sum(a == v for a, _ in pairs)
        total -= math.log((seen + strength * share) / (context + strength))
    return total / (len(val) - 1)


def test_the_loss_is_that_of_a_bigram_written_out() -> None:
    train, val = chain(300, 0), chain(100, 1)
    computed = bigram_loss(train, val, 9)
    several = [by_hand(train.tolist(), val.tolist(), 9, float(a)) for a in STRENGTHS]
    assert computed is not None
    assert any(math.isclose(computed, loss, rel_tol=1e-12) for loss in several)
    assert computed < min(several) + 0.02  # chosen on train alone


def test_it_is_near_what_the_chain_leaves_open_and_below_a_single_token() -> None:
    loss = bigram_loss(chain(20_000, 0), chain(5000, 1), 7)
    p = 0.8 + 0.2 / 7
    left = -(p * math.log(p) + 6 * (0.2 / 7) * math.log(0.2 / 7))
    assert loss == pytest.approx(left, abs=0.03)


def test_tokens_without_order_cost_no_more_than_those_alone_do() -> None:
    """The entropy of pairs within the sample is far lower: there every pair is known."""
    train, val = (RNG.integers(0, 2000, n).astype(np.uint16) for n in (60_000, 10_000))
    loss = bigram_loss(train, val, 2000)
    assert loss == pytest.approx(math.log(2000), abs=0.06)


def test_a_large_vocabulary_and_parts_of_a_split_make_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, val = chain(5000, 0), chain(2000, 1)
    whole = bigram_loss(train, val, 7)
    monkeypatch.setattr("moenas.data.bigram.CHUNK", 333)
    assert bigram_loss(train, val, 7) == pytest.approx(whole, rel=1e-12)
    assert bigram_loss(train.astype(np.uint32), val, 200_000) is not None
    assert bigram_loss(train[:1], val, 7) is None
