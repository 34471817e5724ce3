"""Recorded evaluations in simulated time: who ends when, and a study that is replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moenas import Space, Study, run
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Job
from moenas.workers.replay_pool import ReplayPool

SPACE = """
name: replayed
architecture:
  vocab_size: 256
  d_model: {int: [8, 2048], step: 8}
  blocks: [{mixer: {kind: attention, head_dim: 8}, ffn: {kind: dense, d_ff: 16}}]
objectives: [val_loss, total_params]
data: {files: [FOLDER/text.txt]}
train: {tokens: 64, context: 8, batch: 2, val_tokens: 16}
search: {sampler: random, trials: 12}
"""


def recorded(job: Job) -> tuple[Evaluation, float]:
    """A loss that falls with the width, and a second for each unit of it."""
    width = float(job.architecture["d_model"])
    evaluation = Evaluation(
        study=job.study,
        trial=job.trial,
        attempt=job.attempt,
        status="complete",
        fingerprint=Architecture.parse(job.architecture).fingerprint,
        values={"val_loss": 10 / width, "total_params": width},
        metrics={"val_loss": 10 / width},
        seconds={"train": width, "total": width},
        seed=job.seed,
    )
    return evaluation, width


def replay(folder: Path, workers: int) -> tuple[Study, ReplayPool]:
    folder.mkdir()
    (folder / "text.txt").write_text("to be read, not trained on\n" * 200)
    (folder / "space.yaml").write_text(SPACE.replace("FOLDER", str(folder)))
    pool = ReplayPool(recorded, workers)
    return run(
        Space.load(folder / "space.yaml"), storage=f"sqlite:///{folder}/x.db", pool=pool
    ), pool


def job(width: int, trial: int) -> Job:
    architecture = {
        "vocab_size": 256,
        "d_model": width,
        "blocks": [
            {"mixer": {"kind": "attention", "head_dim": 8}, "ffn": {"kind": "dense", "d_ff": 16}}
        ],
    }
    names = dict.fromkeys(["val_loss", "total_params"])
    return Job("s", trial, 1, architecture, names, {}, "", {}, {}, seed=0)


def test_jobs_end_in_the_order_of_simulated_time() -> None:
    pool = ReplayPool(recorded, 3)
    for trial, width in enumerate([32, 8, 16]):
        pool.submit(job(width, trial))
    assert pool.wait(0.0) == []
    ends = [(result.job.trial, pool.now) for _ in range(3) for result in pool.wait(1.0)]
    assert ends == [(1, 8.0), (2, 16.0), (0, 32.0)]
    pool.submit(job(8, 3))
    [result] = pool.wait(1.0)
    assert (result.job.trial, pool.now) == (3, 40.0)
    assert pool.wait(1.0) == []


def test_a_closed_pool_has_nothing_left() -> None:
    pool = ReplayPool(recorded, 1)
    pool.submit(job(8, 0))
    pool.close()
    assert pool.wait(1.0) == []


@pytest.mark.parametrize("workers", [1, 4])
def test_a_study_is_replayed_on_a_list_schedule(tmp_path: Path, workers: int) -> None:
    study, pool = replay(tmp_path / "a", workers)
    evaluations = sorted(study.view.evaluations, key=lambda evaluation: evaluation.trial)
    widths = [evaluation.values["total_params"] for evaluation in evaluations]
    assert len(widths) == 12
    # Oracle: each job goes to the worker that is free first.
    free = [0.0] * workers
    for width in widths:
        free[free.index(min(free))] += width
    assert pool.now == max(free)


def test_a_replay_repeats_exactly(tmp_path: Path) -> None:
    (first, one), (second, other) = replay(tmp_path / "a", 4), replay(tmp_path / "b", 4)
    assert one.now == other.now
    values = [[e.values for e in study.view.evaluations] for study in (first, second)]
    assert values[0] == values[1]
