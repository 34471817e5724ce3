"""An evaluation of another study is reused where it means the same, and only there."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import SMALL, assert_sound, fake, scripted, space

from moenas.data.loading import load
from moenas.errors import InputError
from moenas.evaluate import devices
from moenas.evaluate import job as measure
from moenas.records import Evaluation, Job
from moenas.report.summary import trial_report, trial_text
from moenas.space.space import Space
from moenas.store.spending import spending
from moenas.store.store import Store
from moenas.store.study_store import StudyStore
from moenas.store.weights import read_weights, weights_path
from moenas.study import doctor
from moenas.study.deletion import delete_study
from moenas.study.evaluation_cache import EvaluationCache
from moenas.study.launch import Event, Study, load_study, run
from moenas.study.remeasure import Remeasurer
from moenas.workers.pool import open_pool

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

Change = Callable[[Evaluation], Evaluation]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were evaluated, by a stand-in that says what this machine is."""
    seen: list[Job] = []

    def evaluate(job: Job) -> Any:
        seen.append(job)
        device, weights = fake(job)
        return here(dataclasses.replace(device, seed=job.seed)), weights

    monkeypatch.setattr(measure, "evaluate", evaluate)
    return seen


def here(evaluation: Evaluation) -> Evaluation:
    info = devices.device_info(torch.device("cpu"), 1, torch.float32)
    curve: Any = [{"tokens": 512, "train_loss": 2.0}]
    versions = measure.versions()
    return dataclasses.replace(evaluation, device=info, versions=versions, curve=curve)


def small(name: str, old: str = "", new: str = "", more: str = "") -> Space:
    """The space of 6 points in float32, drawn in the order of the grid."""
    text = space(SMALL, more, name).text.replace("train: {", "train: {dtype: float32, ")
    assert old in text
    parsed = Space.parse(text.replace(old, new), "s.yaml")
    return parsed.with_search(sampler="grid", trials=6)


def reused(study: Study) -> dict[int, tuple[str, int]]:
    rows = study.view.evaluations
    return {
        e.trial: (e.reused_from["study"], e.reused_from["trial"]) for e in rows if e.reused_from
    }


def test_a_second_study_trains_nothing_that_the_first_one_has(evaluated: list[Job]) -> None:
    first = run(small("one"), trials=4, workers="inline")
    assert len(evaluated) == 4
    events: list[Event] = []
    second = run(small("two"), workers="inline", listeners=[events.append])
    assert len(evaluated) == 6, "two of six points are new"
    assert_sound(second, 6)
    assert len(reused(second)) == 4
    for trial, (study, source) in reused(second).items():
        one, two = first.evaluation(source), second.evaluation(trial)
        assert study == "one"
        assert (one.fingerprint, one.values) == (two.fingerprint, two.values)
        assert one.weights_sha256 == two.weights_sha256
        assert two.weights_sha256 is not None
        read_weights(second.store.runs, "two", trial, two.weights_sha256)
        assert two.seconds == {}
        text = trial_text(trial_report(second.store, "two", trial))
        assert f"  reused from trial {source} of study 'one'" in text
    assert {m.values["val_loss"] for m in first.front()} <= {
        e.values["val_loss"] for e in second.view.evaluations
    }
    said = [e.text for e in events if e.kind == "reused"]
    assert len(said) == 4
    assert said[0].startswith("reused from trial ")
    assert spending(second.store, "two").train_tokens == 2 * 512
    assert doctor.examine(second.store, "two") == []


def test_fresh_and_another_pool_reuse_nothing(evaluated: list[Job]) -> None:
    run(small("one"), workers="inline")
    assert reused(run(small("two"), workers="inline", fresh=True)) == {}
    assert len(evaluated) == 12
    assert reused(run(small("three"), pool=scripted(lambda job: here(fake(job)[0])))) == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tokens: 512", "tokens: 576"),
        ("seed: 3", "seed: 4"),
        ("search: {", "measure: {decode_batch: 4}\nsearch: {"),
        ("[val_loss, flops_per_token]", "[val_loss, flops_per_token, total_params]"),
        ("dtype: float32", "dtype: bfloat16"),
        ("dtype: float32", "dtype: float32, mtp: {depth: 1}"),
    ],
)
def test_what_means_something_else_is_evaluated(
    evaluated: list[Job], monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    run(small("one"), trials=6, workers="inline")
    evaluate = measure.evaluate

    def with_params(job: Job) -> Any:
        evaluation, weights = evaluate(job)
        values = {name: evaluation.values.get(name, 1.0) for name in job.objectives}
        return dataclasses.replace(evaluation, values=values), weights

    monkeypatch.setattr(measure, "evaluate", with_params)
    assert reused(run(small("two", old, new), trials=3, workers="inline")) == {}
    assert len(evaluated) == 9


CHANGES: dict[str, Change] = {
    "host": lambda e: dataclasses.replace(e, device={**e.device, "host": "elsewhere"}),
    "device": lambda e: dataclasses.replace(e, device={**e.device, "name": "another CPU"}),
    "version": lambda e: dataclasses.replace(e, versions={**e.versions, "torch": "1.0"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_device_or_version_gave_is_evaluated(
    evaluated: list[Job], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    evaluate = measure.evaluate

    def elsewhere(job: Job) -> Any:
        evaluation, weights = evaluate(job)
        return CHANGES[change](evaluation), weights

    monkeypatch.setattr(measure, "evaluate", elsewhere)
    run(small("one"), workers="inline")
    monkeypatch.setattr(measure, "evaluate", evaluate)
    assert reused(run(small("two"), workers="inline")) == {}
    assert len(evaluated) == 12


def test_another_corpus_reuses_nothing(evaluated: list[Job]) -> None:
    run(small("one"), workers="inline")
    Path("other.txt").write_text("something else entirely\n" * 900)
    other = small("two", "corpus.txt", "other.txt")
    assert reused(run(other, workers="inline")) == {}


def test_weights_that_are_gone_are_trained_again(evaluated: list[Job]) -> None:
    first = run(small("one"), workers="inline")
    weights_path(first.store.runs, "one", 2).unlink()
    second = run(small("two"), workers="inline")
    assert len(evaluated) == 7
    assert 2 not in {trial for _, trial in reused(second).values()}


def test_a_reused_latency_is_told_by_the_reference_of_the_study(
    evaluated: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = measure.evaluate

    def timed(job: Job) -> Any:
        evaluation, weights = evaluate(job)
        ms = 5.0 if job.study == "one" else 8.0
        details = {"ratio": 2.0, "reference_ms": ms, "reference_key": "cpu x"}
        values = {**evaluation.values, "val_loss": 2.0 * ms}
        details = {"val_loss": details}
        return dataclasses.replace(evaluation, values=values, measurements=details), weights

    monkeypatch.setattr(measure, "evaluate", timed)
    run(small("one"), trials=3, workers="inline")
    second = run(small("two"), workers="inline")
    assert len(reused(second)) == 3
    assert {e.values["val_loss"] for e in second.view.evaluations} == {10.0}


def damage(study: str, statement: str) -> None:
    """Change the row of a study in the database."""
    with sqlite3.connect("moenas.db") as database:
        database.execute(f"UPDATE moenas_study SET {statement} WHERE name = '{study}'")


@pytest.mark.parametrize(
    ("statement", "reusable"),
    [
        ("space = json('{}')", 0),
        ("space = json_remove(space, '$.search')", 0),
        ("space = json_remove(space, '$.search.seed')", 0),
        ("space = json_remove(space, '$.train', '$.measure')", 0),
        ("space = json_remove(space, '$.architecture')", 2),
        ("data = json('{}')", 0),
        ("data = json_remove(data, '$.sha256')", 0),
    ],
)
def test_a_stored_study_that_lacks_a_part_stops_no_other_study(
    evaluated: list[Job], statement: str, reusable: int
) -> None:
    run(small("one"), trials=2, workers="inline")
    damage("one", statement)
    second = run(small("two"), trials=2, workers="inline")
    assert_sound(second, 2)
    assert len(reused(second)) == reusable
    assert len(evaluated) == 4 - reusable


def test_a_study_whose_row_lacks_the_corpus_is_refused_in_a_sentence(evaluated: list[Job]) -> None:
    run(small("one"), trials=2, workers="inline")
    damage("one", "data = json_remove(data, '$.sha256')")
    with pytest.raises(InputError, match=r"lacks the digest of its corpus, `data\.sha256`"):
        run(small("one"), trials=3, workers="inline")
    assert len(evaluated) == 2


def test_a_study_whose_row_lacks_its_search_goes_on(evaluated: list[Job]) -> None:
    run(small("one"), trials=2, workers="inline")
    damage("one", "space = json_remove(space, '$.search')")
    assert_sound(run(small("one"), trials=3, workers="inline"), 3)


def test_a_reader_of_a_database_of_the_former_schema_reads_it(evaluated: list[Job]) -> None:
    run(small("one"), trials=2, workers="inline")
    with sqlite3.connect("moenas.db") as database:
        later = ("event", "event_counter", "runner", "token", "audit", "submission", "replicate")
        later += ("reservation", "calibration", "study_calibration")
        for table in ("reuse", "enqueued", "run", *later):
            database.execute(f"DROP TABLE moenas_{table}")
        database.execute("UPDATE moenas_alembic_version SET version_num = '0005'")
    store = Store.open()
    assert trial_report(store, "one", 0)["enqueued_from"] is None
    assert spending(store, "one").train_tokens == 2 * 512
    study = run(small("one"), trials=3, workers="inline")
    assert_sound(study, 3)
    assert spending(load_study("one").store, "one").wall_seconds > 0


def test_real_models_are_reused_to_the_last_bit() -> None:
    first = run(small("one"), trials=1, workers="inline")
    second = run(small("two"), trials=1, workers="inline")
    assert reused(second) == {0: ("one", 0)}
    fresh = run(small("three"), trials=1, workers="inline", fresh=True)
    assert reused(fresh) == {}
    losses = {study.evaluation(0).values["val_loss"] for study in (first, second, fresh)}
    assert len(losses) == 1
    digests = {study.evaluation(0).weights_sha256 for study in (first, second)}
    assert len(digests) == 1


# --- the model is known, an objective is not --------------------------------------------------------

NORM = """\
"Sum of the squares of all parameters."

direction = "minimize"
unit = ""
needs = "training"

def measure(subject):
    return float(sum(p.detach().double().square().sum() for p in subject.model.parameters()))
"""
TWO, MORE = "[val_loss, flops_per_token]", "[val_loss, total_params, decode_ms, norm.py]"


def trained_in(first: Study) -> int:
    return round(spending(first.store, first.name).train_tokens) // 512


def test_only_the_objectives_that_another_study_lacks_are_measured() -> None:
    Path("norm.py").write_text(NORM)
    first = run(small("one"), trials=2, workers="inline")
    events: list[Event] = []
    second = run(small("two", TWO, MORE), trials=3, workers="inline", listeners=[events.append])
    assert_sound(second, 3)
    assert reused(second) == {0: ("one", 0), 1: ("one", 1)}
    assert (trained_in(first), trained_in(second)) == (2, 1)
    fresh = run(small("three", TWO, MORE), trials=3, workers="inline", fresh=True)
    for trial in range(3):
        one, other = second.evaluation(trial), fresh.evaluation(trial)
        for name in ("val_loss", "total_params", "norm"):
            assert one.values[name] == other.values[name]
        assert one.measurements["decode_ms"]["reference_key"]
        assert one.weights_sha256 is not None
        read_weights(second.store.runs, "two", trial, one.weights_sha256)
        assert ("train" in one.seconds) == (trial == 2)
        assert one.curve[-1]["tokens"] == 512
    told = [(e.kind, e.text.partition(" | ")[0]) for e in events if e.trial == 1]
    source = "reused from trial 1 of study 'one'"
    assert told == [("started", source), ("reused", source)]
    assert doctor.examine(second.store, "two") == []
    again = run(small("four", TWO, MORE), trials=2, workers="inline")
    assert reused(again) == {0: ("two", 0), 1: ("two", 1)}
    assert [e.seconds for e in again.view.evaluations] == [{}, {}], "nothing is measured"


def test_an_objective_of_another_file_is_measured_again() -> None:
    Path("norm.py").write_text(NORM)
    norm = "[val_loss, norm.py]"
    first = run(small("one", TWO, norm), trials=1, workers="inline")
    Path("norm.py").write_text(NORM.replace("return float(", "return 2 * float("))
    second = run(small("two", TWO, norm), trials=1, workers="inline")
    assert (reused(second), trained_in(second)) == ({0: ("one", 0)}, 0)
    assert second.evaluation(0).values["norm"] == 2 * first.evaluation(0).values["norm"]


def test_a_model_is_trained_if_its_weights_are_gone() -> None:
    first = run(small("one"), trials=2, workers="inline")
    weights_path(first.store.runs, "one", 1).unlink()
    second = run(
        small("two", TWO, MORE.replace("norm.py", "prefill_ms")), trials=2, workers="inline"
    )
    assert (reused(second), trained_in(second)) == ({0: ("one", 0)}, 1)


def test_an_objective_that_fails_on_known_weights_can_be_measured_later() -> None:
    run(small("one"), trials=4, workers="inline")
    broken = "if subject.architecture.d_model > 16: 1 / 0\n    return float"
    Path("norm.py").write_text(NORM.replace("return float", broken))
    second = run(small("two", TWO, "[val_loss, norm.py]"), trials=6, workers="inline")
    failed = [e for e in second.view.evaluations if e.status == "failed"]
    assert len(failed) == 4
    assert all(e.weights_sha256 and set(e.values) == {"val_loss"} for e in failed)
    assert {e.trial for e in failed} & reused(second).keys()
    Path("norm.py").write_text(NORM)
    space = small("two", TWO, "[val_loss, norm.py]")
    mended = run(space, trials=6, workers="inline", accept_changes=True)
    assert {e.status for e in mended.view.evaluations} == {"complete"}


def objective(name: str, value: str) -> None:
    """Write an objective of the trained model."""
    head = '"Doc."\nimport torch\ndirection = "minimize"\nunit = ""\nneeds = "training"\n'
    Path(f"{name}.py").write_text(f"{head}\ndef measure(subject):\n    return float({value})\n")


def test_random_numbers_of_an_objective_do_not_depend_on_the_training() -> None:
    objective("noise", "torch.rand(1)")
    run(small("one"), trials=1, workers="inline")
    second = run(small("two", TWO, "[val_loss, noise.py]"), trials=1, workers="inline")
    again = small("three", TWO, "[val_loss, noise.py]")
    fresh = run(again, trials=1, workers="inline", fresh=True)
    assert (len(reused(second)), len(reused(fresh))) == (1, 0)
    assert second.evaluation(0).values == fresh.evaluation(0).values


def test_the_time_of_training_comes_from_the_study_that_trained() -> None:
    objective("seconds", "subject.training.seconds")
    first = run(small("one"), trials=1, workers="inline")
    run(small("two", TWO, "[val_loss, flops_per_token, total_params]"), trials=1, workers="inline")
    wanted = "[val_loss, flops_per_token, total_params, seconds.py]"
    wanted_space = small("three", TWO, wanted)
    third = run(wanted_space, trials=1, workers="inline")
    assert reused(third) == {0: ("one", 0)}
    seconds = first.evaluation(0).seconds["train"]
    assert third.evaluation(0).values["seconds"] == seconds
    corpus = load(wanted_space.data)
    with closing(open_pool("inline", wanted_space.search)) as pool:
        Remeasurer(third.store, wanted_space, corpus).run(pool, [wanted_space.objectives[-1]])
    assert load_study("three").evaluation(0).values["seconds"] == seconds


def test_a_latency_with_another_reference_time_is_measured_again() -> None:
    decode = "[val_loss, decode_ms]"
    run(small("two", TWO, decode), trials=1, workers="inline")
    run(small("one", TWO, decode), trials=2, workers="inline", fresh=True)
    with sqlite3.connect("moenas.db") as database:
        database.execute(
            "UPDATE moenas_value SET"
            " measurement = json_set(measurement, '$.reference_key', 'another machine')"
            " WHERE study = 'one' AND objective = 'decode_ms'"
        )
    second = run(small("two", TWO, decode), trials=2, workers="inline")
    assert_sound(second, 2)
    assert reused(second) == {1: ("one", 1)}
    keys = {e.measurements["decode_ms"]["reference_key"] for e in second.view.evaluations}
    assert len(keys) == 1
    assert keys != {"another machine"}
    assert trained_in(second) == 1


def test_weights_of_a_source_that_is_deleted_meanwhile_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("norm.py").write_text(NORM)
    first = run(small("one"), trials=1, workers="inline")
    evaluate = measure.evaluate

    def delete(job: Job) -> Any:
        weights_path(first.store.runs, "one", 0).unlink()
        return evaluate(job)

    monkeypatch.setattr(measure, "evaluate", delete)
    second = run(small("two", TWO, "[val_loss, norm.py]"), trials=1, workers="inline")
    assert second.evaluation(0).status == "complete"
    read_weights(second.store.runs, "two", 0, str(first.evaluation(0).weights_sha256))


def test_a_measurement_that_crashes_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("norm.py").write_text(NORM)
    first = run(small("one"), trials=1, workers="inline")
    evaluate = measure.evaluate

    def crash(job: Job) -> Any:
        if job.known is not None:
            raise RuntimeError("lost")
        return evaluate(job)

    monkeypatch.setattr(measure, "evaluate", crash)
    second = run(small("two", TWO, "[val_loss, norm.py]"), trials=2, workers="inline")
    known = second.evaluation(0)
    assert known.status == "failed"
    assert known.values == {"val_loss": first.evaluation(0).values["val_loss"]}
    assert known.weights_sha256 == first.evaluation(0).weights_sha256


def test_a_study_that_was_made_again_meanwhile_is_another_one() -> None:
    run(small("one"), trials=1, workers="inline")
    second = run(small("two"), trials=1, workers="inline", fresh=True)
    wanted = small("two", TWO, "[val_loss, total_params]")
    cache = EvaluationCache(StudyStore(second.store, "two"), wanted)
    cache.open("cpu")
    fingerprint = second.evaluation(0).fingerprint
    assert cache.find_trained(fingerprint) is not None
    delete_study(second.store, "one", "")
    run(small("one", "tokens: 512", "tokens: 576"), trials=1, workers="inline", fresh=True)
    assert cache.find_trained(fingerprint) is None


def test_a_model_that_looks_ahead_is_trained_again() -> None:
    router = "{selection: expert_choice, allow_acausal: true}"
    ahead = f"ffn: {{kind: moe, n_experts: 4, d_expert: 16, router: {router}}}"
    dense = "ffn: {kind: dense, activation: swiglu, d_ff: 16}"
    first = run(small("one", dense, ahead), trials=1, workers="inline")
    assert first.evaluation(0).metrics["causal"] == 0
    space = small("two", dense, ahead)
    space = Space.parse(space.text.replace(TWO, "[val_loss, total_params]"), "s.yaml")
    space = space.with_search(sampler="grid", trials=1)
    assert reused(run(space, workers="inline")) == {}
