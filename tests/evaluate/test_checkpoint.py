"""A run that is saved at a rung and restored in another process ends as one that never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from jobs import PLAIN, RECIPE, MakeJob, guest, without_times

from moenas.errors import CandidateError
from moenas.evaluate import checkpoint
from moenas.evaluate.job import evaluate
from moenas.evaluate.steps import TrainingInputs
from moenas.evaluate.training import TrainingRun
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Job, Plain, WeightsFile
from moenas.store.weights import place

TRAIN = replace(RECIPE, rungs=3, max_dead=0.99).plain()
ROUTERS: list[Plain] = [
    {"top_k": 2, "balance": "bias"},
    {"top_k": 2, "selection": "noisy_top_k", "balance": "importance_load"},
    {"preset": "switch"},
    {"selection": {"kind": "expert_choice"}, "allow_acausal": True},
]
RESUME = """
import json, sys
from pathlib import Path
from moenas.evaluate.job import evaluate
from moenas.records import Job
folder = Path(sys.argv[1])
job = Job.parse(json.loads((folder / "job.json").read_text()))
job = Job.parse({**job.plain(), "checkpoint": (folder / "checkpoint").read_bytes()})
evaluation, weights = evaluate(job)
(folder / "evaluation.json").write_text(json.dumps(evaluation.plain()))
(folder / "weights").write_bytes(weights)
"""


def architecture(router: Plain) -> Plain:
    """The small model of `jobs` with another router."""
    dense, moe = PLAIN["blocks"]
    blocks = [dense, {**moe, "ffn": {**moe["ffn"], "router": router}}]
    return Architecture.parse({**PLAIN, "blocks": blocks}).canonical().plain()


def in_another_process(job: Job, folder: Path) -> tuple[Evaluation, bytes]:
    """Evaluate a job in a fresh process."""
    assert job.checkpoint is not None
    (folder / "job.json").write_text(json.dumps({**job.plain(), "checkpoint": None}))
    (folder / "checkpoint").write_bytes(job.checkpoint)
    subprocess.run([sys.executable, "-c", RESUME, str(folder)], check=True, timeout=120)
    evaluation = Evaluation.parse(json.loads((folder / "evaluation.json").read_text()))
    return evaluation, (folder / "weights").read_bytes()


def continued(job: Job, evaluation: Evaluation, weights: Any, **changes: Any) -> Job:
    """The job that continues where another one paused."""
    assert evaluation.status == "paused"
    assert isinstance(weights, bytes)
    return replace(job, paused=evaluation.plain(), checkpoint=weights, **changes)


def assert_same(one: tuple[Evaluation, Any], other: tuple[Evaluation, Any]) -> None:
    """Both ended with the same values, curve, routing and weights."""
    assert without_times(one[0]) == without_times(other[0])
    first, second = safetensors.torch.load(one[1]), safetensors.torch.load(other[1])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_that_pauses_at_each_rung_ends_as_one_that_does_not(
    make_job: MakeJob, router: Plain
) -> None:
    job = make_job("flops_per_token", "val_loss", architecture=architecture(router), train=TRAIN)
    whole = evaluate(job)
    assert whole[0].failure is None
    job = replace(job, rung_limits=[None, None, None])
    evaluation, weights = evaluate(job)
    for rung in (1, 2, 3):
        assert (evaluation.status, evaluation.metrics["rung"]) == ("paused", rung)
        assert evaluation.curve == [
            {**row, "seconds": evaluation.curve[i]["seconds"]}
            for i, row in enumerate(whole[0].curve[: 2 * rung])
        ]
        assert evaluation.metrics["rung_loss"] == evaluation.curve[-1]["val_loss"]
        assert evaluation.values.keys() == {"flops_per_token"}
        torch.manual_seed(rung)  # whatever else the process did meanwhile
        evaluation, weights = evaluate(continued(job, evaluation, weights))
    assert_same((evaluation, weights), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("router", ROUTERS[:1] + ROUTERS[2:])
def test_a_run_on_a_gpu_continues_to_the_last_bit(make_job: MakeJob, router: Plain) -> None:
    """Steps before a pause and after it are replayed from graphs of their own."""
    train = replace(RECIPE, rungs=1, tokens=120 * 64, max_dead=0.99, dtype="bfloat16").plain()
    job = make_job("val_loss", architecture=architecture(router), train=train, device="cuda")
    whole = evaluate(job)
    assert whole[0].failure is None
    evaluation, weights = evaluate(replace(job, rung_limits=[None]))
    assert_same(evaluate(continued(job, evaluation, weights)), whole)


def test_another_process_continues_to_the_last_bit(make_job: MakeJob, tmp_path: Path) -> None:
    plain = architecture(ROUTERS[1])
    clock = {"clock": guest("__import__('time').time()", "model")}
    job = make_job("val_loss", guests=clock, architecture=plain, train=TRAIN)
    whole = evaluate(replace(job, objectives={"val_loss": None}))
    evaluation, weights = evaluate(replace(job, rung_limits=[None, None, None]))
    assert evaluation.metrics["rung"] == 1
    assert evaluation.values.keys() == {"clock"}
    measured = evaluation.values["clock"]
    evaluation, weights = in_another_process(continued(job, evaluation, weights), tmp_path)
    assert evaluation.values.pop("clock") == measured  # it is not measured again
    del evaluation.measurements["clock"]
    assert_same((evaluation, weights), whole)
    assert evaluation.seconds["train"] > whole[0].seconds["train"] / 100
    assert evaluation.seconds["checkpoint"] > 0


def test_a_job_continues_by_itself_below_its_limit(make_job: MakeJob) -> None:
    job = make_job("val_loss", train=TRAIN)
    losses = [row["val_loss"] for row in evaluate(job)[0].curve if "val_loss" in row]
    evaluation, _ = evaluate(replace(job, rung_limits=[losses[0], losses[1] - 1e-3, None]))
    assert (evaluation.status, evaluation.metrics["rung"]) == ("paused", 2)
    evaluation, _ = evaluate(replace(job, rung_limits=[losses[0], losses[1], losses[2]]))
    assert evaluation.status == "complete"


def test_the_time_before_a_pause_counts_towards_the_limit(make_job: MakeJob) -> None:
    job = make_job("val_loss", train=TRAIN, rung_limits=[None] * 3, time_limit_s=60.0)
    evaluation, weights = evaluate(job)
    late = {**evaluation.plain(), "seconds": {**evaluation.seconds, "total": 61.0}}
    evaluation, _ = evaluate(replace(job, paused=late, checkpoint=weights))
    assert evaluation.failure is not None
    assert evaluation.failure.kind == "timeout"


def test_a_checkpoint_is_a_file_where_the_job_says(make_job: MakeJob, tmp_path: Path) -> None:
    to = place(tmp_path / "runs", "bottles", 3)
    evaluation, file = evaluate(
        make_job("val_loss", train=TRAIN, rung_limits=[None] * 3, weights_to=to)
    )
    assert isinstance(file, WeightsFile)
    assert evaluation.weights_sha256 == file.sha256
    params = Architecture.parse(make_job("val_loss").architecture).cost(16).params
    assert 12 * params < file.size < 12 * params + 16_384  # three float32 numbers a parameter


def test_a_checkpoint_of_another_architecture_is_refused(make_job: MakeJob) -> None:
    job = make_job("val_loss", train=TRAIN, rung_limits=[None] * 3)
    evaluation, weights = evaluate(job)
    other = {**PLAIN, "d_model": 24}
    job = replace(job, architecture=Architecture.parse(other).canonical().plain())
    failed, _ = evaluate(continued(job, evaluation, weights))
    assert failed.failure is not None
    assert "the checkpoint is not one of this candidate" in failed.failure.message


def test_loads_of_the_collapse_detector_survive(make_job: MakeJob) -> None:
    """A detector that is judged over rows before and after a pause sees all of them."""
    from moenas.data import cache

    job = make_job("val_loss")
    corpus = cache.load(job.data, job.data_sha256)
    plain = Architecture.parse(job.architecture)
    recipe = replace(RECIPE, lr=0.01, warmup=0.0)
    run = TrainingRun(TrainingInputs(plain.build(seed=0), corpus, recipe, 0))
    points = run.points()
    next(points)
    next(points)
    saved = checkpoint.save(run)
    fresh = TrainingRun(TrainingInputs(plain.build(seed=1), corpus, recipe, 0))
    checkpoint.restore(fresh, saved)
    assert fresh.collapse.rows == run.collapse.rows == 2
    assert fresh.collapse.loads.keys() == run.collapse.loads.keys() == {1}
    assert torch.equal(fresh.collapse.loads[1], run.collapse.loads[1])
    with pytest.raises(CandidateError):
        checkpoint.restore(fresh, {})
