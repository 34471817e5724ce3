"""The rank correlation of a rung with the end, against SciPy."""

from __future__ import annotations

import random

import pytest
from scipy.stats import spearmanr

from moenas.predict.rank_agreement import rank_agreements, spearman
from moenas.records import RungResult


@pytest.mark.parametrize("seed", range(4))
def test_the_correlation_is_scipy_s(seed: int) -> None:
    draw = random.Random(seed)
    first = [draw.randint(0, 9) / 10 for _ in range(20)]  # with ties
    second = [x + draw.random() for x in first]
    assert spearman(first, second) == pytest.approx(float(spearmanr(first, second).statistic))


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]])
def test_without_an_order_there_is_no_correlation(values: list[float]) -> None:
    assert spearman(values, values) is None


def test_each_rung_is_compared_with_the_end() -> None:
    results = [RungResult(t, r, 100 * r, 5.0 - t, promoted=t > 1) for t in range(4) for r in (1, 2)]
    agreements = rank_agreements(results, {2: 1.0, 3: 0.5, 9: 0.1})
    assert list(agreements) == [1, 2]
    assert (agreements[2].tokens, agreements[2].reached, agreements[2].promoted) == (200, 4, 2)
    assert (agreements[2].pairs, agreements[2].correlation) == (2, pytest.approx(1.0))
