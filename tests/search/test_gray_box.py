"""The gray-box sampler on a made-up loss: it finds more than random draws, and goes on the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState, create_trial

from moenas.pareto import hypervolume
from moenas.records import Evaluation, RungResult
from moenas.search import gray_box
from moenas.search.gray_box import INITIAL, GrayBox
from moenas.search.neighbours import Point, point
from moenas.search.rungs import Rungs
from moenas.space.space import Space

OBJECTIVES = "objectives=[val_loss, flops_per_token]"


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gray_box, "DRAWN", 200)
    monkeypatch.setattr(gray_box, "MUTATIONS", 50)


def loss(space: Space, drawn: Point) -> float:
    """Made up: lower with more parameters and operations, and with experts; noise of 0.01."""
    cost, layers = space.cost(drawn.architecture), drawn.architecture.names()
    experts = np.mean([layer["block.ffn"] == "moe" for layer in layers])
    noise = random.Random(drawn.architecture.fingerprint).gauss(0, 0.01)
    sizes = 0.06 * np.log2(cost.flops_per_token / 3e5) + 0.02 * np.log2(cost.params / 2e5)
    return float(2.4 - sizes - 0.05 * experts + noise)


def trial(
    space: Space, number: int, drawn: Point, state: TrialState = TrialState.COMPLETE
) -> FrozenTrial:
    cost = space.cost(drawn.architecture)
    known = {"val_loss": loss(space, drawn), "decode_ms": 1e-6 * cost.flops_per_token}
    values = [known.get(o.name, o.exact_value(cost)) for o in space.objectives]
    fixed = optuna.distributions.CategoricalDistribution
    made = create_trial(
        state=state,
        params=drawn.params,
        distributions={name: fixed([value]) for name, value in drawn.params.items()},
        values=values if state == TrialState.COMPLETE else None,
    )
    made.number = number
    return made


def drawn(space: Space, draw: random.Random) -> Point:
    while (drawn := point(space, draw.getrandbits(48))) is None:
        pass
    return drawn


def searched(seed: int, n_trials: int, *, sampler: bool) -> list[FrozenTrial]:
    space = Space.load("tiny", [OBJECTIVES, f"search.seed={seed}"])
    asked, draw, trials = GrayBox(space), random.Random(seed), list[FrozenTrial]()
    for number in range(n_trials):
        params = asked.propose(number, trials) if sampler else None
        proposed = drawn(space, draw) if params is None else point(space, 0, params)
        assert proposed is not None
        trials.append(trial(space, number, proposed))
    return trials


def volume(trials: list[FrozenTrial]) -> float:
    return hypervolume([t.values for t in trials], [2.6, 3e6], ["minimize"] * 2)


def test_it_finds_in_10_proposals_what_random_draws_do_not_in_100() -> None:
    volumes = [volume(searched(seed, INITIAL + 10, sampler=True)) for seed in range(2)]
    assert min(volumes) > max(volume(searched(seed, 100, sampler=False)) for seed in range(2))


def test_the_same_trials_give_the_same_parameters_to_another_process() -> None:
    """What an object keeps from earlier proposals changes nothing: a resumed study has none of it."""
    trials = searched(0, INITIAL + 4, sampler=True)
    space = Space.load("tiny", [OBJECTIVES])
    for number in (1, INITIAL - 1, INITIAL, INITIAL + 3):
        assert GrayBox(space).propose(number, trials[:number]) == trials[number].params


def test_every_second_trial_is_random_before_there_is_something_to_learn_from() -> None:
    trials = searched(0, INITIAL - 2, sampler=False)
    space = Space.load("tiny", [OBJECTIVES])
    assert GrayBox(space).propose(0, []) is None
    assert GrayBox(space).propose(len(trials), trials) is None
    assert GrayBox(space).propose(len(trials) + 1, trials) is not None


def test_proposals_before_any_result_have_good_exact_objectives_and_differ() -> None:
    """All of them run at once, as with many workers."""
    space = Space.load("tiny", [OBJECTIVES])
    asked, running = GrayBox(space), list[FrozenTrial]()
    proposals = list[Point]()
    for number in range(1, 20, 2):
        proposed = point(space, 0, asked.propose(number, running))
        assert proposed is not None
        proposals.append(proposed)
        running.append(trial(space, number, proposed, TrialState.RUNNING))
    flops = [space.cost(p.architecture).flops_per_token for p in proposals]
    draw = random.Random(0)
    usual = [space.cost(drawn(space, draw).architecture).flops_per_token for _ in range(100)]
    assert np.mean(flops) < np.median(usual)
    features = asked._encoder.encode([asked._describe(p).features for p in proposals])
    assert (features.max(axis=0) > features.min(axis=0)).mean() > 0.9


@pytest.mark.parametrize("complete", [1, 3, INITIAL - 1])
def test_few_complete_trials_are_enough_for_a_proposal(complete: int) -> None:
    trials = searched(0, complete, sampler=False)
    space = Space.load("tiny", [OBJECTIVES])
    params = GrayBox(space).propose(complete, trials)
    assert params is not None
    assert params not in [t.params for t in trials]


def is_wide_mixture(drawn: Point) -> bool:
    """Half of the space, and made up to be the half that has no usable models."""
    architecture = drawn.architecture
    return architecture.d_model > 64 and "moe" in {
        name["block.ffn"] for name in architecture.names()
    }


def unusable(space: Space, number: int, one: Point, how: str) -> FrozenTrial:
    """A trial without a candidate for the front, though its values are better than all others."""
    if how == "broken after training":
        made = trial(space, number, one)
        made.values = [1.0, 1.0]
    else:
        made = trial(space, number, one, TrialState.FAIL if "fail" in how else TrialState.PRUNED)
    if "fail" in how:
        made.set_user_attr("failure", "environment" if "machine" in how else "out_of_memory")
    else:
        made.system_attrs["constraints:decode_ms < 1"] = 0.5
    return made


UNUSABLE = ("failed", "broken after training", "refused before training")


@pytest.mark.parametrize("how", [*UNUSABLE, "failed by the machine"])
def test_it_keeps_away_from_what_fails_or_breaks_requirements(how: str) -> None:
    space = Space.load("tiny", [OBJECTIVES])
    asked, draw, trials = GrayBox(space), random.Random(0), list[FrozenTrial]()
    proposed = list[bool]()
    for number in range(30):
        params = asked.propose(number, trials)
        one = drawn(space, draw) if params is None else point(space, 0, params)
        assert one is not None
        bad = is_wide_mixture(one)
        made = unusable(space, number, one, how) if bad else trial(space, number, one)
        trials.append(made)
        if number >= 20:
            proposed.append(bad)
    if how == "failed by the machine":  # that says nothing of the architecture
        assert sum(proposed) > 3
    else:
        assert sum(proposed) <= 1


@pytest.mark.parametrize("how", UNUSABLE)
def test_it_proposes_where_every_trial_was_unusable(how: str) -> None:
    space, draw = Space.load("tiny", [OBJECTIVES]), random.Random(0)
    trials = [unusable(space, number, drawn(space, draw), how) for number in range(25)]
    params = GrayBox(space).propose(25, trials)
    assert params is not None
    assert params not in [t.params for t in trials]
    probability = log_feasibility(space, trials)
    assert len(np.unique(probability)) > 0.9 * len(probability), "it tells the points apart"


def log_feasibility(space: Space, trials: Sequence[FrozenTrial]) -> NDArray[np.float64]:
    """The log probability of being feasible, of the trials themselves."""
    asked = GrayBox(space)
    points = [point(space, 0, t.params) for t in trials]
    described = [asked._describe(p) for p in points if p is not None]
    is_fit = [t.state == TrialState.COMPLETE and not t.constraints for t in trials]
    tried = list(zip(described, is_fit, strict=True))
    return asked._log_feasibility(tried, described)


def test_first_failures_after_many_good_trials_count_at_once() -> None:
    """The hyperparameters of the process are fitted to the earlier trials, which are all good."""
    space, draw = Space.load("tiny", [OBJECTIVES]), random.Random(0)
    good, bad = list[Point](), list[Point]()
    while len(good) < 99 or len(bad) < 2:
        one = drawn(space, draw)
        (bad if is_wide_mixture(one) else good).append(one)
    trials = [trial(space, number, one) for number, one in enumerate(good[:99])]
    trials += [unusable(space, 99 + i, one, "failed") for i, one in enumerate(bad[:2])]
    probability = np.exp(log_feasibility(space, trials))
    assert probability[99:].max() < 0.5 < np.quantile(probability[:99], 0.1)


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.FAIL])
def test_a_trial_that_runs_or_failed_is_not_proposed_again(state: TrialState) -> None:
    trials = searched(0, INITIAL, sampler=False)
    space = Space.load("tiny", [OBJECTIVES])
    first = GrayBox(space).propose(INITIAL, trials)
    drawn = point(space, 0, first)
    assert drawn is not None
    tried = trial(space, INITIAL, drawn, state)
    second = GrayBox(space).propose(INITIAL + 1, [*trials, tried])
    assert second is not None
    assert second != first


def with_stopped(space: Space) -> tuple[list[FrozenTrial], Rungs]:
    """Return complete trials, forty that were stopped, and a rung 0.5 nats above the end."""
    trials, rungs = list[FrozenTrial](), Rungs()
    for number in range(INITIAL + 40):
        one = drawn(space, random.Random(number))
        state = TrialState.COMPLETE if number < INITIAL else TrialState.PRUNED
        trials.append(trial(space, number, one, state))
        end = loss(space, one)
        rungs.add(RungResult(number, 1, 50, end + 0.5), {}, {})
        if number < INITIAL:
            metrics = {"val_loss": end}
            rungs.complete[number] = Evaluation("", number, 1, "complete", "", metrics=metrics)
    return trials, rungs


def test_it_learns_from_candidates_that_were_stopped_at_a_rung() -> None:
    space = Space.load("tiny", [OBJECTIVES])
    trials, rungs = with_stopped(space)
    volumes = []
    for asked in (GrayBox(space), GrayBox(space, rungs)):
        made = list(trials)
        for _ in range(4):
            proposed = point(space, 0, asked.propose(len(made), made))
            assert proposed is not None
            made.append(trial(space, len(made), proposed))
        volumes.append(volume([t for t in made if t.state == TrialState.COMPLETE]))
    assert volumes[1] > volumes[0]


def test_a_rung_without_one_of_the_objectives_counts_for_the_loss() -> None:
    """A stopped candidate has no `decode_ms`, which is measured after training."""
    space = Space.load("tiny", ["objectives=[val_loss, decode_ms]"])
    trials, rungs = with_stopped(space)
    taught, untaught = (
        GrayBox(space, known).propose(len(trials), trials) for known in (rungs, Rungs())
    )
    assert taught is not None
    assert taught != untaught


@pytest.mark.parametrize(
    "objectives",
    [
        "[val_loss]",
        "[active_params, flops_per_token]",
        "[val_loss, decode_ms, flops_per_token]",
        "[val_loss, decode_ms]",
    ],
)
def test_any_number_of_objectives_may_be_exact(objectives: str) -> None:
    space = Space.load("tiny", [f"objectives={objectives}"])
    draw, trials = random.Random(1), list[FrozenTrial]()
    for number in range(INITIAL):
        trials.append(trial(space, number, drawn(space, draw)))
    params = GrayBox(space).propose(INITIAL, trials)
    assert params is not None
    assert point(space, 0, params) is not None


@pytest.mark.parametrize("complete", [1, 2, 3, INITIAL])
def test_proposals_do_not_depend_on_the_unit_of_an_objective(complete: int) -> None:
    space = Space.load("tiny", [OBJECTIVES])
    proposals = []
    for factor in (1.0, 1000.0, 0.001):
        trials = searched(0, complete, sampler=False)
        for one in trials:
            one.values = [factor * one.values[0], one.values[1]]
        proposals.append(GrayBox(space).propose(2 * complete + 1, trials))
    assert proposals[0] is not None
    assert proposals[0] == proposals[1] == proposals[2]


def test_a_point_keeps_its_own_parameters() -> None:
    """Points of one architecture, whatever other point of it was seen before."""
    space = Space.load("tiny", [OBJECTIVES])
    asked, draw = GrayBox(space), random.Random(0)
    known: dict[str, Point] = {}
    for _ in range(300):
        architecture = drawn(space, draw)
        asked._describe(architecture)
        known.setdefault(architecture.architecture.fingerprint, architecture)
        assert asked._describe(architecture).point is architecture


def test_a_space_of_one_architecture_has_nothing_to_learn() -> None:
    space = Space.load("tiny", [OBJECTIVES])
    trials = searched(0, INITIAL, sampler=False)
    asked = GrayBox(space)
    asked._random = 0, []
    asked._encoder = gray_box.Encoder([])
    assert asked.propose(INITIAL, trials) is None
