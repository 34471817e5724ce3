"""Real jobs from end to end, on a tiny architecture and a small corpus."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from jobs import MIXER, MOE, PLAIN, RECIPE, MakeJob, guest

from moenas.data import loading as data
from moenas.data.corpus import Corpus
from moenas.evaluate.job import evaluate
from moenas.evaluate.subject import excerpts
from moenas.evaluate.training import validate
from moenas.model import MoEFFN
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Failure, WeightsFile
from moenas.resources import sha256
from moenas.store.weights import place


def failure(evaluation: Evaluation) -> Failure:
    assert evaluation.status == "failed"
    assert evaluation.failure is not None
    return evaluation.failure


def test_a_job_gives_all_its_values_and_the_trained_weights(make_job: MakeJob) -> None:
    names = ["load_imbalance", "val_loss", "decode_ms", "flops_per_token", "active_params"]
    job = make_job(*names)
    evaluation, weights = evaluate(job)
    assert evaluation.failure is None
    assert (evaluation.study, evaluation.trial, evaluation.attempt, evaluation.seed) == (
        "bottles",
        3,
        1,
        0,
    )
    assert set(evaluation.values) == set(evaluation.measurements) == set(names)
    one = Architecture.parse(PLAIN)
    assert evaluation.fingerprint == one.fingerprint
    assert evaluation.cost == one.cost(16).plain()
    assert evaluation.values["active_params"] == evaluation.cost["active_params"]
    assert evaluation.values["flops_per_token"] == evaluation.cost["flops_per_token"]
    assert evaluation.measurements["decode_ms"]["unit"] == "ms/step"
    assert evaluation.measurements["decode_ms"]["n"] == 3
    assert (
        evaluation.metrics["val_loss"]
        == evaluation.values["val_loss"]
        == evaluation.curve[-1]["val_loss"]
    )
    assert evaluation.metrics["bits_per_byte"] == pytest.approx(
        evaluation.values["val_loss"] / math.log(2)
    )
    assert {"train_loss", "lr", "tokens_per_second", "bigram_loss"} <= evaluation.metrics.keys()
    assert [row["tokens"] for row in evaluation.curve] == [64 * step for step in range(1, 9)]
    assert [row["layer"] for row in evaluation.routing] == [1]
    assert evaluation.values["load_imbalance"] == evaluation.routing[0]["max_vio"]
    assert evaluation.seconds.keys() == {
        *("data", "build", "causality", "train", "validate", "measure", "total")
    }
    assert evaluation.data["sha256"] == job.data_sha256
    assert {"python", "torch", "moenas", "cpu"} <= evaluation.versions.keys()
    assert evaluation.device["dtype"] == "float32"
    assert (
        Evaluation.parse(json.loads(json.dumps(evaluation.plain(), allow_nan=False))) == evaluation
    )
    assert weights is not None
    assert evaluation.weights_sha256 == sha256(weights)


def test_rungs_add_losses_to_the_curve_and_change_nothing_else(make_job: MakeJob) -> None:
    plain, weights = evaluate(make_job("val_loss"))
    evaluation, same = evaluate(make_job("val_loss", train=replace(RECIPE, rungs=3).plain()))
    assert isinstance(weights, bytes)
    assert isinstance(same, bytes)
    assert safetensors.torch.load(same).keys() == safetensors.torch.load(weights).keys()
    for name, tensor in safetensors.torch.load(same).items():
        assert torch.equal(tensor, safetensors.torch.load(weights)[name])
    assert evaluation.values == plain.values
    measured = [row["tokens"] for row in evaluation.curve if "val_loss" in row]
    assert measured == [64 * step for step in (2, 4, 6, 8)]
    assert evaluation.curve[-1]["val_loss"] == evaluation.values["val_loss"]


def test_the_weights_are_written_where_the_job_says(make_job: MakeJob, tmp_path: Path) -> None:
    to = place(tmp_path / "runs", "bottles", 3)
    job = make_job("val_loss", guests={"broken": guest("1 / 0", "training")}, weights_to=to)
    evaluation, file = evaluate(job)
    assert evaluation.failure is not None
    assert isinstance(file, WeightsFile)
    assert evaluation.weights_sha256 == file.sha256 == sha256(Path(file.path).read_bytes())
    with safetensors.safe_open(file.path, "pt") as opened:
        assert opened.metadata()["fingerprint"] == evaluation.fingerprint
    interrupted = guest("(_ for _ in ()).throw(KeyboardInterrupt)", "training")
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_job("val_loss", guests={"interrupted": interrupted}, weights_to=to))
    assert [str(path) for path in (tmp_path / "runs").rglob(".*")] == [file.path]


def test_the_weights_give_the_stored_loss_again(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("val_loss")
    evaluation, weights = evaluate(job)
    assert weights is not None
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["fingerprint"] == evaluation.fingerprint
    assert (metadata["study"], metadata["trial"]) == ("bottles", "3")
    model = Architecture.parse(job.architecture).build(seed=77)
    state = safetensors.torch.load(weights)
    assert "blocks.1.ffn.balance.bias" in state  # a buffer, not a parameter
    model.load_state_dict(state)
    assert validate(model, data.load(job.data), RECIPE).loss == evaluation.values["val_loss"]


def test_a_job_repeats_to_the_last_bit_and_counting_does_not_disturb(make_job: MakeJob) -> None:
    first, weights = evaluate(make_job("val_loss"))
    names = ("peak_memory", "flops_per_token", "val_loss", "prefill_ms")
    again, same = evaluate(make_job(*names))
    assert first.values["val_loss"] == again.values["val_loss"]
    assert weights is not None
    assert same is not None
    assert safetensors.torch.load(weights).keys() == safetensors.torch.load(same).keys()
    for name, value in safetensors.torch.load(weights).items():
        assert torch.equal(value, safetensors.torch.load(same)[name])
    other, _ = evaluate(make_job("val_loss", seed=1))
    assert other.values["val_loss"] != first.values["val_loss"]


@pytest.mark.parametrize(
    ("objective", "built"), [("total_params", 0), ("flops_per_token", 0), ("val_loss", 1)]
)
def test_nothing_is_built_or_trained_that_no_objective_needs(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, objective: str, built: int
) -> None:
    calls = []
    build = Architecture.build

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return build(*args, **kwargs)

    monkeypatch.setattr(Architecture, "build", counting)
    monkeypatch.setattr("moenas.evaluate.flops.SMALL_PARAMS", 0)  # counted on the meta device
    evaluation, weights = evaluate(make_job(objective))
    assert evaluation.status == "complete"
    assert list(evaluation.values) == [objective]
    assert len(calls) == built
    trained = objective == "val_loss"
    assert (weights is not None) == bool(evaluation.curve) == bool(evaluation.metrics) == trained


def test_cheap_objectives_are_measured_first(make_job: MakeJob) -> None:
    broken = guest("1 / 0", "model")
    evaluation, weights = evaluate(make_job("val_loss", "total_params", guests={"broken": broken}))
    assert failure(evaluation).kind == "error"
    assert set(evaluation.values) == {"total_params"}
    assert evaluation.curve == []
    assert weights is None


def test_a_guest_sees_what_it_needs(make_job: MakeJob) -> None:
    guests = {
        "layers": guest("len(subject.architecture.layers)"),
        "numbers": guest("sum(p.numel() for p in subject.model.parameters())", "model"),
        "gap": guest("subject.training.val_loss - subject.training.train_loss", "training"),
    }
    evaluation, _ = evaluate(make_job(guests=guests))
    assert evaluation.values["layers"] == 2
    assert evaluation.values["numbers"] == evaluation.cost["params"]
    gap = evaluation.metrics["val_loss"] - evaluation.metrics["train_loss"]
    assert evaluation.values["gap"] == gap
    assert evaluation.measurements["layers"] == {"unit": "things"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (guest("1 / 0"), "objective 'x': x.py:8: ZeroDivisionError: division by zero"),
        (guest("float('nan')"), "x.py:7: measure gave nan; give back a finite number"),
        (guest("float('inf')", "training"), "gave inf"),
        (guest("subject.model"), 'write needs = "model"'),
        (guest("subject.training", "model"), 'write needs = "training"'),
    ],
)
def test_a_failing_guest_is_a_row_with_a_reason(make_job: MakeJob, source: str, words: str) -> None:
    evaluation, weights = evaluate(make_job("total_params", guests={"x": source}))
    reason = failure(evaluation)
    assert reason.kind == "error"
    assert words in reason.message
    assert "\n" not in reason.message
    assert ("ZeroDivisionError" in reason.traceback) == ("1 / 0" in source)
    assert "x" not in evaluation.values
    assert evaluation.values["total_params"] == evaluation.cost["params"]
    # A trained model can be measured again.
    assert (weights is not None) == (evaluation.metrics != {})


def test_a_broken_guest_file_refuses_the_job(make_job: MakeJob) -> None:
    evaluation, _ = evaluate(make_job(guests={"x": guest("0").replace("direction", "way")}))
    assert failure(evaluation).kind == "refused"
    assert failure(evaluation).message.startswith("x.py:1: direction is missing")


def test_another_corpus_is_a_fault_of_the_machine(make_job: MakeJob) -> None:
    evaluation, _ = evaluate(make_job("total_params", data_sha256="0" * 64))
    assert failure(evaluation).kind == "environment"
    assert "another corpus than the study" in failure(evaluation).message
    assert evaluation.values == {}


def test_a_node_without_the_corpus_is_named_with_file_and_digest(make_job: MakeJob) -> None:
    job = make_job("total_params", data_sha256="ab" * 32)
    job = replace(job, data={"kind": "files", "files": ["/nowhere/corpus.txt"]})
    message = failure(evaluate(job)[0]).message
    assert failure(evaluate(job)[0]).kind == "environment"
    assert f"node {os.uname().nodename}: the corpus {'ab' * 6} cannot be read here" in message
    assert "/nowhere/corpus.txt" in message
    assert "MOENAS_RUNS=URL" in message


@pytest.mark.parametrize(("limit", "needs"), [(1e-6, "cost"), (0.5, "training")])
def test_a_candidate_out_of_time_is_stopped(make_job: MakeJob, limit: float, needs: str) -> None:
    long = replace(RECIPE, tokens=10**9)
    job = make_job("val_loss", "total_params", time_limit_s=limit, train=long.plain())
    evaluation, weights = evaluate(job)
    assert failure(evaluation).kind == "timeout"
    assert "time limit" in failure(evaluation).message
    assert ("total_params" in evaluation.values) == (needs == "training")
    assert weights is None


def test_a_diverged_candidate_says_so(make_job: MakeJob) -> None:
    hot = replace(RECIPE, lr=1e15, grad_clip=0.0, warmup=0.0)
    evaluation, _ = evaluate(make_job("val_loss", train=hot.plain()))
    assert failure(evaluation).kind == "diverged"


@pytest.mark.parametrize(
    "error", ["MemoryError()", "RuntimeError('[enforce fail] DefaultCPUAllocator: no memory')"]
)
def test_running_out_of_memory_has_its_own_kind(make_job: MakeJob, error: str) -> None:
    source = guest("fail()") + f"\n\ndef fail():\n    raise {error}\n"
    assert failure(evaluate(make_job(guests={"x": source}))[0]).kind == "out_of_memory"


def test_a_count_that_contradicts_the_closed_form_fails(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = Architecture.cost
    monkeypatch.setattr(
        Architecture,
        "cost",
        lambda self, context: replace(cost(self, context), flops_per_token=1),
    )
    evaluation, _ = evaluate(make_job("flops_per_token"))
    assert "the closed form says 16;" in failure(evaluation).message


@pytest.mark.parametrize("context", [16, 67])
@pytest.mark.parametrize(
    "ffn",
    [
        MOE | {"n_zero_experts": 3},
        MOE | {"router": {"selection": "threshold", "top_k": 1}},
        MOE | {"n_experts": 3, "router": {"selection": "expert_choice", "allow_acausal": True}},
        MOE | {"router": {"selection": {"kind": "top_k", "n_groups": 2, "top_groups": 1}}},
        MOE | {"n_experts": 3, "router": {"selection": "sinkhorn", "allow_acausal": True}},
        MOE | {"n_experts": 3, "router": {"selection": "base", "top_k": 1, "allow_acausal": True}},
    ],
    ids=["zero experts", "threshold", "expert choice", "groups", "sinkhorn", "base"],
)
def test_rows_that_carry_nothing_are_foreseen_and_cost_nothing(
    make_job: MakeJob, ffn: dict[str, Any], context: int
) -> None:
    """A slot of a zero expert, or below its cut-off, is counted by a trace; the value is the cost."""
    mixer = {"kind": "mamba2", "n_heads": 2, "head_dim": 8, "d_state": 4}
    architecture = Architecture.parse({**PLAIN, "blocks": [{"mixer": mixer, "ffn": ffn}]})
    changes = {
        "architecture": architecture.plain(),
        "train": {**RECIPE.plain(), "context": context},
    }
    evaluation, _ = evaluate(make_job("flops_per_token", **changes))
    assert evaluation.failure is None
    assert evaluation.values["flops_per_token"] == architecture.cost(context).flops_per_token
    counted = 2 * evaluation.measurements["flops_per_token"]["macs"]
    assert counted == architecture.pass_flops(context)


@pytest.mark.parametrize("selection", ["top_k", "expert_choice", "threshold"])
def test_a_row_too_many_is_an_error(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, selection: str
) -> None:
    """The count has to be exact, too, where not every row counts."""
    ffn = MOE | {"router": {"selection": selection, "top_k": 1, "allow_acausal": True}}
    architecture = Architecture.parse({**PLAIN, "blocks": [{"mixer": MIXER, "ffn": ffn}]})
    job = make_job("flops_per_token", architecture=architecture.plain())
    assert evaluate(job)[0].failure is None
    surplus = MoEFFN.surplus_flops
    row = 2 * 3 * 16 * 16
    monkeypatch.setattr(
        MoEFFN, "surplus_flops", lambda self, width, context: surplus(self, width, context) + row
    )
    wanted = architecture.pass_flops(16)
    assert f"the closed form says {wanted};" in failure(evaluate(job)[0]).message


def test_the_reference_of_the_study_is_used(make_job: MakeJob) -> None:
    first, _ = evaluate(make_job("prefill_ms"))
    key = first.measurements["prefill_ms"]["reference_key"]
    again, _ = evaluate(make_job("prefill_ms", reference_ms={key: 5000.0}))
    assert again.values["prefill_ms"] == 5000.0 * again.measurements["prefill_ms"]["ratio"]


def test_threads_are_set_for_the_job_and_put_back(make_job: MakeJob) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        source = guest("__import__('torch').get_num_threads()")
        evaluation, _ = evaluate(make_job(guests={"x": source}))
        assert evaluation.values["x"] == RECIPE.threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [3, 40])
def test_timed_text_comes_from_the_validation_split(size: int) -> None:
    val = torch.arange(100, 100 + size).numpy().astype("uint16")
    corpus = Corpus("x", val, val, 200, False, "", [None, None], {})
    tokens = excerpts(corpus, 2, 5)
    assert tokens.shape == (2, 5)
    assert tokens.dtype == torch.int64
    expected = [[100 + (start + i) % size for i in range(5)] for start in (0, size // 2)]
    assert tokens.tolist() == expected


# --- causality ---------------------------------------------------------------------------------


def later_tokens(module: Any, given: Any, y: torch.Tensor) -> torch.Tensor:
    return y + y.mean(dim=1, keepdim=True)


def leak_when(
    monkeypatch: pytest.MonkeyPatch, condition: Callable[[Any], bool], place: str = "blocks.0.ffn"
) -> None:
    """Give every model a part that looks at later tokens under a condition on it."""
    build = Architecture.build

    def leaky(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        hook = lambda m, given, y: later_tokens(m, given, y) if condition(m) else y  # noqa: E731
        model.get_submodule(place).register_forward_hook(hook)
        return model

    monkeypatch.setattr(Architecture, "build", leaky)


def test_a_leak_costs_nothing(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    leak_when(monkeypatch, lambda part: True)
    evaluation, weights = evaluate(make_job("val_loss", "total_params"))
    reason = failure(evaluation)
    assert reason.kind == "acausal"
    assert reason.message.startswith(
        "with its first weights, in training, layer 0 (blocks.0.ffn) looks ahead"
    )
    assert weights is None
    assert evaluation.curve == []
    assert "train" not in evaluation.seconds
    assert set(evaluation.values) == {"total_params"}


def test_a_leak_that_comes_with_training_is_found_before_the_loss(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Architecture.parse(PLAIN).build(seed=0).blocks[0].ffn.up.weight.clone()
    leak_when(monkeypatch, lambda p: not p.training and not torch.equal(p.up.weight, start))
    evaluation, _ = evaluate(make_job("val_loss"))
    assert failure(evaluation).kind == "acausal"
    assert failure(evaluation).message.startswith("trained, in evaluation, layer 0 (blocks.0.ffn)")
    assert len(evaluation.curve) == 8
    assert "val_loss" not in evaluation.values
    assert "val_loss" not in evaluation.metrics
    assert "val_loss" not in evaluation.curve[-1]


def test_the_gate_changes_no_bit(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = {
        "selection": "noisy_top_k",
        "logits": {"kind": "linear", "jitter": 0.1},
        "capacity_factor": 1.0,
    }
    blocks = [{"mixer": MIXER, "ffn": MOE | {"router": routed}}]
    plain = Architecture.parse(PLAIN | {"blocks": blocks}).canonical().plain()
    first, weights = evaluate(make_job("val_loss", architecture=plain))
    monkeypatch.setattr("moenas.evaluate.job.find_leaks", lambda *given: [])
    again, same = evaluate(make_job("val_loss", architecture=plain))
    assert first.failure is None
    assert first.values == again.values
    assert [r["train_loss"] for r in first.curve] == [r["train_loss"] for r in again.curve]
    assert first.routing == again.routing
    assert weights is not None
    assert same is not None
    others = safetensors.torch.load(same)
    assert all(torch.equal(w, others[n]) for n, w in safetensors.torch.load(weights).items())


@pytest.mark.parametrize(
    ("selection", "modes"),
    [("expert_choice", ["training", "evaluation"]), ("sinkhorn", ["training"])],
)
def test_a_loss_with_leave_to_look_ahead_is_marked(
    make_job: MakeJob, selection: str, modes: list[str]
) -> None:
    router = {"selection": selection, "allow_acausal": True}
    blocks = [{"mixer": MIXER, "ffn": MOE | {"router": router}}]
    plain = Architecture.parse(PLAIN | {"blocks": blocks}).canonical().plain()
    evaluation, _ = evaluate(make_job("val_loss", architecture=plain))
    assert evaluation.failure is None
    assert evaluation.metrics["causal"] == 0
    assert evaluation.measurements["val_loss"]["acausal"] == modes
    causal, _ = evaluate(make_job("val_loss"))
    assert causal.metrics["causal"] == 1
    assert "acausal" not in causal.measurements["val_loss"]


def test_a_collapsed_candidate_says_so_and_keeps_its_curve(make_job: MakeJob) -> None:
    router = {"top_k": 1, "balance": "none"}
    blocks = [{"mixer": MIXER, "ffn": MOE | {"router": router}}]
    plain = Architecture.parse(PLAIN | {"blocks": blocks}).canonical().plain()
    recipe = replace(RECIPE, tokens=80 * 64, lr=0.5, max_dead=0.0, grad_clip=0.0)
    evaluation, weights = evaluate(make_job("val_loss", architecture=plain, train=recipe.plain()))
    assert failure(evaluation).kind == "collapsed"
    assert "% of the experts of layer 0 were dead at step" in failure(evaluation).message
    assert evaluation.curve[-1]["routing"][0]["layer"] == 0
    assert weights is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_job_runs_on_a_gpu(make_job: MakeJob, dtype: str) -> None:
    names = ("decode_ms", "prefill_ms", "peak_memory", "flops_per_token", "val_loss")
    recipe = replace(RECIPE, tokens=60 * 64, dtype=dtype)
    evaluation, weights = evaluate(make_job(*names, train=recipe.plain(), device="cuda"))
    assert evaluation.failure is None
    assert evaluation.device["kind"] == "cuda"
    assert evaluation.device["dtype"] == dtype
    assert evaluation.device["name"] in evaluation.measurements["decode_ms"]["reference_key"]
    assert evaluation.measurements["peak_memory"]["device"] == "cuda"
    assert evaluation.curve[-1]["train_loss"] < evaluation.curve[0]["train_loss"] - 0.5
    assert weights is not None


@pytest.mark.gpu
def test_a_gpu_without_room_fails_the_candidate_alone(make_job: MakeJob) -> None:
    """The estimate refuses a model that is too large; one that it lets pass fails in training."""
    huge = {**PLAIN, "d_model": 65_536}
    job = make_job("val_loss", architecture=Architecture.parse(huge).plain(), device="cuda")
    refused = failure(evaluate(job)[0])
    assert (refused.kind, "GiB free" in refused.message) == ("out_of_memory", True)
    share = 48 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share, 0)
    try:
        wide = {**PLAIN, "d_model": 1024}
        job = make_job("val_loss", architecture=Architecture.parse(wide).plain(), device="cuda")
        assert failure(evaluate(job)[0]).kind == "out_of_memory"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    evaluation, _ = evaluate(make_job("val_loss", device="cuda"))
    assert evaluation.failure is None


def test_a_candidate_that_cannot_fit_is_not_built(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moenas.evaluate.footprint.free_bytes", lambda device: 2**16)
    monkeypatch.setattr(Architecture, "build", None)
    monkeypatch.setattr("moenas.evaluate.flops.SMALL_PARAMS", 0)  # counted on the meta device
    for name in ("val_loss", "peak_memory"):
        evaluation, weights = evaluate(make_job("flops_per_token", name))
        assert failure(evaluation).kind == "out_of_memory"
        assert re.search(
            r"needs at least .* of memory, .* has 0 MiB free", failure(evaluation).message
        )
        assert weights is None
    assert "flops_per_token" in evaluation.values


HARM = '''"""Harms what it is shown."""
import os, random, sys, torch

direction = "minimize"
unit = ""
needs = "{needs}"


def measure(subject):
    {body}
    return 1.0
'''
HARMS = {
    "weights": "[p.data.zero_() for p in subject.model.parameters()]",
    "buffers": "[b.zero_() for b in subject.model.buffers()]",
    "layers": "del subject.model.blocks[0]",
    "modes": "torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64)",
    "results": "subject.trained and subject.training.curve.clear()",
    "environment": "os.environ.clear(); os.chdir('/'); random.seed(0)",
}


@pytest.mark.parametrize("needs", ["model", "training"])
@pytest.mark.parametrize("harm", HARMS)
def test_an_objective_of_the_user_cannot_harm_the_others(
    make_job: MakeJob, harm: str, needs: str
) -> None:
    names = ("val_loss", "load_imbalance")
    clean, weights = evaluate(make_job(*names))
    source = HARM.format(needs=needs, body=HARMS[harm])
    before = dict(os.environ), os.getcwd()
    job = make_job(guests={"a_harm": source})
    job = replace(job, objectives={"a_harm": source, **dict.fromkeys(names), "z_harm": source})
    evaluation, same = evaluate(job)
    assert evaluation.failure is None
    assert {name: evaluation.values[name] for name in names} == clean.values
    assert [row["train_loss"] for row in evaluation.curve] == [
        row["train_loss"] for row in clean.curve
    ]
    assert weights is not None
    assert same is not None
    one, other = safetensors.torch.load(weights), safetensors.torch.load(same)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (dict(os.environ), os.getcwd()) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("call", ["sys.exit(0)", "raise GeneratorExit", "raise SystemExit"])
def test_what_ends_an_interpreter_is_a_failure_of_the_candidate(
    make_job: MakeJob, call: str
) -> None:
    evaluation, _ = evaluate(make_job(guests={"x": HARM.format(needs="cost", body=call)}))
    assert failure(evaluation).kind == "error"
    assert failure(evaluation).message.startswith("objective 'x': x.py:10: ")


def test_names_of_a_timed_latency_are_kept_for_it(make_job: MakeJob) -> None:
    """A study moves such a value to its reference time, so a user's objective must give one that
    fits."""
    imports = "import moenas; m = subject.time('prefill'); d = m.details; "
    bodies = {
        "timed": "return m",
        "same": "return moenas.Measurement(m.value, {**d, 'note': 1})",
        "half": "return moenas.Measurement(m.value / 2, d)",
        "own": "return moenas.Measurement(1.0, {'reference_key': 'cpu'})",
        "odd": "return moenas.Measurement(1.0, {'reference_key': [1], 'reference_ms': 'x'})",
    }
    guests = {
        name: HARM.format(needs="training", body=imports + body) for name, body in bodies.items()
    }
    evaluation, _ = evaluate(make_job(guests=guests))
    assert evaluation.failure is None
    rows = evaluation.measurements
    assert {name for name, row in rows.items() if "reference_key" in row} == {"timed", "same"}
    assert rows["own"]["own_reference_key"] == "cpu"
    assert rows["half"]["own_ratio"] > 0


def test_faults_of_the_machine_are_told_from_those_of_the_candidate(
    make_job: MakeJob, tmp_path: Path
) -> None:
    for call, kind in [
        ("raise OSError(28, 'No space left on device', '/tmp/x')", "environment"),
        ("open('/no/such/file')", "error"),
    ]:
        evaluation, _ = evaluate(make_job(guests={"x": HARM.format(needs="cost", body=call)}))
        assert failure(evaluation).kind == kind
    job = make_job("total_params")
    (tmp_path / "text.txt").write_text("another text\n" * 1000)
    assert failure(evaluate(job)[0]).kind == "environment"
    (tmp_path / "text.txt").unlink()
    evaluation, _ = evaluate(job)
    assert failure(evaluation).kind == "environment"
    assert "text.txt" in failure(evaluation).message


@pytest.mark.parametrize(
    ("call", "shipped"),
    [("flops()", "flops_per_token"), ("peak_memory()", "peak_memory")],
)
def test_a_file_that_calls_a_former_method_measures_what_is_shipped(
    make_job: MakeJob, call: str, shipped: str
) -> None:
    evaluation, _ = evaluate(make_job(shipped, guests={"x": guest(f"subject.{call}", "model")}))
    assert evaluation.values["x"] == evaluation.values[shipped]
    assert evaluation.measurements["x"] | {"unit": ""} == evaluation.measurements[shipped] | {
        "unit": ""
    }
