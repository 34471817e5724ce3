"""Who trains on at a rung: fronts, diversity, the limit of paused candidates, and the guard."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from moenas import pareto
from moenas.records import Evaluation, RungResult
from moenas.search.halving import Halving, ordered, widened
from moenas.search.rungs import Rungs
from moenas.space.early_stopping import SuccessiveHalving

MINIMIZED = {"flops_per_token": "minimize"}


def rungs_of(
    losses: dict[int, float], flops: dict[int, float] | None = None, rung: int = 1
) -> Rungs:
    rungs = Rungs()
    for trial, loss in losses.items():
        known = {} if flops is None else {"flops_per_token": flops[trial]}
        rungs.add(RungResult(trial, rung, 100, loss, known), {}, {"flops_per_token": trial})
    return rungs


def ends(rungs: Rungs, losses: dict[int, float]) -> None:
    for trial, loss in losses.items():
        evaluation = Evaluation("s", trial, 1, "complete", "", metrics={"val_loss": loss})
        rungs.complete[trial] = evaluation


def by_hand(points: list[tuple[float, float]]) -> list[int]:
    """Non-dominated sorting and an epsilon-net, from their definitions."""

    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    spans = [max(p[i] for p in points) - min(p[i] for p in points) or 1.0 for i in (0, 1)]

    def distance(a: int, b: int) -> float:
        return math.hypot(*((points[a][i] - points[b][i]) / spans[i] for i in (0, 1)))

    left, fronts = list(range(len(points))), []
    while left:
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        left = [i for i in left if i not in front]
        chosen = [min(front, key=lambda i: points[i][0])]
        while len(chosen) < len(front):
            rest = [i for i in front if i not in chosen]
            nearest = {i: min(distance(i, j) for j in chosen) for i in rest}
            chosen.append(max(rest, key=lambda i: nearest[i]))
        fronts += chosen
    return fronts


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_fronts_and_an_epsilon_net(seed: int) -> None:
    draw = random.Random(seed)
    points = [(draw.random(), draw.random()) for _ in range(40)]
    assert ordered(np.array(points)) == by_hand(points)


def test_with_one_column_the_order_is_that_of_losses() -> None:
    losses = np.array([[3.0], [1.0], [2.0], [1.0]])
    assert ordered(losses) == [1, 3, 2, 0]  # equal losses keep the order of trials


def test_small_models_train_on_beside_large_ones() -> None:
    """By the loss alone, the three largest models would."""
    losses = {t: 3.0 - 0.1 * t for t in range(9)}
    flops = {t: float(2**t) for t in range(9)}
    rule = Halving(SuccessiveHalving(min_correlation=0.0), MINIMIZED)
    promoted, rungs = set(), rungs_of(losses, flops)
    paused = dict.fromkeys(losses, 1)
    while (trial := rule.promotable(rungs, paused)) is not None:
        del paused[trial]
        promoted.add(trial)
    assert len(promoted) == 3
    assert {0, 8} <= promoted
    alone = Halving(SuccessiveHalving(min_correlation=0.0), {})
    assert alone.order(rungs, 1)[:3] == [8, 7, 6]


def test_exact_flops_stand_for_what_is_not_known_at_a_rung() -> None:
    rungs = rungs_of({t: 3.0 - 0.1 * t for t in range(9)})
    rule = Halving(SuccessiveHalving(min_correlation=0.0), {}, stand_in=True)
    assert set(rule.order(rungs, 1)[:2]) == {0, 8}


def test_the_highest_rung_is_served_first_and_nobody_twice() -> None:
    rungs = rungs_of({t: float(t) for t in range(9)})
    for trial in range(3):
        rungs.add(RungResult(trial, 2, 200, float(trial)), {}, {})
    rule = Halving(SuccessiveHalving(min_correlation=0.0), {})
    assert rule.promotable(rungs, {0: 2, 1: 2, 2: 2, 3: 1}) == 0
    assert rule.promotable(rungs, {1: 2, 2: 2, 3: 1}) is None
    assert rule.promotable(rungs, {1: 2, 2: 2, 3: 1}, at_end=True) is None  # 0 has trained on
    rungs.add(RungResult(3, 2, 200, 3.0), {}, {})
    assert rule.promotable(rungs, {1: 2, 2: 2, 3: 2}, at_end=True) == 1  # two of four, rounded up
    two = rungs_of({0: 1.0, 1: 2.0})
    assert rule.promotable(two, {0: 1, 1: 1}) is None
    assert rule.promotable(two, {0: 1, 1: 1}, at_end=True) == 0


def test_what_waits_beyond_the_limit_is_stopped_worst_first() -> None:
    rungs = rungs_of({t: float(t) for t in range(6)})
    rungs.add(RungResult(5, 2, 200, 9.0), {}, {})
    rule = Halving(SuccessiveHalving(max_paused=3), {})
    paused = {0: 1, 1: 1, 2: 1, 3: 1, 5: 2}
    assert rule.hopeless(rungs, paused) == [3, 2]
    assert rule.hopeless(rungs, {0: 1, 5: 2}) == []


def test_a_value_of_an_exchanged_objective_takes_no_part() -> None:
    rungs = rungs_of({0: 1.0, 1: 2.0}, {0: 1.0, 1: 1.0})
    rungs.add(RungResult(2, 1, 100, 0.5), {}, {})
    assert Halving(SuccessiveHalving(), MINIMIZED).order(rungs, 1) == [0, 1]


@pytest.mark.parametrize(
    ("order", "factor", "n_promoted"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 3.0, 4),  # the same ranks at the end
        ([7, 6, 5, 4, 3, 2, 1, 0], 1.0, 12),  # the opposite: everyone trains on
        ([0, 2, 4, 6, 1, 3, 5, 7], 3.0, 4),
        ([2, 5, 0, 6, 3, 7, 1, 4], 1 + 2 * (1 / 7) / 0.5, 7),
    ],
)
def test_the_cut_widens_where_ranks_agree_badly(
    order: list[int], factor: float, n_promoted: int
) -> None:
    from scipy.stats import spearmanr

    losses = {t: float(t) for t in range(12)}
    rungs = rungs_of(losses)
    ends(rungs, {t: float(order[t]) for t in range(8)})
    agreement = rungs.agreements()[1]
    expected = float(spearmanr(range(8), order).statistic)
    assert agreement.correlation == pytest.approx(expected)
    settings = SuccessiveHalving()
    assert widened(settings, agreement) == pytest.approx(factor, abs=0.02)
    assert widened(SuccessiveHalving(min_correlation=0.0), agreement) == 3.0
    rule, paused = Halving(settings, {}), dict.fromkeys(losses, 1)
    while (trial := rule.promotable(rungs, paused)) is not None:
        del paused[trial]
    assert len(losses) - len(paused) == n_promoted
    ends(rungs, {})
    del rungs.complete[7]
    assert widened(settings, rungs.agreements()[1]) == 3.0  # seven pairs are too few


def test_promotion_follows_pareto_ranks() -> None:
    """No candidate trains on before one that dominates it."""
    draw = random.Random(1)
    losses = {t: draw.random() for t in range(30)}
    flops = {t: draw.random() for t in range(30)}
    order = Halving(SuccessiveHalving(), MINIMIZED).order(rungs_of(losses, flops), 1)
    point: Any = {t: [losses[t], flops[t]] for t in losses}
    for first, second in itertools.combinations(order, 2):
        assert not pareto.dominates(point[second], point[first], ["minimize"] * 2)
