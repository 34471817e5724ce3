"""How well the losses at a rung rank candidates: their rank correlation with the final losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moenas.records import RungResult

MIN_PAIRS = 8
"""Candidates with both losses from which on the correlation is used."""


@dataclass(frozen=True)
class RankAgreement:
    """The rank correlation of one rung with the end of training."""

    rung: int
    tokens: int
    reached: int
    """Candidates that have reached the rung."""
    promoted: int
    """Candidates that trained on."""
    pairs: int
    """Candidates that have both losses."""
    correlation: float | None
    """Spearman's; None below 2 pairs, or if all losses of one side are equal."""


def rank_agreements(
    results: Iterable[RungResult], final: Mapping[int, float]
) -> dict[int, RankAgreement]:
    """Return rung -> its agreement with the final losses, in order; `final` is trial -> loss.

    Candidates that early stopping selected differ less than all candidates do. So the correlation
    of all candidates is higher than what is returned.
    """
    rungs: dict[int, list[RungResult]] = {}
    for result in results:
        rungs.setdefault(result.rung, []).append(result)
    agreements = {}
    for rung, rows in sorted(rungs.items()):
        both = [(row.val_loss, final[row.trial]) for row in rows if row.trial in final]
        agreements[rung] = RankAgreement(
            rung,
            rows[0].tokens,
            len(rows),
            sum(row.promoted for row in rows),
            len(both),
            spearman([pair[0] for pair in both], [pair[1] for pair in both]),
        )
    return agreements


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; equal values share the mean of their ranks.

    None below 2 pairs, or if all values of one side are equal.
    """
    a, b = _ranks(first), _ranks(second)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the ranks of values; equal ones share the mean of theirs."""
    ranked = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(ranked, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return middle
