"""A budget of training FLOPs: every candidate spends the same compute, up to one step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import SMALL, space

from moenas.errors import InputError, SpaceError
from moenas.report.space_check import check_report
from moenas.space.sections import Budget, Recipe
from moenas.space.space import Space
from moenas.store import spending
from moenas.store.store import Store
from moenas.study.estimate import estimate
from moenas.study.launch import run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

BUDGET = 60e6
"""Some 8 to 40 steps of the candidates of SMALL."""


def small(name: str = "s", budget: float = BUDGET) -> Space:
    text = space(SMALL, name=name).text
    text = text.replace("tokens: 512, ", f"budget: {{train_flops: {budget}}}, dtype: float32, ")
    return Space.parse(text, "s.yaml").with_search(sampler="grid", trials=6)


@given(st.integers(1, 10**13), st.floats(1, 1e18))
def test_the_steps_are_those_that_fit(flops: int, budget: float) -> None:
    recipe = Recipe(batch=4, context=16, budget=Budget(train_flops=budget))
    fitted = recipe.for_candidate(flops)
    step = 3 * flops * 4 * 16
    assert fitted.steps * step <= budget < (fitted.steps + 1) * step * (1 + 1e-9)
    assert fitted.tokens == fitted.steps * 64
    assert Recipe(tokens=640).for_candidate(flops) == Recipe(tokens=640)


def test_every_candidate_spends_the_same_compute() -> None:
    study = run(small(), workers="inline")
    tokens = {}
    for evaluation in study.view.evaluations:
        assert evaluation.status == "complete", evaluation.failure
        tokens[evaluation.trial] = evaluation.curve[-1]["tokens"]
        spent = 3 * evaluation.cost["flops_per_token"] * tokens[evaluation.trial]
        step = 3 * evaluation.cost["flops_per_token"] * 64
        assert BUDGET - step < spent <= BUDGET
    assert len(set(tokens.values())) > 2
    assert min(tokens, key=lambda t: tokens[t]) == max(
        tokens, key=lambda t: study.evaluation(t).cost["flops_per_token"]
    )
    with pytest.raises(InputError, match=r"train\.budget\.train_flops: 60000000\.0 -> 9"):
        run(small(budget=9e7), workers="inline")


def test_evaluations_of_equal_tokens_are_not_those_of_equal_compute() -> None:
    text = space(SMALL, name="tokens").text.replace("train: {", "train: {dtype: float32, ")
    first = Space.parse(text, "s.yaml").with_search(sampler="grid", trials=6)
    run(first, workers="inline")
    study = run(small("compute"), workers="inline", trials=2)
    assert all(e.reused_from is None for e in study.view.evaluations)


def test_heads_for_further_tokens_are_paid_by_the_budget() -> None:
    """Of candidates, of what the study has spent, and of the estimate before it; not of the model."""
    plain = small("heads")
    with_heads = Space.parse(plain.text.replace("budget:", "mtp: {depth: 2}, budget:"), "s.yaml")
    with_heads = with_heads.with_search(sampler="grid", trials=6)
    study = run(with_heads, workers="inline")
    spent = []
    for evaluation in study.view.evaluations:
        assert evaluation.status == "complete", evaluation.failure
        architecture = with_heads.architecture(study.architecture(evaluation.trial).plain())
        assert with_heads.train.mtp is not None
        of_heads = with_heads.train.mtp.cost(architecture, with_heads.train.context)
        model = architecture.cost(with_heads.train.context)
        assert evaluation.cost["flops_per_token"] == model.flops_per_token
        assert evaluation.cost["params"] == model.params
        assert evaluation.cost["training_params"] == model.params + of_heads.params
        step = 3 * (model.flops_per_token + of_heads.flops_per_token) * 64
        steps = evaluation.curve[-1]["tokens"] // 64
        assert steps == BUDGET // step
        spent.append(steps * step)
    store = Store.open()
    assert spending.spending(store, study.name).train_flops == pytest.approx(sum(spent))
    assert estimate(with_heads).train_flops == pytest.approx(sum(spent), rel=0.2)
    assert estimate(with_heads).train_tokens < estimate(plain).train_tokens


def test_a_candidate_without_one_step_is_infeasible() -> None:
    costs = [
        small().cost(a).flops_per_token for a in small().feasible(20) if not isinstance(a, str)
    ]
    between = 3 * 64 * (min(costs) + max(costs)) / 2
    study = run(small(budget=between), workers="inline")
    broken = {e.trial: e.violations for e in study.view.evaluations if e.status == "infeasible"}
    assert broken
    assert all(
        "train.budget holds one training step" in evaluation for evaluation in broken.values()
    )
    with pytest.raises(SpaceError, match="holds one training step"):
        small(budget=2.0).require_feasible()


def test_tokens_beside_a_budget_are_refused_at_their_place() -> None:
    text = small().text.replace("budget:", "tokens: 512, budget:")
    with pytest.raises(SpaceError, match=r"s\.yaml:\d+:\d+: train\.tokens: a budget decides"):
        Space.parse(text, "s.yaml")


def test_check_and_estimate_count_by_the_budget() -> None:
    wanted = small()
    report = check_report(wanted, 20)
    assert report["tokens_per_parameter"]["min"] < report["tokens_per_parameter"]["max"]
    expected = estimate(wanted)
    assert 0.8 * 6 * BUDGET < expected.train_flops <= 6 * BUDGET
