"""The noise between seeds, against scipy's tests and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moenas.predict.seed_noise import SeedNoise, seed_noise

LOSS = {"loss": "minimize"}


def noise_of(groups: list[list[float]]) -> SeedNoise:
    values = {i: {"loss": group[0]} for i, group in enumerate(groups)}
    more = {i: [{"loss": x} for x in group[1:]] for i, group in enumerate(groups)}
    noise = seed_noise(values, more, ["loss"])
    assert noise is not None
    return noise


def test_the_deviation_is_that_of_an_analysis_of_variance() -> None:
    """F of a one-way layout is the mean square between groups over the pooled variance."""
    rng = np.random.default_rng(0)
    groups = [list(rng.normal(i, 0.3, 4)) for i in range(5)]
    noise = noise_of(groups).objectives["loss"]
    assert noise.degrees == 15
    means = np.array([np.mean(group) for group in groups])
    between = 4 * means.var(ddof=1)
    f = stats.f_oneway(*groups).statistic
    assert noise.deviation**2 == pytest.approx(between / f)


def test_the_noise_of_a_difference_is_that_of_a_t_test() -> None:
    a, b = [1.0, 1.3, 0.9], [1.2, 1.5, 1.1, 1.4]
    noise = noise_of([a, b])
    interval = stats.ttest_ind(a, b).confidence_interval(0.95)
    width = noise.objectives["loss"].half_width(3, 4)
    assert width == pytest.approx((interval.high - interval.low) / 2)
    alone = noise_of([a]).objectives["loss"].half_width(3)
    low, high = stats.t.interval(0.95, 2, np.mean(a), stats.sem(a))
    assert alone == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.4])
def test_the_probability_of_two_is_that_of_students_t(gap: float) -> None:
    """P(mean of a < mean of b) is the t distribution at the difference over its error."""
    a = [1.0, 1.2, 0.9]
    b = [x + gap for x in (0.95, 1.15, 1.0)]
    estimate = noise_of([a, b])
    noise = estimate.objectives["loss"]
    error = noise.deviation * math.sqrt(1 / 2 + 1 / 2)
    wanted = stats.t.cdf(
        (estimate.means[1]["loss"] - estimate.means[0]["loss"]) / error, noise.degrees
    )
    chance = estimate.probabilities([0, 1], LOSS)
    assert chance[0] == pytest.approx(wanted, abs=0.03)
    assert chance[0] + chance[1] == pytest.approx(1.0)
    turned = estimate.probabilities([0, 1], {"loss": "maximize"})
    assert turned[0] == pytest.approx(1 - wanted, abs=0.03)


def test_a_trial_of_one_seed_is_less_certain() -> None:
    """Replicates of one model give the noise; the other one has it without the root of two."""
    estimate = seed_noise(
        {0: {"loss": 1.0}, 1: {"loss": 1.2}}, {0: [{"loss": 1.1}, {"loss": 0.9}]}, ["loss"]
    )
    assert estimate is not None
    noise = estimate.objectives["loss"]
    error = noise.deviation * math.sqrt(1 / 2 + 1)
    wanted = stats.t.cdf(0.2 / error, 2)
    assert estimate.probabilities([0], LOSS)[0] == pytest.approx(wanted, abs=0.03)


def test_a_cost_has_no_noise_and_decides_alone() -> None:
    values = {i: {"loss": 1.0, "flops": float(i)} for i in range(3)}
    more = {i: [{"loss": 1.0 + j / 100, "flops": float(i)} for j in (1, 2)] for i in range(3)}
    noise = seed_noise(values, more, ["loss", "flops"])
    assert noise is not None
    assert not noise.is_noisy("flops")
    assert noise.objectives["flops"].half_width(3) == 0.0
    chance = noise.probabilities([0, 1, 2], {"loss": "minimize", "flops": "minimize"})
    assert chance[0] == 1.0, "nothing is cheaper"
    assert chance[1] == pytest.approx(1 / 2, abs=0.03), "its loss is below that of one other"
    assert chance[2] == pytest.approx(1 / 3, abs=0.03)


def test_trials_that_are_far_away_change_nothing() -> None:
    near = {0: {"loss": 1.0, "flops": 5.0}}
    far = {i: {"loss": 90.0, "flops": 1.0} for i in range(1, 40)}
    more = {0: [{"loss": 1.1, "flops": 5.0}, {"loss": 0.9, "flops": 5.0}]}
    directions = {"loss": "minimize", "flops": "minimize"}
    noise = seed_noise(near | far, more, list(directions))
    assert noise is not None
    assert noise.probabilities([0], directions) == {0: 1.0}


def test_without_replicates_nothing_is_known() -> None:
    assert seed_noise({0: {"loss": 1.0}, 1: {"loss": 2.0}}, {}, ["loss"]) is None


def test_equal_values_of_all_seeds_have_no_noise_and_no_rounding() -> None:
    values = {i: {"share": 0.1 + i / 7, "flops": 1.0} for i in range(20)}
    noise = seed_noise(values, {i: [row, row] for i, row in values.items()}, ["share", "flops"])
    assert noise is not None
    assert not noise.is_noisy("share")
    assert noise.means == values


def test_with_few_degrees_of_freedom_far_trials_count_too() -> None:
    values = {0: {"loss": 1.0}, 1: {"loss": 1.0 - 12 * 0.1}}
    noise = seed_noise(values, {0: [{"loss": 1.0 + 0.1 * 2**0.5}]}, ["loss"])
    assert noise is not None
    assert noise.probabilities([0], {"loss": "minimize"})[0] > 0.0


@pytest.mark.parametrize(("further", "is_biased"), [(1, True), (2, False), (4, False)])
def test_two_further_seeds_make_the_mean_of_a_selected_trial_unbiased(
    further: int, is_biased: bool
) -> None:
    """The best of 20 equal models is about 1.87 deviations too good, the mean of two half as much."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(400):
        losses = rng.normal(3.0, 0.1, 20)
        best = int(losses.argmin())
        more = [{"loss": float(x)} for x in rng.normal(3.0, 0.1, further)]
        noise = seed_noise({best: {"loss": float(losses[best])}}, {best: more}, ["loss"])
        assert noise is not None
        assert noise.seeds[best] == 1 + further
        assert noise.mean_seeds[best] == (2 if further == 1 else further)
        means.append(noise.means[best]["loss"])
    error = np.mean(means) - 3.0
    if is_biased:
        assert error == pytest.approx(
            -0.1 * stats.norm.expect(lambda x: 20 * x * stats.norm.cdf(x) ** 19) / 2, abs=0.01
        )
    else:
        assert abs(error) < 3 * np.std(means) / math.sqrt(len(means))
