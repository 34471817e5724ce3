"""Regularised evolution: young parents, feasible children, and the same proposals after a restart."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from moenas.pareto import hypervolume
from moenas.search.evolution import POPULATION, Evolution, crowding, ranking
from moenas.search.neighbours import Point, point
from moenas.space.space import Space

START = datetime(2026, 1, 1)
TINY = ["objectives=[val_loss, flops_per_token]"]


def trial(space: Space, number: int, params: dict, *, state=TrialState.COMPLETE) -> FrozenTrial:
    drawn = point(space, 0, params)
    assert drawn is not None
    made = create_trial(
        state=state,
        params=params,
        distributions={name: CategoricalDistribution([value]) for name, value in params.items()},
        values=losses(space, drawn) if state == TrialState.COMPLETE else None,
    )
    made.number = number
    made.datetime_complete = START + timedelta(seconds=number)
    return made


def losses(space: Space, drawn: Point) -> list[float]:
    """Made up: experts and width lower the loss, and cost operations."""
    cost = space.cost(drawn.architecture)
    layers = drawn.architecture.names()
    experts = float(np.mean([layer["block.ffn"] == "moe" for layer in layers]))
    return [4 - 0.1 * math.log2(cost.params) - 0.3 * experts, float(cost.flops_per_token)]


def searched(space: Space, n_trials: int, breaks: tuple[int, ...] = ()) -> list[FrozenTrial]:
    asked, trials = Evolution(space), list[FrozenTrial]()
    for number in range(n_trials):
        if number in breaks:
            asked = Evolution(space)
        params = asked.propose(number, trials)
        assert params is not None
        trials.append(trial(space, number, params))
    return trials


def test_it_finds_more_than_random_draws() -> None:
    space = Space.load("tiny", TINY)
    trials = searched(space, 100)
    drawn = [p for seed in range(400) if (p := point(space, seed)) is not None][:100]
    volumes = [
        hypervolume(values, [4.0, 3e6], ["minimize"] * 2)
        for values in ([t.values for t in trials], [losses(space, p) for p in drawn])
    ]
    assert volumes[0] > volumes[1]


def test_a_restart_changes_no_proposal_and_a_seed_all() -> None:
    space = Space.load("tiny", TINY)
    whole = [t.params for t in searched(space, POPULATION + 12)]
    parts = [t.params for t in searched(space, POPULATION + 12, (5, POPULATION + 3))]
    assert parts == whole
    other = Space.load("tiny", [*TINY, "search.seed=1"])
    assert [t.params for t in searched(other, POPULATION + 12)] != whole


def test_no_architecture_is_proposed_twice_and_all_are_feasible() -> None:
    space = Space.load("tiny", [*TINY, "require=[active_params < 400_000]"])
    points = [point(space, 0, t.params) for t in searched(space, POPULATION + 30)]
    assert all(one is not None for one in points), "a proposal breaks the requirement"
    assert len({one.architecture.fingerprint for one in points if one}) == len(points)


def test_a_child_differs_from_a_young_parent_in_one_hole_and_what_depends_on_it() -> None:
    space = Space.load("tiny", TINY)
    trials = searched(space, 2 * POPULATION)
    params = Evolution(space).propose(len(trials), trials)
    assert params is not None
    alive = [t.params for t in trials[-POPULATION:]]
    shared = [sum(params[n] != p[n] for n in params.keys() & p.keys()) for p in alive]
    assert min(shared) == 1


def test_the_oldest_die_though_they_are_the_best() -> None:
    space = Space.load("tiny", TINY)
    trials = searched(space, 2 * POPULATION)
    for old in trials[:POPULATION]:
        old.values = [-100.0, 1.0]
    before = Evolution(space).propose(len(trials), trials)
    for old in trials[:POPULATION]:
        old.values = [100.0, 1e12]
    assert Evolution(space).propose(len(trials), trials) == before


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.FAIL])
def test_what_runs_or_failed_is_not_proposed_again(state: TrialState) -> None:
    space = Space.load("tiny", TINY)
    trials = searched(space, POPULATION)
    first = Evolution(space).propose(POPULATION, trials)
    assert first is not None
    # The number decides the random draws, so only the state of the other trial differs.
    running = trial(space, POPULATION + 1, first, state=state)
    assert Evolution(space).propose(POPULATION, [*trials, running]) not in (first, None)


def test_ranks_come_before_crowding() -> None:
    points = np.array([[0.0, 9.0], [1.0, 8.9], [9.0, 0.0], [5.0, 5.0], [6.0, 6.0], [5.5, 9.0]])
    # By hand: rows 0 to 3 are the front, its ends first; 4 is behind 3, and 5 behind 1 and 3.
    assert ranking(points) == [0, 3, 1, 2, 4, 5]


def test_crowding_is_that_of_the_definition() -> None:
    points = np.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0], [4.0, 0.0]])
    inf = math.inf
    assert crowding(points).tolist() == [inf, 3 / 4 + 3 / 4, 3 / 4 + 2 / 4, inf]
    assert crowding(np.ones((3, 2))).tolist() == [inf, 0.0, inf]
