"""What is known of a study at its rungs, and what a rule of early stopping decides by it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from moenas.predict.rank_agreement import MIN_PAIRS, RankAgreement, rank_agreements
from moenas.records import Evaluation, Plain, RungResult


@dataclass(frozen=True)
class Estimate:
    """What a candidate is expected to have at the end, from its last rung."""

    values: dict[str, float]
    """Objective -> value: the loss at the end, and what is measured before training."""
    variance: float
    """Variance of the loss over candidates that were trained on, in nats squared."""


@dataclass
class Rungs:
    """What is known of all candidates of a study at its rungs and at the end."""

    results: dict[int, dict[int, RungResult]] = field(default_factory=dict)
    """Rung -> trial -> result."""
    costs: dict[int, dict[str, int]] = field(default_factory=dict)
    """Trial -> its exact cost, of the trials that have a result."""
    architectures: dict[int, Plain] = field(default_factory=dict)
    """Trial -> its canonical architecture, of the same trials."""
    complete: dict[int, Evaluation] = field(default_factory=dict)
    """Trial -> evaluation, of the complete trials; copies are left out."""

    def add(self, result: RungResult, architecture: Plain, cost: dict[str, int]) -> None:
        """Take in a result, in place of an earlier one of the same trial and rung."""
        self.results.setdefault(result.rung, {})[result.trial] = result
        self.architectures[result.trial] = architecture
        self.costs[result.trial] = cost

    def forget(self, trial: int) -> None:
        """Remove the results of a trial that is trained again from its start."""
        for results in self.results.values():
            results.pop(trial, None)

    def estimates(self) -> dict[int, Estimate]:
        """Return the candidates that have a rung and no end: trial -> what is expected of it.

        From one rung to the next, the loss falls by the median over the candidates that have both.
        A rung from which no candidate was trained on adds nothing. So losses of all rungs compare,
        also before the first candidate is complete.
        """
        ends, fall, variance = self._final_losses(), 0.0, 0.0
        estimates = dict[int, Estimate]()
        for rung in sorted(self.results, reverse=True):
            here = self.results[rung]
            later = {t: result.val_loss for t, result in self.results.get(rung + 1, {}).items()}
            after = later or ends
            falls = [after[t] - result.val_loss for t, result in here.items() if t in after]
            if falls:
                fall += statistics.median(falls)
                variance += statistics.variance(falls) if len(falls) > 1 else 0.0
            for trial, result in here.items():
                if trial not in self.complete and trial not in later and trial not in estimates:
                    values = {**result.known, "val_loss": result.val_loss + fall}
                    estimates[trial] = Estimate(values, variance)
        return estimates

    def agreements(self) -> dict[int, RankAgreement]:
        """Return rung -> its rank agreement with the end."""
        every = [result for results in self.results.values() for result in results.values()]
        return rank_agreements(every, self._final_losses())

    def _final_losses(self) -> dict[int, float]:
        """Return trial -> validation loss at the end, of the complete trials that have one."""
        return {
            trial: e.metrics["val_loss"]
            for trial, e in self.complete.items()
            if "val_loss" in e.metrics
        }


class Rule(Protocol):
    """Decides about paused candidates; `paused` is trial -> its rung."""

    def promotable(
        self, rungs: Rungs, paused: Mapping[int, int], *, at_end: bool = False
    ) -> int | None:
        """Return the candidate that trains on now, or None.

        `at_end`: the study draws no more candidates.
        """

    def hopeless(self, rungs: Rungs, paused: Mapping[int, int]) -> list[int]:
        """Return the paused candidates that are stopped now."""


def trust(min_correlation: float, agreement: RankAgreement | None) -> float:
    """Return how far a rung's ranks are trusted, from 0 to 1; 1 from `min_correlation` on.

    It is 1, too, while fewer than MIN_PAIRS candidates have both losses.
    """
    if agreement is None or agreement.correlation is None or agreement.pairs < MIN_PAIRS:
        return 1.0
    if min_correlation == 0 or agreement.correlation >= min_correlation:
        return 1.0
    return max(0.0, agreement.correlation) / min_correlation
