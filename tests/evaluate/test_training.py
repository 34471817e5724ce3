"""The training run: it repeats bit for bit, stops early, and reports itself and the routing."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moenas.data.corpus import Corpus
from moenas.data.domains import Domains, table
from moenas.errors import CollapsedError, DivergedError, TimeLimitError
from moenas.evaluate import checkpoint
from moenas.evaluate.optimizer import AdamW, learning_rate, schedule
from moenas.evaluate.steps import TrainingInputs
from moenas.evaluate.training import TrainingRun, rung_tokens, train, validate, validation_loss
from moenas.model.architecture import Architecture, Model
from moenas.records import CurvePoint, Plain
from moenas.space.sections import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(tokens=40 * 64, context=16, batch=4, lr=0.01, val_tokens=320, dtype="float32")


def corpus() -> Corpus:
    """Count up modulo 32, with a jump now and then: easy to learn, not for nothing."""
    steps = 1 + (np.random.RandomState(0).rand(6000) < 0.1) * 7
    tokens = (np.cumsum(steps) % 32).astype(np.uint8)
    return Corpus("count", tokens[:5000], tokens[5000:], 32, False, "", [None, None], {})


def architecture(**router: Any) -> Architecture:
    moe = {"kind": "moe", "n_experts": 4, "d_expert": 16, "router": router or {"top_k": 2}}
    mixer = {"kind": "attention", "head_dim": 8}
    blocks: list[Plain] = [
        {"mixer": mixer, "ffn": {"kind": "dense", "d_ff": 32}},
        {"mixer": mixer, "ffn": moe},
    ]
    return Architecture.parse({"vocab_size": 32, "d_model": 16, "blocks": blocks})


def trained(recipe: Recipe = RECIPE, seed: int = 0) -> tuple[Model, list[CurvePoint]]:
    model = architecture().build(seed=0)
    return model, list(train(model, corpus(), recipe, seed))


def digest(model: Model) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


# --- the run -----------------------------------------------------------------------------------


def test_a_run_learns() -> None:
    model, rows = trained()
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]
    assert validate(model, corpus(), RECIPE).loss < 0.6 * math.log(32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_repeats_to_the_last_bit(dtype: str) -> None:
    recipe = replace(RECIPE, dtype=dtype, tokens=12 * 64)  # type: ignore[arg-type]
    assert digest(trained(recipe)[0]) == digest(trained(recipe)[0])


def run_python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_a_run_repeats_in_another_process_and_does_without_the_compiler() -> None:
    code = "import sys, test_training as t; print(t.digest(t.trained()[0]), 'torch._dynamo' in sys.modules)"
    assert run_python(code) == f"{digest(trained()[0])} False"


def test_a_run_does_not_depend_on_the_global_generators() -> None:
    torch.manual_seed(1)
    first = digest(trained()[0])
    torch.manual_seed(2)
    assert digest(trained()[0]) == first


def test_the_seed_orders_the_data() -> None:
    assert digest(trained(seed=0)[0]) != digest(trained(seed=1)[0])


def groups(model: Model) -> list[dict[str, Any]]:
    """Matrices and norms move at the rate itself, the embedding at d_model / 64 of it."""
    named = dict(model.named_parameters())
    embedding = named.pop("embedding")
    norms = [p for name, p in named.items() if "norm" in name]
    matrices = [p for name, p in named.items() if "norm" not in name]
    return [
        {"params": matrices, "share": 1},
        {"params": norms, "share": 1, "weight_decay": 0.0},
        {"params": [embedding], "share": 16 / 64},
    ]


def test_a_run_is_a_hand_written_run() -> None:
    """The same steps with plain AdamW and the recipe's own words."""
    recipe = replace(RECIPE, tokens=10 * 64, grad_clip=0.5, weight_decay=0.3, warmup=0.3, decay=0.4)
    model, rows = trained(recipe)
    rates = [0.01 * x for x in (1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4)]
    assert [row["lr"] for row in rows] == pytest.approx(rates)
    other = architecture().build(seed=0)
    optimizer = torch.optim.AdamW(groups(other), weight_decay=0.3, betas=(0.9, 0.95), fused=False)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        tokens, targets = corpus().batch(step, 4, 16, 0)
        logits = other(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + other.auxiliary_loss()).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        assert rows[step]["train_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert rows[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_the_optimizer_is_torchs_to_the_last_bit() -> None:
    recipe = replace(RECIPE, weight_decay=0.3)
    ours, theirs = architecture().build(seed=0), architecture().build(seed=0)
    step = AdamW(ours, recipe)
    oracle = torch.optim.AdamW(groups(theirs), betas=(0.9, 0.95), weight_decay=0.3, fused=True)
    for group in oracle.param_groups:
        group["lr"] = 0.02 * group["share"]
    for i in range(5):
        for model in (ours, theirs):
            model.zero_grad()
            model.loss(*corpus().batch(i, 4, 16, 0)).backward()
        step.step(0.02)
        oracle.step()
    assert digest(ours) == digest(theirs)


def test_selection_biases_move_after_each_step() -> None:
    routed = architecture(top_k=2, score="sigmoid", balance="bias", bias_rate=0.01).build(seed=0)
    (_, moe), *_ = routed.moe_layers()
    assert moe.balance.bias is not None
    rows = train(routed, corpus(), replace(RECIPE, tokens=3 * 64), 0)
    sizes = []
    for _ in rows:
        sizes.append(float(moe.balance.bias.abs().max()))
    assert sizes[0] == pytest.approx(0.01)
    assert max(sizes) <= 0.03 + 1e-6


@pytest.mark.parametrize("steps", [1, 7, 61])
def test_rows_are_even_and_their_means_cover_every_step(steps: int) -> None:
    recipe = replace(RECIPE, tokens=steps * 64 + 5, warmup=0.0, decay=0.0, lr=1e-9)
    _, rows = trained(recipe)
    assert len(rows) == min(steps, 40)
    tokens = [row["tokens"] for row in rows]
    assert tokens[-1] == steps * 64
    sizes = np.diff([0, *tokens])
    assert sizes.max() - sizes.min() <= 64
    model = architecture().build(seed=0)
    with torch.no_grad():
        losses = [float(model.loss(*corpus().batch(s, 4, 16, 0))) for s in range(steps)]
    mean = sum(row["train_loss"] * n for row, n in zip(rows, sizes, strict=True)) / sizes.sum()
    assert mean == pytest.approx(sum(losses) / steps, abs=1e-4)
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(rows))


def test_threads_are_set_for_the_run_and_put_back() -> None:
    before = torch.get_num_threads()
    model = architecture().build(seed=0)
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda *args: seen.append(torch.get_num_threads()))
    list(train(model, corpus(), replace(RECIPE, threads=before + 1, tokens=64), 0))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


# --- the rungs ---------------------------------------------------------------------------------


ROUTERS: list[Plain] = [
    {"top_k": 2, "balance": "bias"},
    {"top_k": 2, "balance": "aux_loss", "capacity_factor": 1.0},
    {"preset": "switch"},
    {"selection": "expert_choice", "allow_acausal": True},
]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_validation_between_two_steps_changes_no_weight(router: Plain) -> None:
    weights, losses = [], []
    for between in (False, True):
        torch.manual_seed(0)
        model = architecture(**router).build(seed=0)
        for _ in train(model, corpus(), RECIPE, 0):
            if between:
                losses.append(validation_loss(model, corpus(), RECIPE))
        weights.append(digest(model))
    assert weights[0] == weights[1]
    assert losses[-1] == validate(model, corpus(), RECIPE).loss
    assert losses[-1] < losses[0]


def test_time_between_two_points_is_no_time_of_training() -> None:
    model = architecture().build(seed=0)
    curve = []
    for point in train(model, corpus(), replace(RECIPE, tokens=5 * 64), 0):
        curve.append(point)
        time.sleep(0.5)
    assert curve[-1]["seconds"] < 2.0


@pytest.mark.parametrize(
    ("steps", "rungs", "expected"),
    [
        (40, 0, []),
        (40, 1, [20]),
        (80, 7, [10, 20, 30, 40, 50, 60, 70]),
        (10, 3, [3, 5, 8]),  # every step is a row: the first one at or after 2.5, 5 and 7.5
        (3, 3, [1, 2]),  # a rung at the end is none
        (400, 2, [140, 270]),  # the first row after 133.3 and 266.7
    ],
)
def test_rungs_are_rows_of_the_curve(steps: int, rungs: int, expected: list[int]) -> None:
    recipe = replace(RECIPE, tokens=steps * 64, rungs=rungs)
    assert rung_tokens(recipe) == [64 * step for step in expected]


# --- the schedule ------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_falls() -> None:
    recipe = Recipe(tokens=100 * 64, context=16, batch=4, warmup=0.1, decay=0.3)
    rates = [schedule(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:70] == [1.0] * 60
    assert rates[70:] == pytest.approx([(30 - i) / 30 for i in range(30)])


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (1, 0), (0, 1), (0.5, 0.5), (0.001, 0.001)])
def test_every_step_has_a_rate(warmup: float, decay: float) -> None:
    for steps in (1, 2, 3, 50):
        recipe = Recipe(tokens=steps * 64, context=16, batch=4, warmup=warmup, decay=decay)
        rates = [schedule(step, recipe) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        assert max(rates) > 0.45


# --- stopping ----------------------------------------------------------------------------------


def test_a_rate_that_is_far_too_high_diverges_and_says_so() -> None:
    with pytest.raises(DivergedError, match=r"not finite in step \d+ of 40 at a learning rate of"):
        trained(replace(RECIPE, lr=1e30, warmup=0.0, grad_clip=0.0))


def test_a_gradient_that_is_not_finite_stops_before_it_does_harm() -> None:
    model = architecture().build(seed=0)
    model.embedding.register_hook(lambda gradient: gradient * math.nan)
    before = digest(model)
    with pytest.raises(DivergedError, match="the gradient was not finite in step 0"):
        list(train(model, corpus(), RECIPE, 0))
    assert digest(model) == before


def test_a_model_of_nans_does_not_validate() -> None:
    model = architecture().build(seed=0)
    model.embedding.data.fill_(math.nan)
    with pytest.raises(DivergedError, match="validation loss"):
        validate(model, corpus(), RECIPE)


def test_a_deadline_that_has_passed_stops_the_run() -> None:
    model = architecture().build(seed=0)
    rows = train(model, corpus(), RECIPE, 0, deadline=time.monotonic() - 1)
    with pytest.raises(TimeLimitError, match="step 0 of 40"):
        next(rows)


def test_every_step_passes_the_gate() -> None:
    class Gate:
        entered = 0
        inside = False

        @contextmanager
        def shared(self) -> Iterator[None]:
            self.entered += 1
            self.inside = True
            yield
            self.inside = False

    gate = Gate()
    model = architecture().build(seed=0)
    model.blocks[0].register_forward_hook(lambda *args: seen.append(gate.inside))
    seen: list[bool] = []
    for _ in train(model, corpus(), RECIPE, 0, gate=gate):
        assert not gate.inside
    assert (gate.entered, seen) == (40, [True] * 40)


# --- types and rates ---------------------------------------------------------------------------


def test_weights_stay_float32_whatever_is_computed_in() -> None:
    model, _ = trained(replace(RECIPE, dtype="bfloat16", tokens=128))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_matrices_learn_slower_the_wider_and_inputs_do_not() -> None:
    narrow, wide = architecture(), replace(architecture(), d_model=64)
    free = replace(RECIPE, lr=None, lr_scale=1.0)
    assert learning_rate(narrow, free) == pytest.approx(4 * learning_rate(wide, free))
    for trained in (narrow, wide):
        model = trained.build(seed=0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        rate = learning_rate(trained, free)
        one_step = replace(free, lr=rate, tokens=64, warmup=0.0, decay=0.0, weight_decay=0.0)
        list(train(model, corpus(), one_step, 0))
        moved = {
            n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()
        }
        # Adam's first step moves a weight by its rate.
        assert moved["embedding"] == pytest.approx(0.004, rel=0.01)
        assert moved["norm.weight"] == pytest.approx(rate, rel=0.01)
        assert moved["blocks.0.mixer.out.weight"] == pytest.approx(rate, rel=0.01)


def test_a_given_rate_is_taken_and_the_rule_is_scaled() -> None:
    parsed = architecture()
    assert learning_rate(parsed, replace(RECIPE, lr=0.123)) == 0.123
    rate = learning_rate(parsed, replace(RECIPE, lr=None, lr_scale=0.5))
    assert rate == pytest.approx(0.5 * 0.256 / parsed.d_model)


def test_the_rate_grows_with_the_cube_root_of_the_tokens_of_a_step() -> None:
    parsed, rule = architecture(), replace(RECIPE, lr=None, lr_scale=None)
    for batch, context, factor in ((8, 128, 1.0), (32, 32, 1.0), (64, 128, 2.0), (1, 128, 0.5)):
        rate = learning_rate(parsed, replace(rule, batch=batch, context=context, tokens=10**6))
        assert rate == pytest.approx(factor * 0.256 / parsed.d_model)


# --- validation and routing --------------------------------------------------------------------


def test_validation_is_the_mean_over_the_windows() -> None:
    model, _ = trained()
    validation = validate(model, corpus(), RECIPE)
    model.eval()
    losses = []
    for tokens, targets in corpus().val_batches(16, 1, 320):
        logits = model(tokens).log_softmax(-1)
        losses += (-logits.gather(-1, targets[..., None])).flatten().tolist()
    assert validation.tokens == len(losses) == 320
    assert validation.loss == pytest.approx(sum(losses) / 320, abs=1e-5)
    assert validation.bits_per_byte is None
    assert validate(model, replace(corpus(), is_bytes=True), RECIPE).bits_per_byte == pytest.approx(
        validation.loss / math.log(2)
    )


@pytest.mark.parametrize("training", [True, False])
def test_validation_leaves_the_model_as_it_was(training: bool) -> None:
    model, _ = trained(replace(RECIPE, tokens=128))
    model.train(training)
    before = digest(model)
    validate(model, corpus(), RECIPE)
    assert (digest(model), model.training) == (before, training)


def test_loads_are_counted_over_all_windows() -> None:
    model, _ = trained()
    (row,) = validate(model, corpus(), RECIPE).routing
    (_, moe), *_ = model.moe_layers()
    chosen = torch.zeros(4)
    model.eval()
    for tokens, _ in corpus().val_batches(16, 1, 320):
        model(tokens)
        chosen += moe.routing.load
    assert row["layer"] == 1
    assert row["load"] == pytest.approx((chosen / (320 * 2)).tolist(), abs=1e-5)
    assert row["dropped"] == 0


def test_dropped_is_what_training_would_drop() -> None:
    model = architecture(top_k=2, capacity_factor=0.5).build(seed=0)
    (row,) = validate(model, corpus(), RECIPE).routing
    assert row["dropped"] >= 0.5
    (free,) = validate(architecture(top_k=2).build(seed=0), corpus(), RECIPE).routing
    assert row["load"] == free["load"]


# --- routing over training ---------------------------------------------------------------------


def with_domains() -> Corpus:
    """The corpus above in three domains, in turns of 100 tokens."""
    turns = {"train": 50, "val": 10}
    plain = table({split: [("abc"[i % 3], 100) for i in range(n)] for split, n in turns.items()})
    assert plain is not None
    return replace(corpus(), domains=Domains.parse(plain))


def test_a_row_has_the_routing_since_the_row_before() -> None:
    recipe = replace(RECIPE, tokens=100 * 64, warmup=0.0, decay=0.0)
    model = architecture(top_k=2, capacity_factor=0.5).build(seed=0)
    (layer, moe), *_ = model.moe_layers()
    loads, dropped = [], []

    def note(module: Any, given: Any, output: Any) -> None:
        loads.append(moe.routing.load.tolist())
        dropped.append(float(moe.routing.dropped))

    model.blocks[1].register_forward_hook(note)
    rows = list(train(model, with_domains(), recipe, 0))
    ends = [row["tokens"] // 64 for row in rows]
    for start, end, row in zip([0, *ends], ends, rows, strict=False):
        (routing,) = row["routing"]
        total = np.array(loads[start:end]).sum(axis=0)
        assert routing["layer"] == layer == 1
        assert routing["load"] == pytest.approx((total / total.sum()).tolist(), abs=1e-4)
        assert routing["dropped"] == pytest.approx(np.mean(dropped[start:end]), abs=1e-4)
        assert {"max_vio", "cv", "entropy", "dead", "logit_rms", "logit_max"} <= routing.keys()
        assert ("domains" in routing) is (row is rows[-1])
    shares = rows[-1]["routing"][0]["domains"]
    assert set(shares) == {"a", "b", "c"}
    assert all(sum(share) == pytest.approx(1, abs=1e-3) for share in shares.values())


def test_a_dense_model_has_no_routing() -> None:
    dense = replace(architecture(), blocks=architecture().blocks[:1])
    (row, *_) = train(dense.build(seed=0), with_domains(), RECIPE, 0)
    assert "routing" not in row
    assert validate(dense.build(seed=0), with_domains(), RECIPE).routing == []


def test_domains_do_not_change_the_weights() -> None:
    digests = set()
    for data in (corpus(), with_domains()):
        model = architecture().build(seed=0)
        list(train(model, data, RECIPE, 0))
        digests.add(digest(model))
    assert len(digests) == 1


def test_validation_says_where_each_domain_goes() -> None:
    model, _ = trained()
    (row,) = validate(model, with_domains(), RECIPE).routing
    (_, moe), *_ = model.moe_layers()
    counts = torch.zeros(3, 4)
    model.eval()
    sizes = (16, 1, 320)
    both = zip(corpus().val_batches(*sizes), with_domains().val_domains(*sizes), strict=True)
    for (tokens, _), where in both:
        model(tokens)
        assert where is not None
        for domain, experts in zip(where.flatten(), moe.routing.choice.experts, strict=True):
            counts[domain, experts] += 1
    shares = counts / counts.sum(dim=1, keepdim=True)
    for name, share in zip(with_domains().domains.names, shares.tolist(), strict=True):  # type: ignore[union-attr]
        assert row["domains"][name] == pytest.approx(share, abs=1e-4)


def collapsing() -> Model:
    """All tokens of layer 1 go to expert 2, whatever is learned."""
    model = architecture(top_k=1, logit_bias=True, balance="none").build(seed=0)
    (_, moe), *_ = model.moe_layers()
    moe.router.logits.bias.data[2] = 50.0
    return model


def test_a_collapse_ends_the_run_with_layer_share_and_step() -> None:
    recipe = replace(RECIPE, tokens=200 * 64, max_dead=0.7)
    rows: list[CurvePoint] = []
    with pytest.raises(CollapsedError, match=r"75% of the experts of layer 1 were dead at step 39"):
        rows.extend(train(collapsing(), corpus(), recipe, 0))
    # 20 steps warm up, and a verdict is over 4 rows of 5 steps.
    assert rows[-1]["tokens"] == 40 * 64, "the row that shows it is given"
    assert rows[-1]["routing"][0]["dead"] == 3


def test_a_collapse_is_known_at_its_row_and_after_a_checkpoint() -> None:
    recipe = replace(RECIPE, tokens=200 * 64, max_dead=0.7)
    run = TrainingRun(TrainingInputs(collapsing(), corpus(), recipe, 0))
    for point in run.points():
        if point["tokens"] == 30 * 64:
            saved = checkpoint.save(run)
        if point["tokens"] == 40 * 64:
            with pytest.raises(CollapsedError):
                run.require_alive()  # a run does not pause at this row
            break
        run.require_alive()
    resumed = TrainingRun(TrainingInputs(collapsing(), corpus(), recipe, 0))
    checkpoint.restore(resumed, saved)
    with pytest.raises(CollapsedError, match=r"75% of the experts of layer 1 were dead at step 39"):
        list(resumed.points())


@pytest.mark.parametrize("max_dead", [0.75, 1.0, None])
def test_a_collapse_that_is_allowed_ends_nothing(max_dead: float | None) -> None:
    recipe = replace(RECIPE, tokens=80 * 64, max_dead=max_dead)
    assert len(list(train(collapsing(), corpus(), recipe, 0))) == 40
