"""Budgets of training: every candidate spends the same compute or time, up to one step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from studies import SMALL, Scripted, space

from moenas.errors import InputError, SpaceError
from moenas.evaluate.devices import device_name
from moenas.evaluate.matching import notes, open_corpus
from moenas.records import Evaluation, Job
from moenas.report.space_check import check_report
from moenas.space.sections import Budget, Recipe
from moenas.space.space import Space
from moenas.space.stored_form import digest, with_current_defaults
from moenas.store import spending
from moenas.store.store import Store
from moenas.study.estimate import estimate
from moenas.study.events import Event
from moenas.study.launch import dry_run, run

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


# --- seconds -------------------------------------------------------------------------------------

HERE = device_name(torch.device("cpu"))


def timed(name: str = "s", seconds: float = 0.1, device: str = HERE, more: str = "") -> Space:
    """SMALL under a budget of seconds; a step takes a few milliseconds."""
    text = space(SMALL, name=name).text
    budget = f"budget: {{seconds: {seconds}, device: '{device}'}}, dtype: float32, {more}"
    text = text.replace("tokens: 512, ", budget)
    return Space.parse(text, "s.yaml").with_search(sampler="grid", trials=6)


def test_every_candidate_trains_for_the_steps_that_fit_in_the_seconds() -> None:
    study = run(timed(), workers="inline")
    for evaluation in study.view.evaluations:
        assert evaluation.status == "complete", evaluation.failure
        tokens, step = evaluation.curve[-1]["tokens"], evaluation.metrics["step_ms"]
        assert evaluation.metrics["train_tokens"] == tokens
        assert tokens // 64 == int(100 / step)
    with pytest.raises(InputError, match=r"train\.budget\.seconds: 0\.1 -> 0\.2"):
        run(timed(seconds=0.2), workers="inline")
    with pytest.raises(InputError, match=r"train\.budget\.seconds: 0\.1 -> null"):
        run(small(), workers="inline")


def test_a_replicate_trains_on_the_tokens_of_its_trial() -> None:
    study = run(timed().with_search(sampler="grid", trials=2, replicates=2), workers="inline")
    rows = study.store.replicates(study.name)
    assert rows
    for row in rows:
        assert row.status == "complete", row.failure
        known = study.evaluation(row.trial)
        assert row.metrics["train_tokens"] == known.metrics["train_tokens"]
        assert "time_step" not in row.seconds


def test_all_candidates_of_a_study_are_timed_beside_one_reference_time() -> None:
    study = run(timed(), workers="inline", trials=2)
    times = study.store.reference_ms(study.name)
    assert [key for key in times if HERE in key and "training step" in key] == list(times)
    again = run(timed(), workers="inline", trials=4)
    assert again.store.reference_ms(study.name) == times
    assert len(again.view.evaluations) == 4
    assert all("step_spread" in e.metrics for e in again.view.evaluations)


def test_another_version_of_pytorch_times_the_reference_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run(timed(), workers="inline", trials=2).store.reference_ms("s")
    monkeypatch.setattr("moenas.evaluate.step_reference.REFERENCE_VERSION", 1_000)
    events: list[Event] = []
    study = run(timed(), workers="inline", trials=4, listeners=[events.append])
    times = study.store.reference_ms(study.name)
    assert first.items() < times.items()
    assert len(times) == 2
    assert all("step_spread" in e.metrics for e in study.view.evaluations)
    warnings = [e.text for e in events if e.kind == "warning"]
    assert any("the reference step is timed again" in text for text in warnings)


def test_a_study_that_was_timed_without_a_reference_goes_on_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:  # as an earlier version, and as a cluster
        patch.setattr("moenas.evaluate.step_reference.reference_key", lambda recipe, device: None)
        run(timed(), workers="inline", trials=2)
    study = run(timed(), workers="inline", trials=4)
    assert study.store.reference_ms(study.name) == {}
    assert len(study.view.evaluations) == 4
    assert all("step_spread" not in e.metrics for e in study.view.evaluations)
    assert all(e.metrics["step_ms"] > 0 for e in study.view.evaluations)


def test_a_budget_that_holds_the_corpus_several_times_is_told_once() -> None:
    events: list[Event] = []
    study = run(timed(seconds=1.0), workers="inline", trials=3, listeners=[events.append])
    lengths = {e.trial: e.metrics["train_tokens"] for e in study.view.evaluations}
    known = study.view.evaluations[0].data["train_tokens"]
    assert min(lengths.values()) > known
    (warning,) = [e for e in events if e.kind == "warning" and "is seen" in e.text]
    tokens = lengths[warning.trial or 0]
    assert f"{tokens:,.0f} tokens of training were drawn from {known:,}" in warning.text
    assert f"each is seen {tokens / known:.1f} times" in warning.text


def test_nothing_is_timed_for_a_study_that_trains_nothing() -> None:
    text = timed().text.replace("[val_loss, flops_per_token]", "[flops_per_token]")
    study = run(Space.parse(text, "s.yaml"), workers="inline", trials=2)
    assert study.store.reference_ms(study.name) == {}


def test_evaluations_of_a_step_timed_elsewhere_are_not_reused() -> None:
    run(timed("first").with_search(sampler="grid", trials=2), workers="inline")
    study = run(timed("second").with_search(sampler="grid", trials=2), workers="inline")
    assert [e.reused_from for e in study.view.evaluations] == [None, None]
    assert all("time_step" in e.seconds for e in study.view.evaluations)


def test_a_candidate_continues_from_a_rung_with_its_tokens() -> None:
    text = timed(more="rungs: 2, ").text
    stopping = "{kind: successive_halving, min_correlation: 0}"
    text = text.replace("trials: 6", f"trials: 6, early_stopping: {stopping}")
    study = run(Space.parse(text, "s.yaml"), workers="inline")
    complete = [e for e in study.view.evaluations if e.status == "complete"]
    assert complete
    for evaluation in complete:
        assert evaluation.curve[-1]["tokens"] == evaluation.metrics["train_tokens"]
        assert len([row for row in evaluation.curve if "val_loss" in row]) == 3
    stopped = [e for e in study.view.evaluations if e.status == "stopped"]
    assert all(e.curve[-1]["tokens"] < e.metrics["train_tokens"] for e in stopped)


def test_a_run_on_another_device_is_refused_and_nothing_is_made() -> None:
    other = timed(device="NVIDIA H100")
    message = rf"s\.yaml:\d+:\d+: train\.budget\.device: candidates run here on '.*{HERE[:3]}"
    with pytest.raises(SpaceError, match=message):
        run(other, workers="inline")
    with pytest.raises(SpaceError, match="counts seconds on 'NVIDIA H100'"):
        dry_run(other)
    assert not Path("moenas.db").exists()
    assert any("counts seconds on 'NVIDIA H100'" in n for n in notes(other, open_corpus(other)))


def test_all_candidates_train_on_the_device_model_of_the_first() -> None:
    def script(job: Job) -> Evaluation:
        name = "NVIDIA H100 PCIe" if job.trial == 1 else "NVIDIA H100 80GB HBM3"
        values = {"val_loss": 2.0 + job.trial, "flops_per_token": 1.0}
        metrics = {"train_tokens": 640.0, "step_ms": 10.0}
        more = {"values": values, "metrics": metrics, "device": {"name": name}}
        return Evaluation(job.study, job.trial, job.attempt, "complete", "", **more)  # type: ignore[arg-type]

    wanted = timed(device="NVIDIA H100").with_search(sampler="grid", trials=3)
    study = run(wanted, pool=Scripted(script))
    of = {e.trial: e for e in study.view.evaluations}
    refused = [e for e in of.values() if e.status == "failed"]
    assert [e.failure.kind for e in refused if e.failure] == ["refused"] * len(refused)
    names = {e.device["name"] for e in of.values() if e.status == "complete"}
    assert len(names) == 1
    assert {e.device["name"] for e in refused} == {
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3",
    } - names


def test_the_time_of_a_budget_of_seconds_is_known_and_its_tokens_by_a_probe() -> None:
    wanted = timed(seconds=36.0)
    assert check_report(wanted, 20)["tokens_per_parameter"] is None
    before = estimate(wanted, workers=1)
    assert before.hours == pytest.approx(6 * 0.01)
    assert before.train_tokens is None
    assert "unknown before a step is timed" in before.lines()[0]
    probed = estimate(wanted, open_corpus(wanted), workers=1)
    assert probed.hours == pytest.approx(6 * 0.01)
    assert probed.train_tokens is not None
    assert probed.train_tokens > 6 * 64


def test_heads_of_weight_0_are_no_heads() -> None:
    """They are not built, so a study that was begun without them goes on."""
    plain = small()
    of_weight = {
        weight: Space.parse(
            plain.text.replace("budget:", f"mtp: {{weight: {weight}}}, budget:"), "s.yaml"
        )
        .with_search(sampler="grid", trials=6)
        .sha256
        for weight in (0, 0.3)
    }
    assert of_weight[0] == plain.sha256 != of_weight[0.3]


def test_a_study_of_a_version_without_budgets_of_seconds_goes_on() -> None:
    wanted = small()
    stored = wanted.plain()
    stored["train"]["budget"] = {"train_flops": BUDGET}
    assert digest(stored) != wanted.sha256
    assert digest(with_current_defaults(stored)) == wanted.sha256
