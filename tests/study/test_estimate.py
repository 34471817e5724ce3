"""The cost of a study is counted exactly, and its time follows from measurements."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from studies import SMALL, fake, scripted, space

from moenas.data.loading import load
from moenas.errors import InputError
from moenas.evaluate import devices
from moenas.records import Evaluation, Job
from moenas.space.space import Space
from moenas.study.estimate import estimate
from moenas.study.launch import dry_run, run

pytestmark = pytest.mark.usefixtures("study_folder")

ONE = """
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - {mixer: {kind: attention, head_dim: 8}, ffn: {kind: dense, activation: swiglu, d_ff: 64}}
"""
"""A space of one point."""


def one(more: str = "", name: str = "s") -> Space:
    return space(ONE, more, name).with_search(workers=2, gpus=0.0)


def flops(wanted: Space) -> int:
    """Forward operations of a token of the one architecture."""
    return wanted.cost(wanted.require_feasible()).flops_per_token


def test_tokens_and_operations_are_those_of_the_recipe() -> None:
    estimated = estimate(one(), trials=10)
    assert estimated.train_tokens == 10 * 512
    assert estimated.train_flops == 10 * 512 * 3 * flops(one())
    assert estimated.hours is None
    assert "run --dry-run" in estimated.basis
    assert estimated.lines()[0].startswith("estimate for 10 candidates: 5.12k training tokens")


def test_replicates_are_counted() -> None:
    wanted = Space.parse(one().text.replace("seed: 3", "seed: 3, replicates: 3"), "s.yaml")
    estimated = estimate(wanted, trials=9)
    assert estimated.replicates == 2 * 6, "a front of twice the root of 9"
    assert estimated.train_tokens == (9 + 2 * 6) * 512
    assert estimated.train_flops == (9 + 2 * 6) * 512 * 3 * flops(wanted)
    assert estimated.lines()[0].startswith(
        "estimate for 9 candidates and about 12 replicates: 10.8k"
    )


@pytest.mark.usefixtures("jobs")
def test_a_finished_study_has_the_replicates_of_its_front_left() -> None:
    text = space(SMALL, name="s").text
    more = text.replace("seed: 3", "seed: 3, replicates: 3")
    study = run(Space.parse(text, "s.yaml"), trials=5, workers="inline")
    estimate = dry_run(Space.parse(more, "s.yaml"), trials=5)
    assert (estimate.candidates, estimate.replicates) == (0, 2 * len(study.front()))
    run(Space.parse(more, "s.yaml"), trials=5, workers="inline")
    assert len(study.store.replicates("s")) == 2 * len(study.front())
    assert dry_run(Space.parse(more, "s.yaml"), trials=5).replicates == 0


def test_a_space_without_training_trains_nothing() -> None:
    text = one().text.replace("val_loss, flops_per_token", "flops_per_token")
    estimated = estimate(Space.parse(text, "s.yaml"))
    assert (estimated.train_tokens, estimated.train_flops, estimated.hours) == (0.0, 0.0, None)
    assert estimated.basis == "no objective trains the candidates"


def trained(seconds: float) -> Evaluation:
    """An evaluation of this device that trained for some seconds, and took 2 s more."""
    info = devices.device_info(torch.device("cpu"), 1, torch.float32)
    curve = [{"tokens": 512, "train_loss": 2.0}]
    times = {"train": seconds, "total": seconds + 2.0}
    return Evaluation("", 0, 0, "complete", "", curve=curve, seconds=times, device=info)


def test_hours_are_those_of_stored_evaluations_on_this_device() -> None:
    seconds = iter((1.0, 2.0, 4.0, 8.0, 16.0))

    def script(job: Job) -> Evaluation:
        known = trained(next(seconds))
        evaluation = fake(job)[0]
        return dataclasses.replace(
            evaluation, curve=known.curve, seconds=known.seconds, device=known.device
        )

    spread = ONE.replace("d_ff: 64", "d_ff: {int: [56, 88], step: 8}")
    other = space(spread, "", "other").with_search(sampler="grid")
    text = other.text.replace("train: {", "train: {dtype: float32, ")
    run(Space.parse(text, "o.yaml").with_search(sampler="grid"), trials=5, pool=scripted(script))
    wanted = Space.parse(one().text.replace("train: {", "train: {dtype: float32, "), "s.yaml")
    estimated = estimate(wanted.with_search(workers=2, gpus=0.0), trials=10)
    assert estimated.basis.startswith("5 evaluations of similar size in this database on ")
    # By hand: the median candidate trains about 4 s and takes 2 s more; 10 on 2 workers are 5 each.
    assert estimated.hours == pytest.approx(5 * (4 + 2) / 3600, rel=0.25)
    assert estimated.hours_low == pytest.approx(5 * (2 + 2) / 3600, rel=0.25)
    assert estimated.hours_high == pytest.approx(5 * (8 + 2) / 3600, rel=0.25)
    larger = Space.parse(
        one().text.replace("train: {tokens: 512", "train: {dtype: float32, tokens: 51_200"),
        "s.yaml",
    )
    assert estimate(larger).hours is None, "candidates of another size say nothing"


def test_a_probe_trains_the_candidate_and_writes_nothing() -> None:
    wanted = one()
    before = sorted(Path().iterdir())
    estimate = dry_run(wanted, trials=40, workers="inline")
    assert sorted(Path().iterdir()) == before
    assert estimate.basis.startswith("a probe: 8 training steps of the candidate of median cost")
    assert estimate.hours is not None
    assert estimate.hours_low is not None
    assert estimate.hours_high is not None
    assert 0 < estimate.hours_low <= estimate.hours <= estimate.hours_high
    assert estimate.workers == 1
    real = run(wanted, trials=1, workers="inline")
    seconds = real.evaluation(0).seconds["train"]
    assert estimate.hours * 3600 / 40 == pytest.approx(seconds, rel=20)
    assert dry_run(wanted, trials=40, workers="inline").candidates == 39
    assert dry_run(wanted, trials=1, workers="inline").candidates == 0


def test_a_dry_run_refuses_what_a_run_refuses() -> None:
    with pytest.raises(InputError, match=r"search\.sampler"):
        dry_run(one().with_search(sampler="tpee"))
    with pytest.raises(InputError, match="no such file"):
        dry_run(one().with_search(start_from=("./none.yaml",)))
    run(one(), trials=1, pool=scripted(lambda job: fake(job)[0]))
    text = one().text.replace("d_ff: 64", "d_ff: 72")
    with pytest.raises(InputError, match="begun with another space"):
        dry_run(Space.parse(text, "s.yaml"))
    assert not list(Path().glob("moenas.db.*"))


def test_a_candidate_that_does_not_fit_has_no_time() -> None:
    huge = ONE.replace("d_model: 32", "d_model: 65536").replace("d_ff: 64", "d_ff: 1048576")
    wanted = space(huge.replace("head_dim: 8", "head_dim: 64"))
    estimated = estimate(wanted.with_search(gpus=0.0), load(wanted.data))
    assert estimated.hours is None
    assert estimated.basis.startswith("the probe failed: ")
