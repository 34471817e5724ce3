"""Effects of levels: against made-up truths and a hand-written two-sample comparison."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moenas.predict.level_effects import hole_effects, level_effects, named_levels
from moenas.records import Evaluation


def test_two_levels_of_one_size_are_the_t_test() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(1.0, 0.1, 12), rng.normal(1.5, 0.1, 12)])
    levels = ["a"] * 12 + ["b"] * 12
    first, second = level_effects(values, np.full(24, 64.0), levels)
    test = stats.ttest_ind(values[:12], values[12:])
    low, high = test.confidence_interval(0.95)
    difference = values[:12].mean() - values[12:].mean()
    assert first.effect - second.effect == pytest.approx(difference)
    assert first.half_width == pytest.approx((high - low) / 2 / 2)
    assert (first.level, first.n, second.n) == ("a", 12, 12)


def test_an_effect_of_size_is_not_one_of_the_level() -> None:
    rng = np.random.default_rng(1)
    sizes = 2.0 ** rng.uniform(10, 20, 200)
    large = np.log2(sizes) + rng.normal(0, 2, 200) > 15  # large models mostly have this level
    values = 5 - 0.1 * np.log2(sizes) + 0.02 * large + rng.normal(0, 0.001, 200)
    effects = {e.level: e for e in level_effects(values, sizes, [str(x) for x in large])}
    assert effects["True"].effect - effects["False"].effect == pytest.approx(0.02, abs=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        sizes = 2.0 ** rng.uniform(10, 20, 30)
        levels = [str(level) for level in np.arange(30) % 3]
        values = -0.1 * np.log2(sizes) + np.arange(30) % 3 + rng.normal(0, 0.3, 30)
        effect = level_effects(values, sizes, levels)[0]
        assert effect.half_width is not None
        held += abs(effect.effect - -1.0) <= effect.half_width
    assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_weighted_effects_add_up_to_nothing() -> None:
    rng = np.random.default_rng(2)
    effects = level_effects(rng.normal(size=9), 2.0 ** rng.uniform(5, 9, 9), list("aabbbbccc"))
    assert sum(e.n * e.effect for e in effects) == pytest.approx(0, abs=1e-12)


def test_too_few_candidates_have_no_interval() -> None:
    effects = level_effects(np.array([1.0, 2.0]), np.array([8.0, 8.0]), ["a", "b"])
    assert [e.half_width for e in effects] == [None, None]


def test_a_level_that_decides_the_size_does_not_fail() -> None:
    values = np.array([1.0, 1.1, 2.0, 2.1, 0.9, 2.2])
    sizes = np.array([8.0, 8.0, 16.0, 16.0, 8.0, 16.0])
    assert len(level_effects(values, sizes, ["a", "a", "b", "b", "a", "b"])) == 2


def test_levels_of_numbers_are_ranges_with_equal_counts() -> None:
    assert named_levels([1, 2, 4, 2]) == ["1", "2", "4", "2"]
    assert named_levels(["x", 3, None]) == ["x", "3", "None"]
    levels = named_levels(list(range(100)))
    assert len(set(levels)) == 5
    assert [levels.count(level) for level in dict.fromkeys(levels)] == [20] * 5
    assert list(dict.fromkeys(levels)) == [
        "0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99"
    ]  # fmt: skip


def test_ranges_have_no_value_in_common() -> None:
    numbers = [5, 5, 5, 5, 6, 6, 7, 8, 9, 9, 10, 10]
    levels = named_levels(numbers)
    by_number = {number: {x for n, x in zip(numbers, levels, strict=True) if n == number}
                 for number in numbers}  # fmt: skip
    assert all(len(of_number) == 1 for of_number in by_number.values())
    assert levels[0] == "5"
    assert levels[-1] == "9 to 10"


def test_an_objective_of_one_value_has_no_effects() -> None:
    """Rounding alone would give effects of 1e-15 whose intervals leave out 0."""
    rows = [
        (Evaluation("s", i, 1, "complete", "", values={"x": 0.3}, cost={"active_params": 9 + i}),
         {"hole": i % 2})
        for i in range(20)
    ]  # fmt: skip
    assert hole_effects(rows, "x") == []


def test_ranges_of_near_numbers_have_names_of_their_own() -> None:
    for numbers in ([1_000_000 + i for i in range(40)], [1 + i * 1e-7 for i in range(40)]):
        names = set(named_levels(numbers))
        ends = [end for name in names for end in name.split(" to ")]
        assert len(names) > 2
        assert len(ends) == len(set(ends)) == 2 * len(names)
