"""Which candidates train on from a rung: asynchronous successive halving for several objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moenas import pareto
from moenas.predict.rank_agreement import RankAgreement
from moenas.records import RungResult
from moenas.search.rungs import Rungs, trust
from moenas.space.early_stopping import SuccessiveHalving

Array = NDArray[np.float64]
STAND_IN = "flops_per_token"
"""The exact cost that replaces objectives that are not known at a rung."""


class Halving:
    """Asynchronous successive halving (arXiv 1810.05934, algorithm 2)."""

    def __init__(
        self, settings: SuccessiveHalving, directions: Mapping[str, str], *, stand_in: bool = False
    ) -> None:
        """Take the directions of the objectives that are known at a rung.

        With `stand_in`, the exact FLOPs of a candidate replace objectives that are not known.
        """
        self._settings, self._directions = settings, dict(directions)
        self._stand_in = stand_in and STAND_IN not in directions

    def promotable(
        self, rungs: Rungs, paused: Mapping[int, int], *, at_end: bool = False
    ) -> int | None:
        """Return the best candidate of the highest rung that is within the cut and paused there.

        The cut is rounded down, and at the end up, so that a short study has complete candidates.
        """
        agreements = rungs.agreements()
        for rung in sorted(rungs.results, reverse=True):
            results = rungs.results[rung]
            share = len(results) / widened(self._settings, agreements.get(rung))
            n_promoted = math.ceil(share) if at_end else int(share)
            for trial in self.order(rungs, rung)[:n_promoted]:
                if paused.get(trial) == rung:
                    return trial
        return None

    def hopeless(self, rungs: Rungs, paused: Mapping[int, int]) -> list[int]:
        """Return the last ones of the lowest rungs, as many as are paused beyond the limit."""
        surplus = len(paused) - self._settings.max_paused
        stopped: list[int] = []
        for rung in sorted(rungs.results) if surplus > 0 else ():
            stopped += [t for t in reversed(self.order(rungs, rung)) if paused.get(t) == rung]
        return stopped[: max(0, surplus)]

    def order(self, rungs: Rungs, rung: int) -> list[int]:
        """Return the trials that have reached a rung, best first."""
        results = rungs.results[rung]
        # An objective that was exchanged since leaves results without its value.
        trials = [t for t, r in sorted(results.items()) if r.known.keys() >= set(self._directions)]
        losses = [[results[t].val_loss, *self._known(rungs, results[t])] for t in trials]
        return [trials[i] for i in ordered(np.array(losses, dtype=np.float64))] if trials else []

    def _known(self, rungs: Rungs, result: RungResult) -> list[float]:
        """Return what is known of a candidate beside its loss, each to be minimised."""
        signs = {name: 1 if way == "minimize" else -1 for name, way in self._directions.items()}
        values = [sign * result.known[name] for name, sign in signs.items()]
        return values + ([float(rungs.costs[result.trial][STAND_IN])] if self._stand_in else [])


def widened(settings: SuccessiveHalving, agreement: RankAgreement | None) -> float:
    """Return the reduction factor of a rung: smaller where its ranks agree badly with the end.

    It falls linearly with the rank correlation, and is 1 where there is none.
    """
    return 1 + (settings.reduction_factor - 1) * trust(settings.min_correlation, agreement)


def ordered(losses: Array) -> list[int]:
    """Return the rows of points (N, M), all to be minimised, best first.

    Earlier fronts come first (non-dominated sorting). Within a front, the first row is that with
    the lowest first column. Each next one is the farthest from those before it (epsilon-net; arXiv
    2106.12639, section 3.2), by distances in units of each column's range. Equal distances keep the
    order of rows.
    """
    span = np.ptp(losses, axis=0)
    scaled = (losses - losses.min(axis=0)) / np.where(span > 0, span, 1.0)
    directions = ["minimize"] * losses.shape[1]
    left = np.arange(len(losses))
    order: list[int] = []
    while len(left):
        mask = pareto.non_dominated(losses[left], directions)
        order += _spread(scaled, left[mask])
        left = left[~mask]
    return order


def _spread(scaled: Array, front: NDArray[np.int64]) -> list[int]:
    """Return the rows of a front, each the farthest from those before it."""
    at = int(np.argmin(scaled[front, 0]))
    chosen = [int(front[at])]
    distance = np.linalg.norm(scaled[front] - scaled[front[at]], axis=1)
    free = np.ones(len(front), dtype=np.bool_)
    free[at] = False
    while free.any():
        at = int(np.argmax(np.where(free, distance, -1.0)))
        free[at] = False
        chosen.append(int(front[at]))
        distance = np.minimum(distance, np.linalg.norm(scaled[front] - scaled[front[at]], axis=1))
    return chosen
