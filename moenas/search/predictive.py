"""Predictive early stopping: the chance that a candidate in training still joins the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moenas.predict.features import Encoder, Features, features
from moenas.records import Cost
from moenas.search.rungs import Rungs, trust
from moenas.space.early_stopping import Predictive

if TYPE_CHECKING:
    from moenas.predict.surrogate import Surrogate
    from moenas.space.space import Space

Array = NDArray[np.float64]
SAMPLES = 1000
"""Joint samples of the predicted objectives of a candidate."""
REFIT = 1.2
"""Growth of the complete candidates at which hyperparameters are fitted again."""


class Prediction:
    """Stops a candidate whose predicted values have little chance of joining the front.

    The Gaussian process of a rung predicts by how much the loss falls from the rung to the end. Its
    inputs are the features of the architecture and the losses at the rungs so far.
    """

    def __init__(self, settings: Predictive, space: Space) -> None:
        self._settings, self._space = settings, space
        self._features: dict[int, Features] = {}
        self._fitted: dict[tuple[str, int], tuple[int, Encoder, Surrogate]] = {}

    def promotable(
        self, rungs: Rungs, paused: Mapping[int, int], *, at_end: bool = False
    ) -> int | None:
        """Return the paused candidate of the highest rung; `hopeless` has stopped the others."""
        return max(paused, key=lambda trial: (paused[trial], -trial), default=None)

    def hopeless(self, rungs: Rungs, paused: Mapping[int, int]) -> list[int]:
        """Return the paused candidates whose chance is below the limit.

        The limit falls where the ranks of a rung agree badly with the end.
        """
        agreements = rungs.agreements() if paused else {}
        stopped = []
        for trial, rung in paused.items():
            share = trust(self._settings.min_correlation, agreements.get(rung))
            if self.chance(rungs, trial, rung) < share * self._settings.min_chance:
                stopped.append(trial)
        return stopped

    def chance(self, rungs: Rungs, trial: int, rung: int) -> float:
        """Return the chance that no complete candidate dominates a candidate at its end.

        It is 1 while fewer than `min_complete` candidates are complete that have reached the rung.
        Evaluations that were reused from another study have no rungs, and count for the front.
        """
        done = [t for t in sorted(rungs.complete) if t in rungs.results[rung]]
        if len(done) < self._settings.min_complete:
            return 1.0
        result = rungs.results[rung][trial]
        noise = np.random.default_rng(trial)
        samples, front = [], []
        for objective in self._space.objectives:
            values = np.array([rungs.complete[t].values[objective.name] for t in done])
            name, sign = objective.name, 1 if objective.direction == "minimize" else -1
            if objective.needs != "training":
                drawn = np.full(SAMPLES, result.known[name])
            elif name == "val_loss":
                at_rung = np.array([rungs.results[rung][t].val_loss for t in done])
                rows = self._rows(rungs, [*done, trial], rung)
                mean, deviation = self._predicted((name, rung), rows, values - at_rung)
                drawn = result.val_loss + mean + deviation * noise.standard_normal(SAMPLES)
            else:
                rows = self._rows(rungs, [*done, trial], 0)
                mean, deviation = self._predicted((name, 0), rows, values)
                drawn = mean + deviation * noise.standard_normal(SAMPLES)
            samples.append(sign * drawn)
            front.append(sign * np.array([e.values[name] for e in rungs.complete.values()]))
        return 1.0 - dominated_share(np.stack(samples, axis=1), np.stack(front, axis=1))

    def _predicted(
        self, key: tuple[str, int], rows: Sequence[Features], values: Array
    ) -> tuple[float, float]:
        """Return mean and deviation, noise included, of the last row; the others have `values`."""
        from moenas.predict.surrogate import Surrogate  # PyTorch and SciPy

        fitted = self._fitted.get(key)
        if fitted is None or len(values) >= REFIT * fitted[0]:
            encoder = Encoder(rows[:-1])
            process = Surrogate(encoder.encode(rows[:-1]), values)
            fitted = self._fitted[key] = len(values), encoder, process
        _, encoder, process = fitted
        process = process.given(encoder.encode(rows[:-1]), values)
        mean, deviation = process.predict(encoder.encode(rows[-1:]))
        return float(mean[0]), float(np.hypot(deviation[0], process.noise))

    def _rows(self, rungs: Rungs, trials: Sequence[int], rung: int) -> list[Features]:
        """Return the features of candidates, and their losses at the rungs up to one."""
        features_by_trial = []
        for trial in trials:
            at = {f"rung.{r}": rungs.results[r] for r in range(1, rung + 1) if r in rungs.results}
            losses = {name: rows[trial].val_loss for name, rows in at.items() if trial in rows}
            features_by_trial.append(self._of(rungs, trial) | losses)
        return features_by_trial

    def _of(self, rungs: Rungs, trial: int) -> Features:
        """Return the features of the architecture of a candidate."""
        if trial not in self._features:
            architecture = self._space.architecture(rungs.architectures[trial])
            self._features[trial] = features(architecture, Cost(**rungs.costs[trial]))
        return self._features[trial]


def dominated_share(samples: Array, known: Array) -> float:
    """Return the share of samples (S, M), all to be minimised, that a row of `known` dominates."""
    beaten = np.zeros(len(samples), dtype=np.bool_)
    for row in known:
        beaten |= np.all(row <= samples, axis=1) & np.any(row < samples, axis=1)
    return float(beaten.mean())
