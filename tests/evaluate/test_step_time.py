"""A budget of seconds in one job: real steps are timed, and the training shows no trace of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import RECIPE, MakeJob, job_maker, without_times

from moenas.errors import SpaceError
from moenas.evaluate.device_steps import DeviceSteps
from moenas.evaluate.devices import device_name, is_called
from moenas.evaluate.job import evaluate
from moenas.evaluate.step_time import StepTime
from moenas.grammar import tree
from moenas.model.multi_token import MultiTokenPrediction
from moenas.records import Evaluation
from moenas.space.sections import Budget, Recipe

HERE = device_name(torch.device("cpu"))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJob:
    return job_maker(tmp_path, monkeypatch)


def seconds_of(seconds: float, device: str = HERE, **changes: Any) -> dict[str, Any]:
    return replace(RECIPE, budget=Budget(seconds=seconds, device=device), **changes).plain()


def trained(evaluation: Evaluation) -> dict[str, Any]:
    """What two runs of equal tokens have in common, whatever fixed the tokens."""
    kept = without_times(evaluation)
    kept["metrics"] = {
        k: v for k, v in evaluation.metrics.items() if k in ("val_loss", "train_loss")
    }
    return kept


@given(st.floats(1e-5, 10), st.floats(0.001, 1e5))
def test_the_tokens_are_those_of_the_whole_steps_that_fit(step: float, seconds: float) -> None:
    recipe = Recipe(batch=4, context=16, budget=Budget(seconds=seconds, device="x"))
    tokens = StepTime(step).tokens(recipe)
    steps = tokens // 64
    assert tokens == 64 * steps
    assert steps * step <= seconds * (1 + 1e-12)
    assert (steps + 1) * step > seconds * (1 - 1e-12)
    assert recipe.for_candidate(1, tokens).steps == steps


def test_a_recipe_of_seconds_has_no_tokens_before_a_step_is_timed() -> None:
    recipe = Recipe(budget=Budget(seconds=1.0, device="x"))
    with pytest.raises(ValueError, match="is not timed"):
        recipe.for_candidate(10)


@pytest.mark.parametrize(
    ("device", "name", "same"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100", True),
        ("NVIDIA H100 80GB HBM3", "nvidia h100 80gb hbm3", True),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H10", False),
        ("NVIDIA H100 80GB HBM3", "NVIDIA HBM3", False),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA H100", False),
        ("AMD EPYC", "AMD EPYC 9354", False),
    ],
)
def test_words_of_its_name_call_a_device(device: str, name: str, same: bool) -> None:
    assert is_called(device, name) is same


@pytest.mark.parametrize("mtp", [None, MultiTokenPrediction()])
def test_the_training_is_that_of_the_tokens_that_were_found(
    job: MakeJob, mtp: MultiTokenPrediction | None
) -> None:
    timed, weights = evaluate(job("val_loss", "flops_per_token", train=seconds_of(0.2, mtp=mtp)))
    assert timed.status == "complete", timed.failure
    tokens = int(timed.metrics["train_tokens"])
    assert timed.curve[-1]["tokens"] == tokens
    steps = tokens // 64
    assert (
        steps * timed.metrics["step_ms"]
        <= 200 + 1e-6
        < (steps + 1) * timed.metrics["step_ms"] + 2e-6
    )
    assert timed.seconds["time_step"] > 0
    fixed, again = evaluate(
        job("val_loss", "flops_per_token", train=seconds_of(0.2, mtp=mtp), train_tokens=tokens)
    )
    plain, same = evaluate(
        job("val_loss", "flops_per_token", train=replace(RECIPE, tokens=tokens, mtp=mtp).plain())
    )
    assert trained(timed) == trained(fixed) == trained(plain)
    tensors = [safetensors.torch.load(w) for w in (weights, again, same) if isinstance(w, bytes)]
    assert len(tensors) == 3
    for name, tensor in tensors[0].items():
        assert all(torch.equal(tensor, other[name]) for other in tensors[1:]), name
    assert "time_step" not in fixed.seconds
    assert fixed.metrics["train_tokens"] == tokens
    assert "train_tokens" not in plain.metrics


def test_steps_that_do_not_wait_for_the_device_are_timed_in_rows(
    job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a GPU, on the CPU: their tokens are loaded for a whole sample at once."""
    monkeypatch.setattr("moenas.evaluate.step_time.open_steps", DeviceSteps)
    evaluation, _ = evaluate(job("val_loss", train=seconds_of(0.2)))
    assert evaluation.status == "complete", evaluation.failure
    assert evaluation.curve[-1]["tokens"] == evaluation.metrics["train_tokens"] > 0


def test_a_measurement_without_training_keeps_the_tokens(job: MakeJob) -> None:
    timed, weights = evaluate(job("val_loss", train=seconds_of(0.1)))
    again, _ = evaluate(
        job("val_loss", train=seconds_of(0.1), known=timed.plain(), weights=weights)
    )
    assert again.status == "complete", again.failure
    assert again.values == timed.values
    kept = ("train_tokens", "step_ms")
    assert [again.metrics[name] for name in kept] == [timed.metrics[name] for name in kept]


def test_nothing_is_timed_where_nothing_is_trained(job: MakeJob) -> None:
    evaluation, _ = evaluate(job("flops_per_token", train=seconds_of(60)))
    assert evaluation.status == "complete"
    assert "time_step" not in evaluation.seconds
    assert evaluation.metrics == {}


def test_a_budget_below_one_step_ends_the_candidate(job: MakeJob) -> None:
    train = seconds_of(0.001, batch=64, context=128)
    evaluation, _ = evaluate(job("val_loss", train=train))
    assert evaluation.failure is not None
    assert evaluation.failure.kind == "timeout"
    assert "train.budget.seconds: 0.001 s hold 0 training steps of" in evaluation.failure.message
    assert "a candidate needs 1: give at least" in evaluation.failure.message


def test_a_worker_on_another_device_refuses_the_job(job: MakeJob) -> None:
    evaluation, _ = evaluate(job("val_loss", train=seconds_of(1.0, device="Abacus 3")))
    assert evaluation.failure is not None
    assert evaluation.failure.kind == "refused"
    assert f"candidates run here on '{HERE}'" in evaluation.failure.message
    assert "counts seconds on 'Abacus 3'" in evaluation.failure.message


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "either train_flops, or seconds with device"),
        ({"train_flops": 1e9, "seconds": 1, "device": "x"}, "either train_flops, or seconds"),
        ({"seconds": 1}, "seconds and device go together"),
        ({"train_flops": 1e9, "device": "x"}, "seconds and device go together"),
        ({"seconds": 1, "device": " "}, "device is empty"),
    ],
)
def test_a_budget_is_of_one_kind(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        tree.parse(Recipe, {"budget": budget})
