"""A study has exactly the trials that it was asked for, whatever ended its runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from studies import (
    ARCHITECTURE,
    SMALL,
    assert_sound,
    counts,
    fake,
    params,
    press_ctrl_c,
    scripted,
    space,
)

from moenas.errors import (
    InputError,
    MoenasError,
    NoCandidateError,
    NotFoundError,
    StorageLostError,
    StudyBusyError,
)
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Failure, Job
from moenas.report.summary import status_report, status_text
from moenas.search import trials as asker
from moenas.space.space import Space
from moenas.space.stored_form import digest
from moenas.store import heartbeat
from moenas.store.store import Store
from moenas.store.weights import read_weights, weights_path
from moenas.study import candidate, result_processing
from moenas.study import launch as study
from moenas.study import stop_rules as stops
from moenas.study.ending_signals import EndingSignals
from moenas.study.launch import Event, Interrupted, Study, load_study, run
from moenas.workers.pool import Inline

pytestmark = pytest.mark.usefixtures("study_folder")


# --- the total ---------------------------------------------------------------------------------


def test_trials_is_the_total_of_the_study(jobs: list[Job]) -> None:
    first = run(space(), workers="inline")
    assert_sound(first, 6)
    assert first.finished == "trials"
    evaluated = len(jobs)
    assert evaluated == 6 == len({e.fingerprint for e in first.view.evaluations})

    events: list[Event] = []
    run(space(), workers="inline", listeners=[events.append])
    assert len(jobs) == evaluated, "a study that is done is not run again"
    assert [(e.kind, e.progress.evaluated) for e in events] == [("done", 6)]

    assert_sound(run(space(), trials=8, workers="inline"), 8)
    assert_sound(run(space(), workers="inline"), 8)
    assert_sound(run(space(), trials=5, workers="inline"), 8)


def test_a_study_in_pieces_asks_what_a_whole_one_asks(jobs: list[Job]) -> None:
    whole = run(space(), storage="sqlite:///whole.db", trials=14, workers="inline")
    run(space(), storage="sqlite:///pieces.db", trials=4, workers="inline")
    run(space(), storage="sqlite:///pieces.db", trials=11, workers="inline")
    pieces = run(space(), storage="sqlite:///pieces.db", trials=14, workers="inline")
    assert params(pieces) == params(whole)
    assert_sound(pieces, 14)


def test_a_finite_space_ends_when_every_point_was_drawn(jobs: list[Job]) -> None:
    events: list[Event] = []
    study = run(space(SMALL), trials=200, workers="inline", listeners=[events.append])
    assert study.finished == "exhausted"
    assert len({repr(p) for p in params(study)}) == 6
    assert len(jobs) == 6, "each of the 6 models is trained once"
    assert len(study.optuna.trials) < 200
    assert "every point" in events[-1].text
    again = load_study("s")
    assert again.finished == "exhausted"
    text = status_text(status_report(again.store, "s"))
    assert text.startswith("s: done, every point of the space was drawn; 6 of 200 trials")


def test_a_finite_space_is_covered_by_as_many_trials_as_it_has_points(jobs: list[Job]) -> None:
    study = run(space(SMALL), trials=6, workers="inline")
    assert_sound(study, 6)
    assert len({job.attempt for job in jobs}) == 1
    assert len({Architecture.parse(job.architecture).fingerprint for job in jobs}) == 6


@pytest.mark.parametrize("parts", [[8], [3, 5, 8]])
def test_the_grid_evaluates_every_point_once(jobs: list[Job], parts: list[int]) -> None:
    grid = space(SMALL).with_search(sampler="grid")
    for trials in parts:
        study = run(grid, trials=trials, workers="inline")
    assert study.finished == "exhausted"
    assert len(jobs) == len(study.optuna.trials) == 6, "no point is drawn twice"
    run(grid, storage="sqlite:///whole.db", trials=8, workers="inline")
    assert params(load_study("s", "sqlite:///whole.db")) == params(study)


def test_the_grid_refuses_a_space_that_it_cannot_cover(jobs: list[Job]) -> None:
    endless = SMALL.replace("d_model:", "embedding_multiplier: {float: [0.5, 2]}\n  d_model:")
    with pytest.raises(
        InputError, match="'embedding_multiplier' is a continuous range; give it a step"
    ):
        run(space(endless).with_search(sampler="grid"), workers="inline")
    wide = SMALL.replace("d_ff: 16", "d_ff: {int: [8, 800000], step: 8}")
    with pytest.raises(InputError, match="of at most 20,000, and the space has"):
        run(space(wide).with_search(sampler="grid"), workers="inline")
    assert not Path("moenas.db").exists()


# --- what may not be built ---------------------------------------------------------------------


def test_infeasible_draws_are_recorded_and_never_evaluated(jobs: list[Job]) -> None:
    limit = "active_params < 12000"
    study = run(space(more=f"require: [{limit}]"), trials=10, workers="inline")
    assert_sound(study, 10)
    rejected = [e for e in study.view.evaluations if e.status == "infeasible"]
    assert rejected, "the limit is meant to bite"
    assert not {e.trial for e in rejected} & {job.trial for job in jobs}
    for row in rejected:
        assert row.cost["active_params"] >= 12000
        assert list(row.violations) == [limit]
    for trial in study.optuna.get_trials():
        assert set(trial.constraints) == {limit, candidate.VALID}, (
            "GP wants equally many everywhere"
        )
        assert (trial.constraints[limit] > 0) == (trial.state == TrialState.PRUNED)


def test_fields_that_do_not_go_together_are_infeasible(jobs: list[Job]) -> None:
    lines = ARCHITECTURE.replace("top_k: {choice: [1, 2]}", "top_k: {choice: [2, 3]}").splitlines()
    routed = "\n".join(line for line in lines if "dense" not in line)
    study = run(space(routed), trials=12, workers="inline")
    rejected = [e for e in study.view.evaluations if e.status == "infeasible"]
    assert rejected
    assert {tuple(e.violations) for e in rejected} == {(candidate.VALID,)}
    assert_sound(study, 12)


def test_a_narrow_requirement_costs_draws_and_no_trials(jobs: list[Job]) -> None:
    narrow = space(more="require: [active_params < 7000]")  # few draws meet it
    study = run(narrow, trials=2, workers="inline")
    assert_sound(study, 2)
    assert len(jobs) == 2
    assert sum(e.status == "infeasible" for e in study.view.evaluations) > 10


def test_a_study_without_a_complete_trial_says_so(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "active_params < 6000"
    monkeypatch.setattr(stops, "DRAWS", 4)
    with pytest.raises(NoCandidateError, match=f"4 draws in a row .* '{limit}'; loosen"):
        run(space(more=f"require: [{limit}]"), trials=100, workers="inline")
    assert jobs == []
    pool = scripted(lambda job: Failure("diverged", "loss is nan"))
    with pytest.raises(NoCandidateError, match="none of its 3 trials is complete; 3 of them: div"):
        run(space(name="t"), trials=3, pool=pool)


def test_draws_in_a_row_without_a_candidate_end_a_study_that_has_some(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stops, "DRAWS", 5)
    events: list[Event] = []
    narrow = space(more="require: [active_params < 12000]")
    study = run(narrow, trials=100, workers="inline", listeners=[events.append])
    assert study.finished == "draws"
    assert re.search(r"5 draws in a row gave no new candidate: \d of them bro", events[-1].text)
    assert 0 < len(jobs) < 100


ROUTED = """
architecture:
  vocab_size: 256
  d_model: {choice: [16, 24, 32]}
  blocks:
    - {mixer: {kind: attention, head_dim: 8}, ffn: {kind: dense, d_ff: 16}}
    - repeat: {choice: [1, 2]}
      mixer: {kind: attention, head_dim: 8}
      ffn: {kind: moe, n_experts: {choice: [2, 4]}, d_expert: 16, router: {top_k: 1}}
"""


def routed(job: Job) -> tuple[Evaluation, bytes | None]:
    """Wide models have the best loss, and a router in their last layer that prefers one expert."""
    device, weights = fake(job)
    layers = sum(group["repeat"] for group in job.architecture["blocks"])
    vio = {16: 0.1, 24: 0.5, 32: 0.9}[job.architecture["d_model"]]
    rows = [{"layer": i, "load": [0.5, 0.5], "max_vio": 0.0, "dead": 0} for i in range(1, layers)]
    rows[-1] |= {"max_vio": vio}
    return dataclasses.replace(device, routing=rows), weights


def assert_routed(study: Study, limit: str, bound: float) -> None:
    """Just the evaluations over the bound are infeasible, with their values; none is on the front."""
    told = {t.number: t for t in study.optuna.get_trials()}
    for row in study.view.evaluations:
        broken = row.routing[-1]["max_vio"] >= bound
        assert row.status == ("infeasible" if broken else "complete")
        assert set(row.values) == {"val_loss", "flops_per_token"}
        assert (row.weights_sha256 is None) is broken
        assert list(row.violations) == ([limit] if broken else [])
        trial = told[row.trial]
        assert trial.state == TrialState.COMPLETE, "a sampler learns from the values"
        assert trial.values == [row.values["val_loss"], row.values["flops_per_token"]]
        assert set(trial.constraints) == {limit, candidate.VALID}
        assert (trial.constraints[limit] > 0) is broken
        if broken:
            assert row.violations[limit] == trial.constraints[limit]
    on_front = {member.trial for member in study.front()}
    rejected = {e.trial for e in study.view.evaluations if e.status == "infeasible"}
    assert rejected, "the limit is meant to bite"
    assert on_front
    assert not on_front & rejected
    assert not {t.number for t in study.optuna.best_trials} & rejected


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_requirement_of_the_trained_model_is_decided_after_training(sampler: str) -> None:
    seen: list[Job] = []

    def evaluate(job: Job) -> tuple[Evaluation, bytes | None]:
        seen.append(job)
        return routed(job)

    pool = Inline(evaluate)
    limit = "max_vio < 0.6"
    wanted = space(ROUTED, more=f"require: [{limit}]").with_search(sampler=sampler)
    study = run(wanted, trials=12, pool=pool)
    assert_routed(study, limit, 0.6)
    fingerprints = [Architecture.parse(job.architecture).fingerprint for job in seen]
    assert len(set(fingerprints)) == len(fingerprints), "no infeasible model is trained twice"
    again = run(wanted, trials=16, pool=pool)
    assert_routed(again, limit, 0.6)
    assert len({Architecture.parse(job.architecture).fingerprint for job in seen}) == len(seen)


def test_requirements_of_the_trained_model_are_taken_once_for_each_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    violations = Space.trained_violations

    def counted(self: Space, architecture: Architecture, *rest: Any) -> dict[str, float]:
        taken.append(architecture.fingerprint)
        return violations(self, architecture, *rest)

    monkeypatch.setattr(Space, "trained_violations", counted)
    study = run(space(ROUTED, more="require: [max_vio < 0.6]"), trials=12, pool=Inline(routed))
    rows = [e for e in study.view.evaluations if e.values]
    assert sorted(taken) == sorted(e.fingerprint for e in rows)


def test_what_broke_a_requirement_is_told_by_a_later_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Inline(routed)
    wanted = space(ROUTED, more="require: [max_vio < 0.4]")
    with monkeypatch.context() as patch:
        patch.setattr(asker.OptunaTrials, "tell", stopping_at("infeasible"))
        with pytest.raises(Interrupted):
            run(wanted, trials=8, pool=pool)
    stored = Study(Store.open(), "s").view.evaluations
    assert stored[-1].status == "infeasible"
    assert Study(Store.open(), "s").optuna.get_trials()[-1].state == TrialState.RUNNING
    study = run(wanted, trials=8, pool=pool)
    assert_routed(study, "max_vio < 0.4", 0.4)
    assert [e.values for e in study.view.evaluations][: len(stored)] == [e.values for e in stored]


def stopping_at(status: str) -> Callable[..., None]:
    """A `tell` that is interrupted at the first evaluation of a status: our rows are written."""
    tell = asker.OptunaTrials.tell

    def stopping(self: asker.OptunaTrials, trial: Any, evaluation: Evaluation, *rest: Any) -> None:
        if evaluation.status == status:
            raise KeyboardInterrupt
        tell(self, trial, evaluation, *rest)

    return stopping


def test_failures_without_values_carry_no_constraint_of_the_trained_model() -> None:
    def script(job: Job) -> Evaluation | Failure:
        if job.architecture["d_model"] == 16:
            return Failure("acausal", "looks ahead")
        return routed(job)[0]

    pool = scripted(script)
    study = run(space(ROUTED, more="require: [max_vio < 0.6]"), trials=10, pool=pool)
    failed = [e for e in study.view.evaluations if e.status == "failed"]
    assert failed
    for row in failed:
        assert set(study.optuna.get_trials()[row.trial].constraints) == {candidate.VALID}
    copies = [e for e in failed if "copied_from" in e.metrics]
    models = {e.fingerprint for e in failed}
    assert len(failed) - len(copies) == len(models), "what looks ahead does so again"


# --- one model is trained once -----------------------------------------------------------------


def test_a_known_model_is_copied(jobs: list[Job]) -> None:
    study = run(space(SMALL), trials=7, workers="inline")
    copies = [e for e in study.view.evaluations if "copied_from" in e.metrics]
    assert len(copies) == len(study.view.evaluations) - len(jobs) > 0
    for copy in copies:
        source = study.evaluation(int(copy.metrics["copied_from"]))
        assert (copy.fingerprint, copy.values) == (source.fingerprint, source.values)
        assert copy.weights_sha256 is not None
        weights = read_weights(study.store.runs, "s", copy.trial, copy.weights_sha256)
        assert weights == f"weights of {source.trial}".encode()
        paths = [weights_path(study.store.runs, "s", e.trial) for e in (source, copy)]
        assert paths[0].samefile(paths[1]), "a copy takes no room"
    fingerprints = [study.evaluation(m.trial).fingerprint for m in study.front()]
    assert len(set(fingerprints)) == len(fingerprints), "a front holds each model once"


@pytest.mark.parametrize("fault", [None, "timeout", "diverged"])
def test_a_model_in_flight_is_waited_for(jobs: list[Job], fault: str | None) -> None:
    """A model that would fail again is not trained again; a timeout may end otherwise."""
    study = run(space(), trials=1, workers="inline")
    same = {"d_model": 24, "blocks.0.repeat": 4, "blocks.0.ffn": "dense"}
    same |= {"blocks.0.ffn.dense.d_ff": 112}
    for _ in range(2):
        study.optuna.enqueue_trial(same)

    def script(job: Job) -> Evaluation | Failure:
        if fault and job.trial == 1:
            return Failure(fault, "loss is nan")
        return fake(job)[0]

    pool = scripted(script)
    study = run(space(), trials=3, pool=pool)
    assert_sound(study, 3)
    assert params(study)[1] == params(study)[2]
    assert pool.most == 1, "the second one waits although there is room"
    assert len(params(study)) == (3 if fault == "timeout" else 4), "a copy does not count"
    first, second = study.evaluation(1), study.evaluation(2)
    if fault == "timeout":
        assert (first.status, second.status) == ("failed", "complete")
        assert "copied_from" not in second.metrics
    else:
        assert first.status == second.status == ("failed" if fault else "complete")
        assert first.failure == second.failure
        assert second.metrics["copied_from"] == 1.0


def test_a_model_that_diverged_in_an_earlier_run_is_not_trained_again() -> None:
    def script(job: Job) -> Evaluation | Failure:
        return Failure("diverged", "nan") if job.architecture["d_model"] == 16 else fake(job)[0]

    pool = scripted(script)
    study = run(space(SMALL), trials=6, pool=pool)
    drawn = len(study.optuna.trials)
    for width in (16, 24):
        study.optuna.enqueue_trial({"d_model": width, "blocks.0.repeat": 1})
    study = run(space(SMALL), trials=7, pool=pool)
    assert study.finished == "exhausted"
    again = [study.evaluation(trial) for trial in (drawn, drawn + 1)]
    assert ["copied_from" in e.metrics for e in again] == [True, True]
    assert [e.status for e in again] == ["failed", "complete"]
    assert again[0].failure == Failure("diverged", "nan")


# --- failures ----------------------------------------------------------------------------------


def test_a_failed_candidate_is_a_row_with_a_reason() -> None:
    def script(job: Job) -> Evaluation | Failure:
        if job.trial == 2:
            return Failure("timeout", "did not stop")
        evaluation = fake(job)[0]
        if job.trial == 3:
            values = {**evaluation.values, "val_loss": math.inf}
            return dataclasses.replace(evaluation, values=values)
        return evaluation

    pool = scripted(script)
    study = run(space(), trials=6, pool=pool)
    assert_sound(study, 6)
    assert {e.trial: e.failure.kind for e in study.view.evaluations if e.failure} == {
        2: "timeout",
        3: "error",
    }
    assert study.store.attempts("s", 2) == 1, "a candidate's own fault is not tried again"


def test_a_dead_worker_s_candidate_is_tried_again() -> None:
    def script(job: Job) -> Evaluation | Failure:
        dies = job.trial == 1 or (job.trial == 4 and job.attempt < 3)
        return Failure("crashed", "worker process 7 died") if dies else fake(job)[0]

    pool = scripted(script)
    events: list[Event] = []
    study = run(space(), trials=7, pool=pool, listeners=[events.append])
    assert_sound(study, 7)
    lost, saved = study.evaluation(1), study.evaluation(4)
    assert (lost.status, lost.attempt) == ("failed", 3)
    assert (saved.status, saved.attempt) == ("complete", 3)
    assert sum(e.kind == "retried" for e in events) == 4


def test_a_run_whose_workers_all_die_stops() -> None:
    events: list[Event] = []
    pool = scripted(lambda job: Failure("crashed", "worker process 7 died"))
    with pytest.raises(MoenasError, match="of 5 candidates in a row died, 3 of each, the last"):
        run(space(), trials=12, pool=pool, listeners=[events.append])
    assert sum(e.kind == "retried" for e in events) == 2 * 5
    assert load_study("s").store.count("s") == 0, "no trial is used up"
    pool = scripted(lambda job: fake(job)[0])
    study = run(space(), trials=12, pool=pool)
    assert_sound(study, 12)
    assert all(e.status == "complete" for e in study.view.evaluations)


def test_candidates_that_always_kill_their_workers_do_not_block_a_study() -> None:
    """They are held back in two runs; in the third they fail, and the study goes on."""
    deadly = {0, 1, 2, 3, 4, 5}

    def script(job: Job) -> Evaluation | Failure:
        return Failure("crashed", "worker died") if job.trial in deadly else fake(job)[0]

    pool = scripted(script)
    for _ in range(2):
        with pytest.raises(MoenasError, match="5 candidates in a row died"):
            run(space(), trials=8, pool=pool)
    study = run(space(), trials=8, pool=pool)
    assert_sound(study, 8)
    assert {e.trial for e in study.view.evaluations if e.status == "failed"} == deadly


def test_candidates_that_kill_their_workers_do_not_stop_a_study() -> None:
    """Four in a row, twice, with another one's result between; each dies three times."""
    deadly = {1, 2, 3, 4, 6, 7, 8, 9}

    def script(job: Job) -> Evaluation | Failure:
        return Failure("crashed", "worker died") if job.trial in deadly else fake(job)[0]

    pool = scripted(script)
    study = run(space(), trials=11, pool=pool)
    assert_sound(study, 11)
    assert {e.trial for e in study.view.evaluations if e.status == "failed"} == deadly


def test_a_run_whose_first_candidates_all_fail_alike_stops() -> None:
    pool = scripted(
        lambda job: Failure(
            "error", f"x.py:{job.trial}: no module 'y'", cause="ImportError x.py:1"
        ),
    )
    with pytest.raises(MoenasError, match="5 first candidates all failed for one reason: error: x"):
        run(space(), trials=40, pool=pool)
    assert pool.most == 2
    pool = scripted(lambda job: fake(job)[0])
    study = run(space(), trials=8, pool=pool)
    assert_sound(study, 8)
    assert sum(e.status == "failed" for e in study.view.evaluations) == 5


# --- changed under its name --------------------------------------------------------------------


def test_a_changed_space_is_refused_with_the_difference(jobs: list[Job]) -> None:
    study = run(space(), trials=2, workers="inline")
    before = study.view
    changed = ARCHITECTURE.replace("[16, 24, 32]", "[16, 24, 40]")
    with pytest.raises(InputError, match="begun with another space") as refused:
        run(space(changed), trials=5, workers="inline")
    assert str(refused.value).splitlines()[1:] == ["  architecture.d_model.choice.2: 32 -> 40"]
    overridden = Space.parse(study.record.space_text, "s.yaml", ["train.tokens=1024"])
    with pytest.raises(InputError, match=r"train\.tokens: 512 -> 1024"):
        run(overridden, workers="inline")
    assert study.view == before

    other = Space.parse(study.record.space_text, "s.yaml", ["search.trials=4", "search.workers=1"])
    assert_sound(run(other, workers="inline"), 4)


def test_a_study_begun_before_a_field_was_known_is_taken_up(jobs: list[Job]) -> None:
    record = run(space(), trials=2, workers="inline").record
    older = json.loads(json.dumps(record.space))
    del older["train"]["max_dead"], older["measure"]["dtype"], older["architecture"]["head_bias"]
    older["train"]["beta1"] = 0.8
    stored = {"space": json.dumps(older), "space_sha256": "that of its time"}
    with sqlite3.connect("moenas.db") as database:
        columns = ", ".join(f"{name} = :{name}" for name in stored)
        database.execute(f"UPDATE moenas_study SET {columns}", stored)
    with pytest.raises(InputError) as refused:
        run(space(), trials=3, workers="inline")
    assert str(refused.value).splitlines()[1:] == ["  train.beta1: 0.8 -> 0.9"]
    older["train"]["beta1"] = 0.9
    with sqlite3.connect("moenas.db") as database:
        database.execute("UPDATE moenas_study SET space = ?", [json.dumps(older)])
    assert_sound(run(space(), trials=3, workers="inline"), 3)


def test_a_study_from_before_shares_of_gpus_were_the_default_goes_on(jobs: list[Job]) -> None:
    study = run(space(), trials=2, workers="inline")
    older = json.loads(json.dumps(study.record.space))
    older["search"]["gpus"] = 0.0
    del older["search"]["candidates_per_worker"]
    assert digest(older) == study.record.space_sha256
    with sqlite3.connect("moenas.db") as database:
        database.execute("UPDATE moenas_study SET space = ?", [json.dumps(older)])
    assert_sound(run(space(), trials=3, workers="inline"), 3)
    assert_sound(run(space().with_search(gpus=0.0), trials=4, workers="inline"), 4)
    older["search"]["gpus"] = 2.0  # it could be asked for
    del older["train"]["max_dead"]
    stored = {"space": json.dumps(older), "space_sha256": "that of its time"}
    with sqlite3.connect("moenas.db") as database:
        columns = ", ".join(f"{name} = :{name}" for name in stored)
        database.execute(f"UPDATE moenas_study SET {columns}", stored)
    assert_sound(run(space(), trials=5, workers="inline"), 5)
    plain = {k: v for k, v in jobs[0].plain().items() if k not in ("device", "weights_to")}
    assert Job.parse(plain).device == "cpu"


def test_a_changed_corpus_is_refused(jobs: list[Job]) -> None:
    run(space(), trials=1, workers="inline")
    Path("corpus.txt").write_text("something else entirely\n" * 900)
    with pytest.raises(InputError, match="begun on another corpus"):
        run(space(), trials=2, workers="inline")


def test_nothing_is_created_where_the_input_is_wrong(jobs: list[Job]) -> None:
    wrong = space().with_search(sampler="tpee")
    with pytest.raises(InputError, match="tpee"):
        run(wrong, workers="inline")
    assert not Path("moenas.db").exists()


# --- latencies ---------------------------------------------------------------------------------


def timed(job: Job, reference_ms: float, key: str = "cpu x") -> Evaluation:
    """An evaluation whose first objective is a latency of twice the reference model's."""
    evaluation = fake(job)[0]
    details = {"ratio": 2.0, "reference_ms": reference_ms, "reference_key": key}
    values = {**evaluation.values, "val_loss": 2.0 * reference_ms}
    return dataclasses.replace(evaluation, values=values, measurements={"val_loss": details})


def test_all_latencies_share_the_first_reference() -> None:
    seen: dict[int, dict[str, float]] = {}

    def script(job: Job) -> Evaluation:
        seen[job.trial] = job.reference_ms
        return timed(job, 3.0 + job.trial)

    pool = scripted(script)
    study = run(space(), trials=6, pool=pool)
    fixed = study.store.reference_ms("s")["cpu x"]
    assert {e.values["val_loss"] for e in study.view.evaluations} == {2 * fixed}
    assert seen[5] == {"cpu x": fixed}, "later workers are told"
    assert_sound(study, 6)


def test_a_latency_of_another_device_is_refused() -> None:
    pool = scripted(lambda job: timed(job, 3.0, "gpu y" if job.trial == 4 else "cpu x"))
    study = run(space(), trials=6, pool=pool)
    failure = study.evaluation(4).failure
    assert failure is not None
    assert failure.kind == "refused"
    assert "timed on [gpu y], but before in this study on [cpu x]" in failure.message


# --- crashes and interrupts --------------------------------------------------------------------


def test_what_was_recorded_is_told_later(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends after our rows are written, before Optuna's are."""
    tell = asker.OptunaTrials.tell

    def lost(self: Any, trial: optuna.Trial, evaluation: Evaluation, *rest: Any) -> None:
        if trial.number == 3:
            raise StorageLostError("gone")
        tell(self, trial, evaluation, *rest)

    monkeypatch.setattr(asker.OptunaTrials, "tell", lost)
    with pytest.raises(StorageLostError):
        run(space(), trials=6, workers="inline")
    monkeypatch.setattr(asker.OptunaTrials, "tell", tell)
    assert_sound(run(space(), trials=6, workers="inline"), 6)
    assert [job.trial for job in jobs].count(3) == 1, "what was paid for is not paid for again"


def test_an_interrupted_candidate_is_taken_up_again(jobs: list[Job]) -> None:
    whole = run(space(), storage="sqlite:///whole.db", trials=6, workers="inline")

    def interrupted(job: Job) -> tuple[Evaluation, bytes | None]:
        if job.attempt == 1 and job.trial in (2, 4):
            press_ctrl_c()
        return fake(job)

    pool = Inline(interrupted)
    for trial in (2, 4):
        with pytest.raises(Interrupted) as stop:
            run(space(), trials=6, pool=pool)
        assert stop.value.exit_code == 130
        assert load_study("s").optuna.trials[trial].state == TrialState.RUNNING
    study = run(space(), trials=6, pool=pool)
    assert_sound(study, 6)
    assert params(study) == params(whole)
    assert study.evaluation(2).attempt == 2


def test_a_full_disk_loses_nothing(monkeypatch: pytest.MonkeyPatch, jobs: list[Job]) -> None:
    def full(*args: object) -> str:
        raise OSError(28, "No space left on device", "/runs/x")

    with monkeypatch.context() as patch:
        patch.setattr(result_processing, "write_weights", full)
        with pytest.raises(StorageLostError, match="/runs/x: cannot be written: No space left"):
            run(space(), trials=3, workers="inline")
    assert_sound(run(space(), trials=3, workers="inline"), 3)


def test_one_process_runs_a_study_at_a_time() -> None:
    def nested(job: Job) -> tuple[Evaluation, bytes | None]:
        with pytest.raises(StudyBusyError, match=f"pid {os.getpid()}"):
            run(space(), workers="inline")
        return fake(job)

    pool = Inline(nested)
    assert_sound(run(space(), trials=2, pool=pool), 2)


LOST, BUSY = StorageLostError("gone"), StudyBusyError("taken over")


@pytest.mark.parametrize(
    ("outcomes", "ends_with", "after"),
    [
        ([LOST, LOST, LOST, LOST, None, LOST, LOST, LOST, LOST, None], None, 11),
        ([None, BUSY], BUSY, 2),
        ([LOST] * 8, LOST, 6),
        ([LOST, LOST, None] + [LOST] * 8, LOST, 8),
    ],
)
def test_a_lease_outlives_what_another_process_cannot_see(
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[Exception | None],
    ends_with: Exception | None,
    after: int,
) -> None:
    """Each renewal takes 5 s by this clock, and 30 s after the last good one began it is over."""
    run(space(), trials=1, workers="inline")
    now, beaten, over = [0.0], [0], threading.Event()

    def renew(self: Store, name: str) -> None:
        now[0] += 5.0
        outcome = outcomes[beaten[0]] if beaten[0] < len(outcomes) else None
        beaten[0] += 1
        if beaten[0] > len(outcomes):
            over.set()
        elif outcome is not None:
            raise outcome

    monkeypatch.setattr(Store, "renew", renew)
    monkeypatch.setattr(heartbeat, "BEAT", 0.001)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with heartbeat.StudyLease(Store.open(), "s") as lease:
        if ends_with is None:
            assert over.wait(20)
            lease.check()
            assert beaten[0] >= after
        else:
            lease._thread.join(20)
            with pytest.raises(type(ends_with), match=str(ends_with)):
                lease.check()
            assert beaten[0] == after


DRIVER = """
import os, sys, time
sys.path.insert(0, {tests!r})
import studies as t
from moenas.evaluate import job as measure
import moenas.dashboard.server
moenas.dashboard.server.publish = lambda store, name: None
out = os.fdopen(os.dup(1), "w")  # what a candidate prints goes to stderr
def evaluate(job):
    print(job.trial, file=out, flush=True)
    time.sleep(0.4)
    return t.fake(job)
measure.evaluate = evaluate
from moenas.study.launch import Interrupted, run
try:
    run(t.space(), storage={storage!r}, trials=9, workers="inline")
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "sqlite":
        yield "sqlite:///moenas.db"
    else:
        yield request.getfixturevalue("postgres_url")


def start(storage: str) -> subprocess.Popen[str]:
    script = DRIVER.format(tests=str(Path(__file__).parents[1]), storage=storage)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )


def stop_in(process: subprocess.Popen[str], trial: int, number: signal.Signals) -> int:
    """Send a signal in the middle of a trial; return the exit code."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if int(line) >= trial:
                time.sleep(0.1)
                process.send_signal(number)
                break
    return process.wait(60)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGINT, ("Ctrl-C", 130)),
        (signal.SIGTERM, ("SIGTERM", 143)),
        (signal.SIGHUP, ("SIGHUP", 129)),
    ],
)
def test_a_signal_that_a_finalizer_swallows_still_ends_the_run(
    number: signal.Signals, reason: tuple[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    before = signal.getsignal(number), sys.unraisablehook
    endings = EndingSignals()

    def work() -> None:
        Finalized()
        time.sleep(20)

    with endings.heeded(), pytest.raises(KeyboardInterrupt):
        work()
    assert endings.reason == reason
    assert capfd.readouterr().err == ""
    assert (signal.getsignal(number), sys.unraisablehook) == before


def test_a_killed_run_ends_with_exactly_the_asked_trials(url: str, jobs: list[Job]) -> None:
    assert stop_in(start(url), 3, signal.SIGKILL) == -signal.SIGKILL
    left = load_study("s", url).optuna.get_trials(states=[TrialState.RUNNING])
    assert len(left) == 1
    assert stop_in(start(url), 6, signal.SIGTERM) == 143
    study = run(space(), storage=url, trials=9, workers="inline")
    assert_sound(study, 9)
    assert study.evaluation(left[0].number).attempt == 2
    with study.store.engine.connect() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM moenas_attempt")
        attempts = count.scalar_one()
    trained = sum("copied_from" not in e.metrics for e in study.view.evaluations)
    assert attempts == trained + 2, "only the two that were in flight are done twice"


def test_a_closed_terminal_ends_a_run_as_sigterm_does(url: str, jobs: list[Job]) -> None:
    assert stop_in(start(url), 3, signal.SIGHUP) == 129
    study = run(space(), storage=url, trials=6, workers="inline")
    assert_sound(study, 6)


AT_ONCE = """
import sys, time
sys.path.insert(0, {tests!r})
import studies as t
from moenas.errors import MoenasError
from moenas.study.launch import run
print("ready", flush=True)
sys.stdin.readline()
try:
    run(t.space(), storage={url!r}, trials=6, workers="inline")
except MoenasError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_of_two_runs_that_begin_a_study_at_once_one_is_busy(url: str) -> None:
    code = AT_ONCE.format(tests=str(Path(__file__).parents[1]), url=url)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=240)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 6], ended
    assert any("is being run by pid" in text for text in ended)
    assert_sound(load_study("s", url), 6)


def test_a_refused_run_leaves_no_database(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise InputError("no cluster there")

    monkeypatch.setattr(study, "open_pool", refuse)
    with pytest.raises(InputError, match="no cluster there"):
        run(space(), storage=f"sqlite:///{study_folder}/new.db", trials=1)
    assert not list(study_folder.glob("new.db*"))


ON_RAY = """
import sys
sys.path.insert(0, {tests!r})
import studies as t
from moenas.study.launch import Interrupted, run
try:
    run(t.space(), trials=5, workers=2, listeners=[lambda e: e.evaluation and print(e.trial, flush=True)])
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


@pytest.mark.slow
def test_a_study_on_ray_is_stopped_and_resumed() -> None:
    script = ON_RAY.format(tests=str(Path(__file__).parents[1]))
    place = tempfile.mkdtemp(prefix="x", dir="/tmp")  # short, for Ray's sockets
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["XDG_RUNTIME_DIR"] = place

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    process = begin()
    assert stop_in(process, 0, signal.SIGTERM) == 143
    assert not list(Path(place).glob("moenas-r*")), "no litter"
    with begin() as process:
        told, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    study = load_study("s")
    assert_sound(study, 5)
    assert len(told.split()) < 5
    assert all(e.status == "complete" for e in study.view.evaluations)
    shutil.rmtree(place)


# --- reading it --------------------------------------------------------------------------------


def test_a_front_shows_itself_in_one_short_line(jobs: list[Job]) -> None:
    front = run(space(), trials=8, workers="inline").front()
    assert front[0] == front.members[0]
    assert front[-1] == front.members[-1]
    assert list(front) == list(front.members)
    shown = repr(front)
    plural = "" if len(front) == 1 else "s"
    assert shown.startswith(f"Front({len(front)} member{plural}: {front[0].trial}")
    assert "val_loss, flops_per_token; hypervolume " in shown
    assert len(shown) < 200


def test_a_study_is_read_back(jobs: list[Job]) -> None:
    ran = run(space(more="require: [active_params < 20000]"), trials=8, workers="inline")
    study = load_study("s")
    front = study.front()
    copies = {e.trial for e in study.view.evaluations if "copied_from" in e.metrics}
    assert {m.trial for m in front} == {t.number for t in study.optuna.best_trials} - copies
    assert front.hypervolume == study.view.history[-1].hypervolume > 0
    first = front.members[0]
    assert first.values == study.evaluation(first.trial).values
    assert study.architecture(first.trial).plain() == first.architecture
    assert list(front.dataframe()["trial"]) == [m.trial for m in front]
    table = study.dataframe()
    assert len(table) == len(study.view.evaluations) > 8
    assert list(table.columns[:4]) == ["trial", "state", "val_loss", "flops_per_token"]
    rejected = table[table["state"] == "infeasible"]
    assert rejected["val_loss"].isna().all()
    assert (rejected["cost.active_params"] >= 20000).all()
    assert table["params.d_model"].isin([16, 24, 32]).all()
    assert "<table" in study._repr_html_()
    assert ran.finished == study.finished == "trials"
    with pytest.raises(NotFoundError, match="no finished trial 99"):
        study.evaluation(99)
    with pytest.raises(NotFoundError):
        load_study("t")


def test_a_listener_hears_of_every_trial(jobs: list[Job]) -> None:
    events: list[Event] = []
    study = run(
        space(more="require: [active_params < 20000]"), workers="inline", listeners=[events.append]
    )
    over = [e for e in events if e.evaluation is not None]
    rows = {e.trial: e for e in study.view.evaluations}
    assert [e.trial for e in over] == list(rows)
    done = [sum(counts(rows[t]) for t in list(rows)[: i + 1]) for i in range(len(rows))]
    assert [e.progress.evaluated for e in over] == done
    assert done[-1] == 6
    kinds = {e.trial: e.kind for e in over}
    for row in study.view.evaluations:
        wanted = "copied" if "copied_from" in row.metrics else row.status
        assert kinds[row.trial] == {"complete": "finished"}.get(wanted, wanted)
    last = events[-1]
    assert (last.kind, last.progress.front) == ("done", len(study.front()))
    complete = [e.values for e in study.view.evaluations if e.status == "complete"]
    assert last.progress.best["val_loss"] == min(v["val_loss"] for v in complete)


def test_a_study_of_real_models() -> None:
    study = run(space(), trials=3, workers="inline")
    assert_sound(study, 3)
    for row in study.view.evaluations:
        assert row.status == "complete", row.failure
        assert 2.0 < row.values["val_loss"] < 6.0
        assert row.values["flops_per_token"] == row.cost["flops_per_token"]
        assert row.weights_sha256 is not None
        read_weights(study.store.runs, "s", row.trial, row.weights_sha256)
    store = Store.open()
    assert store.study("s").data["sha256"] == study.view.evaluations[0].data["sha256"]


def test_a_study_with_a_fit_evaluates_architectures_of_one_cost_and_resumes() -> None:
    """Stored architectures have a plain width; infeasible draws say which width is nearest."""
    text = """
architecture:
  vocab_size: 256
  d_model: {int: [16, 128], step: 16}
  blocks:
    - repeat: {int: [1, 3]}
      ffn: {kind: moe, n_experts: 4, d_expert: {fit: {params: 60e3, within: 0.05}}}
"""
    fitted = space(text).with_search(trials=3)
    events: list[Event] = []
    run(fitted, workers="inline", listeners=[events.append])
    study = run(fitted, trials=5, workers="inline", listeners=[events.append])
    assert_sound(study, 5)
    complete = 0
    for evaluation in study.store.evaluations(study.name):
        near = abs(evaluation.cost["params"] - 60e3) <= 3000
        assert (evaluation.status == "complete") is near
        complete += near
        plain = study.store.architecture(study.name, evaluation.trial)
        assert type(plain["blocks"][0]["ffn"]["d_expert"]) is int
    assert complete >= 5  # copies of duplicates included
    for event in events:
        if event.kind == "infeasible":
            assert "the nearest width, " in event.text
