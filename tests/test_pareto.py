"""The front against brute force, against counted unit cells and against Optuna."""

from __future__ import annotations

import itertools
import time

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from moenas import pareto
from moenas.errors import InputError
from moenas.pareto import (
    compare,
    dominates,
    history,
    hypervolume,
    is_exact,
    knee,
    non_dominated,
    reference_point,
)

DIRECTIONS = ("minimize", "maximize")


@st.composite
def grids(draw, most_objectives=4, most_points=12, side=4):
    """Points on a small integer grid, so that ties and duplicates abound, with directions."""
    m = draw(st.integers(1, most_objectives))
    row = st.lists(st.integers(0, side - 1), min_size=m, max_size=m)
    points = draw(st.lists(row, min_size=1, max_size=most_points))
    return points, draw(st.lists(st.sampled_from(DIRECTIONS), min_size=m, max_size=m))


def better_or_equal(a, b, direction):
    return a <= b if direction == "minimize" else a >= b


def brute_dominates(a, b, directions):
    pairs = list(zip(a, b, directions, strict=True))
    return all(better_or_equal(*pair) for pair in pairs) and tuple(a) != tuple(b)


@given(grids())
def test_mask_and_dominance_match_brute_force(case):
    points, directions = case
    mask = non_dominated(points, directions)
    for i, point in enumerate(points):
        beaten = [brute_dominates(other, point, directions) for other in points]
        assert mask[i] == (not any(beaten))
        assert [dominates(other, point, directions) for other in points] == beaten


@given(grids(most_objectives=5, most_points=8, side=3))
def test_hypervolume_counts_the_unit_cells_of_a_grid(case):
    points, directions = case
    side = 3
    reference = [side if d == "minimize" else -1 for d in directions]
    losses = np.array(points) * [1 if d == "minimize" else -1 for d in directions]
    low = [0 if d == "minimize" else -(side - 1) for d in directions]
    cells = itertools.product(*(range(start, start + side) for start in low))
    counted = sum(bool((losses <= np.array(cell)).all(axis=1).any()) for cell in cells)
    assert hypervolume(points, reference, directions) == pytest.approx(counted)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_hypervolume_is_that_of_optuna(objectives, points, seed):
    losses = np.random.default_rng(seed).uniform(size=(points, objectives))
    reference = np.full(objectives, 1.1)
    expected = compute_hypervolume(losses, reference)
    minimised = hypervolume(losses, list(reference), ["minimize"] * objectives)
    maximised = hypervolume(-losses, list(-reference), ["maximize"] * objectives)
    assert minimised == pytest.approx(expected, rel=1e-9 if is_exact(objectives) else 0.2)
    assert maximised == minimised


@settings(deadline=None, max_examples=30)
@given(grids(most_objectives=3))
def test_mask_is_that_of_optunas_best_trials(case):
    points, directions = case
    study = optuna.create_study(directions=directions)
    study.add_trials([optuna.create_trial(values=[float(v) for v in p]) for p in points])
    expected = {trial.number for trial in study.best_trials}
    assert set(np.flatnonzero(non_dominated(points, directions))) == expected


def test_equal_points_both_stay():
    assert non_dominated([[1, 2], [1, 2], [2, 2]], ["minimize"] * 2).tolist() == [True, True, False]


def test_points_outside_the_reference_add_no_volume():
    directions = ["minimize", "maximize"]
    inside = hypervolume([[1, 3]], [2, 2], directions)
    assert inside == 1.0
    assert hypervolume([[1, 3], [0, 2], [3, 9], [-5, 1]], [2, 2], directions) == inside
    assert hypervolume([], [2, 2], directions) == 0.0


def test_reference_point_is_the_worst_and_a_tenth_of_the_range():
    values = [[1.0, 10.0, 5.0, 0.0], [3.0, 20.0, 5.0, 0.0]]
    directions = ["minimize", "maximize", "minimize", "minimize"]
    assert reference_point(values, directions) == pytest.approx([3.2, 9.0, 5.5, 1.0])


@given(grids())
def test_every_point_lies_strictly_inside_the_reference_point(case):
    points, directions = case
    reference = reference_point(points, directions)
    for point in points:
        for value, corner, direction in zip(point, reference, directions, strict=True):
            assert value < corner if direction == "minimize" else value > corner


def test_knee_is_the_bulge_and_ignores_units_and_dominated_points():
    values = np.array([[0.0, 1.0], [0.2, 0.2], [1.0, 0.0], [0.6, 0.15], [0.3, 0.3]])
    assert knee(values, ["minimize", "minimize"]) == 1
    assert knee(values * [1e6, -1e-3], ["minimize", "maximize"]) == 1
    assert knee([[4.0, 4.0]], ["minimize", "minimize"]) == 0


@given(grids(most_objectives=3, most_points=10))
def test_history_is_the_front_of_each_prefix(case):
    points, directions = case
    reference = reference_point(points, directions)
    trials = [10 * i for i in range(len(points))]
    steps = history(points, directions, reference, trials)
    before: set[int] = set()
    for i, step in enumerate(steps):
        prefix = points[: i + 1]
        after = {trials[j] for j in np.flatnonzero(non_dominated(prefix, directions))}
        assert step.trial == trials[i]
        assert step.entered == (trials[i] in after)
        assert set(step.left) == before - after
        assert step.size == len(after)
        assert step.hypervolume == pytest.approx(hypervolume(prefix, reference, directions))
        before = after


@given(grids(most_points=6), st.integers(0, 5))
def test_compare_covers_by_zitzlers_definition(case, cut):
    points, directions = case
    a, b = points[: cut + 1], points[cut:] or points
    result = compare(a, b, directions)
    front_b = [p for p, on in zip(b, non_dominated(b, directions), strict=True) if on]
    covered = [
        any(tuple(p) == tuple(q) or brute_dominates(p, q, directions) for p in a) for q in front_b
    ]
    assert result.coverage_ab == pytest.approx(sum(covered) / len(covered))
    assert result.reference == reference_point(a + b, directions)
    assert result.difference == pytest.approx(
        hypervolume(a, result.reference, directions) - hypervolume(b, result.reference, directions)
    )
    turned = compare(b, a, directions)
    assert (turned.coverage_ba, turned.difference) == (result.coverage_ab, -result.difference)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    directions = ["minimize", "minimize"]
    values = [[1.0, 2.0], [bad, 0.0]]
    with pytest.raises(InputError, match="row 1, objective 0"):
        non_dominated(values, directions)
    with pytest.raises(InputError, match="finite"):
        hypervolume([[1.0, 2.0]], [bad, 3.0], directions)
    with pytest.raises(InputError, match="finite"):
        history(values, directions, [9.0, 9.0], [0, 1])


def test_wrong_shapes_directions_and_emptiness_are_refused():
    with pytest.raises(InputError, match="2 objectives"):
        non_dominated([[1.0, 2.0, 3.0]], ["minimize", "minimize"])
    with pytest.raises(InputError, match="'min' is neither"):
        non_dominated([[1.0]], ["min"])
    with pytest.raises(InputError, match="at least one objective"):
        non_dominated([[]], [])
    with pytest.raises(InputError, match="no points"):
        knee([], ["minimize"])
    with pytest.raises(InputError, match="no points"):
        reference_point([], ["minimize"])
    with pytest.raises(InputError, match="empty"):
        compare([[1.0]], [], ["minimize"])


# --- bounds ----------------------------------------------------------------------------------------


def sphere(n, objectives, seed=0):
    """Points of which none dominates another."""
    drawn = np.abs(np.random.default_rng(seed).normal(size=(n, objectives)))
    return 1 - drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.parametrize(("objectives", "points"), [(6, 200), (7, 60), (8, 40), (10, 20)])
def test_an_approximate_hypervolume_is_near_the_exact_one(objectives, points):
    import moocore

    losses, directions = sphere(points, objectives), ["minimize"] * objectives
    corner = [1.1] * objectives
    exact = moocore.hypervolume(losses, ref=np.array(corner))
    assert not is_exact(objectives)
    assert hypervolume(losses, corner, directions) == pytest.approx(exact, rel=0.1)
    volumes = [p.hypervolume for p in history(losses, directions, corner, range(points))]
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(exact, rel=0.1)
    last = pareto.hypervolume_improvement(losses[:-1], losses[-1], corner, directions)
    assert volumes[-2] + last == pytest.approx(volumes[-1])


def test_ten_objectives_and_hundreds_of_points_take_no_minutes():
    losses, directions, corner = sphere(600, 10), ["minimize"] * 10, [1.1] * 10
    began = time.process_time()
    pareto.hypervolume_improvement(losses[:-1], losses[-1], corner, directions)
    history(losses, directions, corner, range(600))
    assert time.process_time() - began < 20.0


BIG = [1e150, -1e150, 1.7e308, -1.7e308, 0.0, 5e-324, 1e300]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 7))
def test_no_finite_value_gives_a_number_that_is_not_finite(data, objectives):
    value = st.one_of(st.sampled_from(BIG), st.floats(allow_nan=False, allow_infinity=False))
    point = st.lists(value, min_size=objectives, max_size=objectives)
    points = data.draw(st.lists(point, min_size=1, max_size=5))
    directions = data.draw(
        st.lists(
            st.sampled_from(["minimize", "maximize"]), min_size=objectives, max_size=objectives
        )
    )
    corner = reference_point(points, directions)
    volumes = [p.hypervolume for p in history(points, directions, corner, range(len(points)))]
    volumes += [*corner, hypervolume(points, corner, directions)]
    volumes.append(pareto.hypervolume_improvement(points[:-1], points[-1], corner, directions))
    assert np.isfinite(volumes).all()
    assert volumes[: len(points)] == sorted(volumes[: len(points)])


def test_a_value_that_cannot_be_used_is_explained():
    assert pareto.unusable({"a": 1e150, "b": -3.0}) is None
    assert "'b' is nan; a value must be finite" in pareto.unusable({"a": 1.0, "b": float("nan")})
    assert "choose a larger unit" in pareto.unusable({"a": -1.1e150})
