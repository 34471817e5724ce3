"""Early stopping: candidates that end before the last training token, decided at the rungs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moenas.grammar.component import Component, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moenas.space.objective import Objective

DEFAULT_RUNGS = 2
"""Rungs where early stopping is on and `train.rungs` is 0: both lie before the rate falls."""
CORRELATION = (
    "rank correlation (Spearman) between the losses at a rung and at the end, below which the cut"
    " widens; it is measured from 8 candidates on that have both; 0: the cut never widens"
)


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Component):
    """Which candidates end before the last token; decided at the rungs of `train.rungs`.

    All candidates have one schedule of the learning rate, so losses at a rung compare at equal
    tokens. With early stopping, `train.rungs: 0` means 2.
    """

    stops: ClassVar[bool] = True
    """Whether this kind stops any candidate."""

    def unsuitable(self, objectives: Sequence[Objective]) -> str | None:
        """Return why this kind does not suit the objectives of a study, or None."""
        if self.stops and all(objective.needs != "training" for objective in objectives):
            return "no objective trains a candidate; add val_loss to the objectives"
        return None


@dataclass(frozen=True, kw_only=True)
class NoEarlyStopping(EarlyStopping, kind="none"):
    """Every candidate is trained to the end."""

    stops = False


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving(EarlyStopping, kind="successive_halving"):
    """Asynchronous successive halving (ASHA; arXiv 1810.05934, algorithm 2) for several objectives.

    A candidate trains on if it is among the best 1 / reduction_factor of those that have reached
    its rung. The order is by non-dominated fronts, and within a front by an epsilon-net (arXiv
    2106.12639). It compares the loss at the rung and the objectives that are measured before
    training. If another objective needs training, flops_per_token replaces it. With one objective,
    this is ASHA. The number that trains on is rounded down. Once all candidates are drawn, it is
    rounded up. Then the paused ones are stopped.
    """

    reduction_factor: float = setting(
        "one in so many candidates of a rung trains on", default=3.0, low=1.0, high=1000.0
    )
    min_correlation: float = setting(CORRELATION, default=0.5, low=0.0, high=1.0)
    max_paused: int = setting(
        "candidates that wait at rungs, at most: each has a checkpoint of about 12 bytes a"
        " parameter; beyond that the last one of the lowest rung is stopped",
        default=50,
        low=1,
        high=100_000,
    )


@dataclass(frozen=True, kw_only=True)
class Predictive(EarlyStopping, kind="predictive"):
    """A candidate trains on while its predicted objectives may still join the front.

    A Gaussian process predicts the final loss from features of the architecture and the losses at
    the rungs so far. Other objectives that need training are predicted from the features alone. The
    chance is that no complete candidate dominates the predicted values.
    """

    min_chance: float = setting(
        "chance of joining the front below which a candidate is stopped",
        default=0.1,
        low=0.0,
        high=1.0,
    )
    min_complete: int = setting(
        "complete candidates before the first one is stopped", default=10, low=2
    )
    min_correlation: float = setting(CORRELATION, default=0.5, low=0.0, high=1.0)
