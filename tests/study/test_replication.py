"""Members of the front are trained with further seeds, once each, and compared with their like."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import SMALL, assert_sound, fake, space

from moenas.errors import EnvironmentFaultError, SpaceError
from moenas.evaluate import devices
from moenas.evaluate import job as measure
from moenas.records import Failure, Job
from moenas.report.insights_text import insights_text
from moenas.report.seed_report import seed_report
from moenas.space.space import Space
from moenas.store import replicates
from moenas.study.insights import insights
from moenas.study.launch import Event, Study, load_study, run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were evaluated, by a stand-in whose losses depend on the seed."""
    seen: list[Job] = []

    def evaluate(job: Job) -> Any:
        seen.append(job)
        evaluation, weights = fake(job)
        noise = (job.seed * 7919 + job.trial * 104729) % 100 / 1000
        values = evaluation.values | {"val_loss": evaluation.values["val_loss"] + noise}
        layers = sum(group["repeat"] for group in job.architecture["blocks"])
        values["flops_per_token"] = float(job.architecture["d_model"] * layers)
        info = devices.device_info(torch.device("cpu"), 1, torch.float32)
        evaluation = dataclasses.replace(
            evaluation, values=values, seed=job.seed, device=info, versions=measure.versions()
        )
        return evaluation, weights if job.keeps_weights else None

    monkeypatch.setattr(measure, "evaluate", evaluate)
    return seen


def small(name: str = "s", count: int = 3, seed: int = 3) -> Space:
    text = space(SMALL, name=name).text.replace("train: {", "train: {dtype: float32, ")
    text = text.replace("seed: 3", f"seed: {seed}, replicates: {count}")
    return Space.parse(text, "s.yaml").with_search(sampler="grid", trials=6)


def seeds_of(study: Study) -> dict[int, list[int]]:
    seeds: dict[int, list[int]] = {}
    for row in study.store.replicates(study.name):
        seeds.setdefault(row.trial, []).append(row.seed)
    return seeds


def test_each_member_of_the_front_is_trained_with_the_next_seeds(evaluated: list[Job]) -> None:
    events: list[Event] = []
    study = run(small(), workers="inline", listeners=[events.append])
    assert_sound(study, 6)
    front = [member.trial for member in study.front()]
    assert len(front) > 2
    assert seeds_of(study) == {trial: [4, 5] for trial in sorted(front)}
    assert len(evaluated) == 6 + 2 * len(front)
    assert [job.keeps_weights for job in evaluated] == [True] * 6 + [False] * 2 * len(front)
    for row in study.store.replicates("s"):
        job = next(j for j in evaluated if (j.trial, j.seed) == (row.trial, row.seed))
        assert job.architecture == study.store.architecture("s", row.trial)
        assert row.values["val_loss"] != study.evaluation(row.trial).values["val_loss"]
    assert sum(event.kind == "replicated" for event in events) == 2 * len(front)
    assert events[-1].kind == "done"


def test_the_front_stays_that_of_the_search(evaluated: list[Job]) -> None:
    plain = run(small("plain", 1), workers="inline")
    study = run(small("more"), workers="inline", fresh=True)
    assert [m.values for m in plain.front()] == [m.values for m in study.front()]
    assert all(m.seeds == 1 and m.probability is None for m in plain.front())
    for member in study.front():
        rows = study.store.replicates("more")
        losses = [row.values["val_loss"] for row in rows if row.trial == member.trial]
        assert member.seeds == 3
        assert member.means is not None
        assert len(losses) == 2
        assert member.means["val_loss"] == pytest.approx(sum(losses) / 2)
        assert member.half_widths is not None
        assert member.half_widths["val_loss"] > 0
        assert member.half_widths["flops_per_token"] == 0
        assert member.probability is not None
        assert 0 <= member.probability <= 1


def test_an_interrupted_run_goes_on_with_what_is_missing(
    evaluated: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    add, stored = replicates.add, []

    def stop_after_two(store: Any, answer: Any) -> None:
        if len(stored) == 2:
            raise KeyboardInterrupt
        stored.append((answer.trial, answer.seed))
        add(store, answer)

    monkeypatch.setattr(replicates, "add", stop_after_two)
    with pytest.raises(Exception, match="Ctrl-C"):
        run(small(), workers="inline")
    monkeypatch.setattr(replicates, "add", add)
    before = len(evaluated)
    study = run(small(), workers="inline")
    front = len(study.front())
    assert len(evaluated) - before == 2 * front - 2
    assert sorted(map(len, seeds_of(study).values())) == [2] * front
    run(small(), workers="inline")
    assert len(evaluated) - before == 2 * front - 2, "nothing is left"


def test_a_finished_study_gets_replicates_later(evaluated: list[Job]) -> None:
    run(small(count=1), workers="inline")
    assert len(evaluated) == 6
    study = run(small(count=2), workers="inline")
    assert set(map(tuple, seeds_of(study).values())) == {(4,)}
    study = run(small(count=3), workers="inline")
    assert set(map(tuple, seeds_of(study).values())) == {(4, 5)}
    assert study.finished == "trials"


def test_evaluations_of_a_study_of_that_seed_are_replicates(evaluated: list[Job]) -> None:
    other = run(small("other", 1, seed=4), workers="inline")
    before = len(evaluated)
    study = run(small("s", 2), workers="inline")
    assert len(evaluated) == before + 6, "every replicate was found"
    for row in study.store.replicates("s"):
        assert row.reused_from is not None
        source = other.evaluation(row.reused_from["trial"])
        assert row.reused_from["study"] == "other"
        assert (row.values, row.seed) == (source.values, 4)
    third = run(small("third", 2), workers="inline")
    assert len(evaluated) == before + 6, "replicates are found as well"
    assert seeds_of(third) == seeds_of(study)


def test_only_like_is_compared_with_like(evaluated: list[Job]) -> None:
    study = run(small(), workers="inline")
    rows = study.store.replicates("s")
    other = dataclasses.replace(rows[0], device=rows[0].device | {"name": "Another CPU"})
    replicates.add(study.store, other)
    report = seed_report(study.store, "s")
    assert report is not None
    assert report["left_out"] == 1
    counted = {member["trial"]: member["seeds"] for member in report["members"]}
    assert counted.pop(other.trial) == 2
    assert set(counted.values()) <= {3}


def fail_seeds(monkeypatch: pytest.MonkeyPatch, seeds: tuple[int, ...], failure: Failure) -> None:
    """Let the evaluations with some seeds fail."""
    works = measure.evaluate

    def evaluate(job: Job) -> Any:
        evaluation, weights = works(job)
        if job.seed in seeds:
            evaluation = dataclasses.replace(
                evaluation, status="failed", values={}, failure=failure
            )
        return evaluation, weights

    monkeypatch.setattr(measure, "evaluate", evaluate)


def test_a_replicate_that_fails_is_a_row_with_a_reason(
    evaluated: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_seeds(monkeypatch, (5,), Failure("diverged", "the loss is not finite"))
    study = run(small(), workers="inline")
    rows = study.store.replicates("s")
    assert {row.status for row in rows if row.seed == 5} == {"failed"}
    assert "diverged" in str(next(row for row in rows if row.seed == 5).failure)
    assert {member.seeds for member in study.front()} == {2}
    before = len(evaluated)
    run(small(), workers="inline")
    assert len(evaluated) == before, "another run would fail in the same way"


def test_a_machine_that_fails_ends_the_run_and_not_the_replicate(
    evaluated: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = measure.evaluate
    fail_seeds(monkeypatch, (4, 5), Failure("environment", "no space left on device"))
    with pytest.raises(EnvironmentFaultError, match="with seed 4: no space left on device"):
        run(small(), workers="inline")
    monkeypatch.setattr(measure, "evaluate", works)
    study = run(small(), workers="inline")
    assert set(map(tuple, seeds_of(study).values())) == {(4, 5)}


def test_the_report_says_in_words_which_differences_are_noise(evaluated: list[Job]) -> None:
    study = run(small(), workers="inline")
    report = insights(study)
    assert report["seeds"] == seed_report(study.store, "s")
    text = insights_text(report)
    assert "val_loss: seeds of one model differ by a standard deviation of" in text
    (key,) = report["seeds"]["noisy"]
    assert key == "val_loss"
    for pair in report["seeds"]["pairs"][key]:
        said = re.search(rf"trials {pair['trials'][0]} and {pair['trials'][1]} differ by", text)
        assert (said is not None) == (pair["difference"] < pair["noise"])
    assert insights(load_study("s"))["seeds"] == report["seeds"]


def test_replicates_need_training() -> None:
    text = small().text.replace("val_loss, flops_per_token", "flops_per_token")
    with pytest.raises(SpaceError, match="no objective trains the model"):
        Space.parse(text, "s.yaml")


def test_a_replicate_is_the_evaluation_of_a_study_of_its_seed(tmp_path: Path) -> None:
    """Real training: initial weights and the order of the data both follow the seed."""
    text = SMALL.replace("{choice: [16, 24, 32]}", "16").replace("{choice: [1, 2]}", "1")
    one = space(text, name="one").text.replace("seed: 3", "seed: 3, replicates: 2")
    study = run(Space.parse(one, "s.yaml"), trials=1, workers="inline")
    other = space(text, name="two").text.replace("seed: 3", "seed: 4")
    second = run(Space.parse(other, "s.yaml"), trials=1, workers="inline")
    (row,) = study.store.replicates("one")
    wanted = second.evaluation(0)
    assert (row.seed, row.status) == (4, "complete")
    assert row.values["val_loss"] == wanted.values["val_loss"]
    assert row.metrics["train_loss"] == wanted.metrics["train_loss"]
    assert row.values["val_loss"] != study.evaluation(0).values["val_loss"]
