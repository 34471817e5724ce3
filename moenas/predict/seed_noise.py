"""Noise between seeds: intervals of values, and the probability that a trial is non-dominated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Values = Mapping[str, float]
"""Objective -> value."""
Numbers = np.ndarray[Any, np.dtype[Any]]

UNSELECTED = 2
"""Further seeds from which on a mean leaves out the seed that selected the trial."""
LEVEL = 0.95
"""Of the intervals."""
DRAWS, CHUNK = 4000, 250
"""Draws of the values of all trials, and how many are compared at a time."""
FAR = 10.0
"""Standard deviations beyond which a value counts as impossible."""
RARE = 1e-4
"""Probability of a larger true deviation than the one that FAR counts with."""


@dataclass(frozen=True)
class ObjectiveNoise:
    """How much one objective differs between seeds of one model."""

    deviation: float
    """Standard deviation between seeds, pooled over the models."""
    degrees: int
    """Degrees of freedom: seeds minus models."""

    @property
    def far(self) -> float:
        """Distance from a mean beyond which a value counts as impossible.

        With few degrees of freedom the true deviation may be many times the measured one.
        """
        from scipy.stats import chi2

        return (
            FAR * self.deviation * max(1.0, math.sqrt(self.degrees / chi2.ppf(RARE, self.degrees)))
        )

    def half_width(self, *seeds: int) -> float:
        """Return the half width of the 95 % interval of a mean over seeds.

        For two numbers of seeds, it is the half width of the difference of two means.
        """
        from scipy.stats import t

        spread = math.sqrt(sum(1 / count for count in seeds))
        return float(t.ppf((1 + LEVEL) / 2, self.degrees)) * self.deviation * spread


@dataclass(frozen=True)
class SeedNoise:
    """What the replicates of a study say of the values of its trials."""

    objectives: dict[str, ObjectiveNoise]
    means: dict[int, dict[str, float]]
    """Trial -> objective -> mean over the seeds that count; see `seed_noise`."""
    seeds: dict[int, int]
    """Trial -> seeds that it was trained with."""
    mean_seeds: dict[int, int]
    """Trial -> seeds in its mean."""

    def is_noisy(self, name: str) -> bool:
        """Whether an objective differs between seeds."""
        return self.objectives[name].deviation > 0

    def probabilities(
        self, trials: Sequence[int], directions: Mapping[str, str], seed: int = 0
    ) -> dict[int, float]:
        """Return trial -> probability that no other trial dominates it.

        All values are drawn together from their posterior. In each draw the variance of an
        objective is degrees * deviation^2 / chi-squared(degrees). The value of a trial is normal
        around its mean, with this variance over its number of seeds. That is the posterior of a
        one-way layout with equal variances under the prior 1 / variance (Gelman et al., Bayesian
        Data Analysis, 3rd ed., section 3.2).
        """
        names = list(directions)
        sign = np.array([1.0 if directions[name] == "minimize" else -1.0 for name in names])
        kept = self._near(trials, names, sign)
        mean = np.array([[self.means[i][name] for name in names] for i in kept]) * sign
        scale = 1 / np.sqrt(np.array([[self.mean_seeds[i]] for i in kept], dtype=float))
        places = [kept.index(trial) for trial in trials]
        rng, hits = np.random.default_rng(seed), np.zeros(len(trials))
        for _ in range(DRAWS // CHUNK):
            sigma = np.stack([self._sigma(name, rng) for name in names], axis=-1)
            noise = rng.standard_normal((CHUNK, *mean.shape)) * sigma[:, None, :] * scale
            drawn = mean + noise  # (draws, trials, objectives)
            for at, place in enumerate(places):
                own = drawn[:, place : place + 1]
                dominates = (drawn <= own).all(-1) & (drawn < own).any(-1)
                hits[at] += np.count_nonzero(~dominates.any(-1))
        return {trial: float(hit) / DRAWS for trial, hit in zip(trials, hits, strict=True)}

    def _sigma(self, name: str, rng: np.random.Generator) -> Numbers:
        noise = self.objectives[name]
        chi = rng.chisquare(noise.degrees, CHUNK)
        return noise.deviation * np.sqrt(noise.degrees / chi)

    def _near(self, trials: Sequence[int], names: Sequence[str], sign: Numbers) -> list[int]:
        """Return the trials, and all others that could dominate one of them."""
        reach = np.array([self.objectives[name].far for name in names])
        mean = {i: np.array([row[name] for name in names]) * sign for i, row in self.means.items()}
        worst = np.array([mean[trial] for trial in trials]) + reach
        own = set(trials)
        others = [
            i for i, at in mean.items() if i not in own and (at - reach <= worst).all(-1).any()
        ]
        return [*trials, *others]


def seed_noise(
    values: Mapping[int, Values],
    replicates: Mapping[int, Sequence[Values]],
    objectives: Sequence[str],
) -> SeedNoise | None:
    """Return the noise between seeds; None if no trial has a replicate.

    `values` come from the search, for every complete trial; `replicates` come from further seeds.
    The value of the search has selected the trial for the front, so it is too good on average. From
    UNSELECTED further seeds on, a mean is over the further seeds alone, which is unbiased. The
    deviation is pooled over all seeds, as degrees of freedom are few.
    """
    rows = {trial: [own, *replicates.get(trial, ())] for trial, own in values.items()}
    groups = [trial_values for trial_values in rows.values() if len(trial_values) > 1]
    if not groups:
        return None
    degrees = sum(len(trial_values) - 1 for trial_values in groups)
    noise = {}
    for name in objectives:
        squares = 0.0
        for trial_values in groups:
            numbers = np.array([row[name] for row in trial_values])
            if numbers.min() < numbers.max():  # the mean of equal numbers rounds
                squares += float(((numbers - numbers.mean()) ** 2).sum())
        noise[name] = ObjectiveNoise(math.sqrt(squares / degrees), degrees)
    counted = {
        trial: trial_values[1:] if len(trial_values) > UNSELECTED else trial_values
        for trial, trial_values in rows.items()
    }
    means = {
        trial: {name: _mean([row[name] for row in trial_values]) for name in objectives}
        for trial, trial_values in counted.items()
    }
    return SeedNoise(
        noise,
        means,
        seeds={trial: len(trial_values) for trial, trial_values in rows.items()},
        mean_seeds={trial: len(trial_values) for trial, trial_values in counted.items()},
    )


def _mean(numbers: Sequence[float]) -> float:
    """Return the mean; of equal numbers it is the number itself, without rounding."""
    if min(numbers) == max(numbers):
        return numbers[0]
    return math.fsum(numbers) / len(numbers)
