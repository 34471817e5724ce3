"""Training with heads for further tokens: a run by hand, checkpoints, what is stored, and its cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moenas.data.corpus import Corpus
from moenas.errors import CandidateError
from moenas.evaluate import checkpoint, footprint
from moenas.evaluate.device_steps import DeviceSteps
from moenas.evaluate.memory import peak_bytes
from moenas.evaluate.optimizer import AdamW
from moenas.evaluate.steps import TrainingInputs
from moenas.evaluate.training import TrainingRun, train, validate
from moenas.model.architecture import Architecture, Model
from moenas.model.multi_token import MultiTokenPrediction, build_heads
from moenas.records import CurvePoint, Plain
from moenas.space.sections import Budget, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MTP = MultiTokenPrediction(depth=2, weight=0.5)
RECIPE = Recipe(
    tokens=10 * 64, context=16, batch=4, lr=0.01, val_tokens=320, dtype="float32", mtp=MTP
)


def corpus() -> Corpus:
    tokens = np.random.RandomState(0).randint(0, 32, 6000).astype(np.uint8)
    return Corpus("noise", tokens[:5000], tokens[5000:], 32, False, "", [None, None], {})


def architecture() -> Architecture:
    balance: Plain = {"kind": "bias", "rate": 0.01}
    moe: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 16}
    moe["router"] = {"score": "sigmoid", "top_k": 2, "balance": balance}
    mixer = {"kind": "attention", "head_dim": 8}
    blocks = [{"mixer": mixer, "ffn": {"kind": "dense", "d_ff": 32}}, {"mixer": mixer, "ffn": moe}]
    return Architecture.parse({"vocab_size": 32, "d_model": 16, "blocks": blocks})


def run_of(recipe: Recipe) -> TrainingRun:
    one = architecture()
    heads = build_heads(recipe.heads, one, CPU, 0)
    return TrainingRun(TrainingInputs(one.build(seed=0), corpus(), recipe, 0, heads))


def trained(recipe: Recipe) -> tuple[Model, list[CurvePoint]]:
    run = run_of(recipe)
    return run.model, [without_time(point) for point in run.points()]


def without_time(point: CurvePoint) -> Any:
    return {name: value for name, value in point.items() if name != "seconds"}


def assert_equal(one: Model, other: Model) -> None:
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_a_run_is_a_hand_written_run() -> None:
    """The loss of the next token, plus 0.5 / 2 of the sum over both heads, minimised together."""
    model, rows = trained(RECIPE)
    one = architecture()
    other, heads = one.build(seed=0).train(), MTP.build(one, seed=0).train()
    optimizer = AdamW(other, RECIPE, heads)
    weights = [*other.parameters(), *heads.parameters()]
    for step, row in enumerate(rows):
        tokens, targets = corpus().batch(step, 4, 16, 0)
        hidden = other.hidden(tokens)
        next_token = other.head.loss(hidden, other.embedding, targets)
        first, second = heads.losses(other, hidden, tokens, targets)
        for part in (other, heads):
            part.zero_grad()
        auxiliary = other.auxiliary_loss() + heads.auxiliary_loss()
        (next_token + 0.25 * (first + second) + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(weights, RECIPE.grad_clip)
        optimizer.step(row["lr"])
        other.after_step()
        heads.after_step()
        assert row["train_loss"] == pytest.approx(next_token.item(), abs=1e-5)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    (_, moe), *_ = heads.moe_layers()
    assert moe.balance.bias is not None
    assert moe.balance.bias.any(), "the mixtures of the heads balance their own loads"


def test_a_weight_of_zero_is_a_run_without_heads() -> None:
    without, rows = trained(replace(RECIPE, mtp=None))
    weightless, same_rows = trained(replace(RECIPE, mtp=replace(MTP, weight=0.0)))
    assert rows == same_rows
    assert_equal(without, weightless)
    with_heads, other_rows = trained(RECIPE)
    assert rows != other_rows
    assert not torch.equal(with_heads.embedding, without.embedding)


def test_the_model_is_validated_and_stored_without_its_heads() -> None:
    model, _ = trained(RECIPE)
    plain = architecture().build(seed=0)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    assert validate(model, corpus(), RECIPE) == validate(plain, corpus(), replace(RECIPE, mtp=None))


def test_a_restored_run_ends_as_one_that_was_not_interrupted() -> None:
    whole = run_of(RECIPE)
    rows = [without_time(point) for point in whole.points()]
    first = run_of(RECIPE)
    points = first.points()
    before = [without_time(next(points)) for _ in range(4)]
    state = {name: tensor.clone() for name, tensor in checkpoint.save(first).items()}
    points.close()
    second = run_of(RECIPE)
    for weight in second.steps.trainee.parameters():
        weight.data.add_(1.0)  # the checkpoint holds all of them
    checkpoint.restore(second, state)
    assert before + [without_time(point) for point in second.points()] == rows
    assert_equal(second.model, whole.model)
    for a, b in zip(
        second.steps.trainee.parameters(), whole.steps.trainee.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(CandidateError, match="other heads"):
        checkpoint.restore(run_of(replace(RECIPE, mtp=None)), state)


def test_steps_of_a_device_are_those_of_the_host() -> None:
    run = run_of(RECIPE)
    rows = list(run.points())
    one = architecture()
    model = one.build(seed=0).train()
    steps = DeviceSteps(TrainingInputs(model, corpus(), RECIPE, 0, MTP.build(one, seed=0).train()))
    sums = [steps.advance(end, None, None) for end in range(1, 11)]
    assert [s.loss for s in sums] == pytest.approx([r["train_loss"] for r in rows], abs=1e-5)
    assert [s.grad_norm for s in sums] == pytest.approx([r["grad_norm"] for r in rows], rel=1e-3)


def test_the_memory_of_a_step_is_foreseen_with_the_heads() -> None:
    one = architecture()
    recipe = replace(RECIPE, tokens=2 * 64)
    estimate = footprint.training_bytes(one, recipe, CPU)
    assert estimate > footprint.training_bytes(one, replace(recipe, mtp=None), CPU)
    model, heads = one.build(seed=0), MTP.build(one, seed=0)
    held = [*model.state_dict(keep_vars=True).values(), *heads.state_dict(keep_vars=True).values()]
    rows = train(model, corpus(), recipe, 0, heads=heads)
    peak = peak_bytes(lambda: list(rows), held, CPU)
    assert estimate == pytest.approx(peak, rel=0.1)


def test_a_budget_pays_for_the_heads() -> None:
    """The same training FLOPs are fewer steps; the cost of the model stays as it is."""
    one = architecture()
    plain = replace(RECIPE, mtp=None)
    model, both = plain.training_cost(one), RECIPE.training_cost(one)
    assert model == one.cost(16)
    assert both.flops_per_token == model.flops_per_token + MTP.cost(one, 16).flops_per_token
    budget = Budget(train_flops=20 * plain.step_flops(model.flops_per_token))
    steps = [
        replace(recipe, budget=budget).for_candidate(cost.flops_per_token).steps
        for recipe, cost in ((plain, model), (RECIPE, both))
    ]
    assert steps == [20, 20 * model.flops_per_token // both.flops_per_token]
    record = RECIPE.cost_record(one)
    assert record["training_flops_per_token"] == both.flops_per_token
    assert record["training_params"] == both.params
    assert record["flops_per_token"] == model.flops_per_token
    assert plain.cost_record(one) == model.plain()
