"""The expected gain of hypervolume, against the hypervolume of sampled losses."""

from __future__ import annotations

import numpy as np
import pytest

from moenas.pareto import hypervolume
from moenas.search.improvement import expected_improvement


def sampled_gain(
    mean: float, deviation: float, known: np.ndarray, front: np.ndarray, reference: np.ndarray
) -> float:
    """The mean gain over quantiles of the loss, each by the hypervolume of the joined set."""
    directions = ["minimize"] * len(reference)
    quantiles = np.random.default_rng(0).normal(mean, deviation, 400)
    before = hypervolume(front, reference, directions) if len(front) else 0.0
    gains = []
    for loss in quantiles:
        point = np.concatenate([[loss], known])
        joined = np.concatenate([front, point[None]]) if len(front) else point[None]
        gains.append(hypervolume(joined, reference, directions) - before)
    return float(np.mean(gains))


@pytest.mark.parametrize("n_objectives", [2, 3, 4])
@pytest.mark.parametrize("n_front", [0, 1, 6])
def test_it_is_the_mean_gain_of_sampled_losses(n_objectives: int, n_front: int) -> None:
    draw = np.random.default_rng(n_objectives * 10 + n_front)
    front, reference = draw.random((n_front, n_objectives)), np.full(n_objectives, 1.1)
    known = draw.random((5, n_objectives - 1))
    mean, deviation = draw.random(5), np.array([0.02, 0.1, 0.3, 0.05, 0.2])
    expected = expected_improvement(mean, deviation, known, front, reference)
    for i in range(5):
        sampled = sampled_gain(mean[i], deviation[i], known[i], front, reference)
        assert expected[i] == pytest.approx(sampled, rel=0.15, abs=4e-3)


def test_without_deviation_it_is_the_gain() -> None:
    draw = np.random.default_rng(3)
    front, reference = draw.random((7, 3)), np.full(3, 1.2)
    points = draw.random((20, 3))
    gained = expected_improvement(points[:, 0], np.zeros(20), points[:, 1:], front, reference)
    directions = ["minimize"] * 3
    before = hypervolume(front, reference, directions)
    for point, gain in zip(points, gained, strict=True):
        after = hypervolume(np.concatenate([front, point[None]]), reference, directions)
        assert gain == pytest.approx(after - before, abs=1e-12)


def test_members_beyond_the_reference_count_nothing() -> None:
    reference = np.array([1.0, 1.0])
    far = np.array([[0.2, 3.0], [3.0, 0.1]])
    mean, deviation, known = np.array([0.5]), np.array([0.1]), np.array([[0.5]])
    alone = expected_improvement(mean, deviation, known, np.empty((0, 2)), reference)
    assert expected_improvement(mean, deviation, known, far, reference) == pytest.approx(alone)
    assert alone[0] == pytest.approx(0.25, abs=1e-4)


def test_a_candidate_beyond_the_reference_gains_nothing() -> None:
    gained = expected_improvement(
        np.array([0.1]), np.array([0.1]), np.array([[2.0]]), np.array([[0.5, 0.5]]), np.ones(2)
    )
    assert gained[0] == 0.0


@pytest.mark.parametrize("n_objectives", [3, 4])
def test_dominated_rows_change_nothing_and_take_no_memory(n_objectives: int) -> None:
    draw = np.random.default_rng(5)
    front, reference = draw.random((5, n_objectives)), np.full(n_objectives, 4.0)
    dominated = front[draw.integers(0, 5, 1500)] + draw.random((1500, n_objectives))
    points = draw.random((8, n_objectives))
    arguments = points[:, 0], np.full(8, 0.1), points[:, 1:]
    alone = expected_improvement(*arguments, front, reference)
    joined = expected_improvement(*arguments, np.concatenate([dominated, front]), reference)
    assert joined == pytest.approx(alone)


def test_a_large_front_is_thinned_to_an_upper_bound() -> None:
    draw = np.random.default_rng(6)
    directions = draw.random((400, 4)) + 0.01
    front = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    points = 0.9 * front[:20]
    gained = expected_improvement(
        points[:, 0], np.full(20, 1e-6), points[:, 1:], front, np.full(4, 1.1)
    )
    assert np.isfinite(gained).all()
    assert (gained > 0).all()
