"""The chance that a candidate in training joins the front, against what is known by construction."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from studies import space

from moenas.grammar.sampling import RandomSuggest, drawn
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, RungResult
from moenas.search.predictive import Prediction, dominated_share
from moenas.search.rungs import Rungs
from moenas.space.early_stopping import Predictive
from moenas.space.space import Space

pytestmark = pytest.mark.usefixtures("study_folder")
N = 16


def architectures(of: Space) -> list[Architecture]:
    """Different architectures of a space."""
    by_fingerprint: dict[str, Architecture] = {}
    seed = 0
    while len(by_fingerprint) < N + 2:
        architecture = drawn(of.tree, RandomSuggest(seed))
        assert isinstance(architecture, Architecture)
        by_fingerprint[architecture.canonical().fingerprint] = architecture.canonical()
        seed += 1
    return list(by_fingerprint.values())


def study(of: Space, *, noise: float = 0.02) -> Rungs:
    """N complete candidates whose loss falls by 1 from the rung to the end, and two at the rung."""
    draw, rungs = random.Random(0), Rungs()
    for trial, architecture in enumerate(architectures(of)):
        cost = architecture.cost(of.train.context).plain()
        known = {"flops_per_token": float(cost["flops_per_token"])}
        at_rung = 4.0 - 2e-5 * cost["flops_per_token"] + draw.gauss(0, 0.05)
        result = RungResult(trial, 1, 100, at_rung, known)
        rungs.add(result, architecture.plain(), cost)
        if trial < N:
            loss = at_rung - 1.0 + draw.gauss(0, noise)
            values = {**known, "val_loss": loss}
            evaluation = Evaluation("s", trial, 1, "complete", "", values=values)
            rungs.complete[trial] = dataclasses.replace(evaluation, metrics={"val_loss": loss})
    return rungs


def test_the_chance_is_high_below_the_front_and_low_above_it() -> None:
    """The front holds a cheaper candidate with a loss that is 0.5 lower, or 0.5 higher."""
    of = space(name="chances")
    rungs, rule = study(of), Prediction(Predictive(), of)
    trial = N
    flops = rungs.results[1][trial].known["flops_per_token"]
    cheaper = [
        e.values["val_loss"]
        for e in rungs.complete.values()
        if e.values["flops_per_token"] <= flops
    ]
    assert cheaper
    for gap, low, high in ((-0.5, 0.95, 1.0), (0.5, 0.0, 0.05)):
        loss = min(cheaper) + 1.0 + gap
        result = dataclasses.replace(rungs.results[1][trial], val_loss=loss)
        rungs.add(result, rungs.architectures[trial], rungs.costs[trial])
        assert low <= rule.chance(rungs, trial, 1) <= high
        assert (rule.hopeless(rungs, {trial: 1}) == [trial]) == (gap > 0)


def test_who_is_cheaper_than_all_joins_the_front_whatever_its_loss() -> None:
    of = space(name="cheapest")
    rungs, rule = study(of), Prediction(Predictive(), of)
    result = RungResult(N, 1, 100, 9.0, {"flops_per_token": 1.0})
    rungs.add(result, rungs.architectures[N], rungs.costs[N])
    assert rule.chance(rungs, N, 1) == 1.0


def test_what_was_reused_without_rungs_is_on_the_front() -> None:
    of = space(name="reused")
    rungs, rule = study(of), Prediction(Predictive(), of)
    before = rule.chance(rungs, N, 1)
    assert before > 0.1
    best = {"val_loss": 0.1, "flops_per_token": 1.0}
    rungs.complete[N + 9] = Evaluation("s", N + 9, 1, "complete", "", values=best)
    assert rule.chance(rungs, N, 1) == 0.0


def test_nobody_is_stopped_before_enough_are_complete() -> None:
    of = space(name="few")
    rungs = study(of)
    result = dataclasses.replace(rungs.results[1][N], val_loss=50.0)
    rungs.add(result, rungs.architectures[N], rungs.costs[N])
    assert Prediction(Predictive(min_complete=N + 1), of).hopeless(rungs, {N: 1}) == []
    assert Prediction(Predictive(min_complete=N), of).hopeless(rungs, {N: 1}) == [N]


def test_the_guard_lowers_the_limit_to_nothing_where_ranks_disagree() -> None:
    of = space(name="guard")
    rungs = study(of)
    result = dataclasses.replace(rungs.results[1][N], val_loss=50.0)
    rungs.add(result, rungs.architectures[N], rungs.costs[N])
    for trial, evaluation in rungs.complete.items():
        reverse = {"val_loss": -rungs.results[1][trial].val_loss}
        rungs.complete[trial] = dataclasses.replace(evaluation, metrics=reverse)
    assert Prediction(Predictive(), of).hopeless(rungs, {N: 1}) == []
    assert Prediction(Predictive(min_correlation=0.0), of).hopeless(rungs, {N: 1}) == [N]


def test_the_share_of_dominated_samples_is_counted() -> None:
    samples = np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0], [1.0, 2.0]])
    assert dominated_share(samples, np.array([[1.0, 1.0]])) == 0.5
    assert dominated_share(samples, np.empty((0, 2))) == 0.0
