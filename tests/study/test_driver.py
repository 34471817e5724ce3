"""Nothing that one trial, one value or another program does ends a study for ever."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial
from studies import SMALL, assert_sound, fake, press_ctrl_c, scripted, space

from moenas.errors import (
    EnvironmentFaultError,
    InputError,
    MoenasError,
    PartError,
    StorageLostError,
    StudyStoppedError,
)
from moenas.model.architecture import Architecture
from moenas.records import Cost, Evaluation, Failure, Job
from moenas.search import trials as asker
from moenas.space.space import Space
from moenas.store import attempts
from moenas.store.front_rows import FrontSummary
from moenas.store.store import Store
from moenas.store.weights import read_weights, weights_path, write_draft
from moenas.study import stop_rules as stops
from moenas.study.launch import Event, Study, load_study, run
from moenas.study.publishing import DashboardPublisher
from moenas.workers.pool import Inline, Result

PUBLISH = DashboardPublisher.publish
"""The real one, which `study_folder` leaves out."""

pytestmark = pytest.mark.usefixtures("study_folder")


def kinds(study: Study) -> dict[int, str]:
    """Trial -> kind of failure."""
    return {e.trial: e.failure.kind for e in study.view.evaluations if e.failure}


def test_a_whole_number_that_was_enqueued_as_a_float_is_one_point(jobs: list[Job]) -> None:
    small = space(SMALL.replace("{choice: [1, 2]}", "{int: [1, 2]}"))
    study = run(small, trials=1, workers="inline")
    for repeat in (1, 1.0, 2, 2.0):
        study.optuna.enqueue_trial({"d_model": 16, "blocks.0.repeat": repeat})
    study.optuna.enqueue_trial({"d_model": 16.0})
    study = run(small, trials=50, workers="inline")
    assert study.finished == "exhausted"
    assert len(jobs) == 6
    (failure,) = [e.failure for e in study.view.evaluations if e.failure]
    assert failure.message == "ValueError: d_model = 16.0 is not one of 16, 24, 32"


def test_a_job_says_how_many_candidates_share_its_memory() -> None:
    pool = scripted(lambda job: jobs.append(job) or fake(job)[0])  # type: ignore[func-returns-value]
    jobs: list[Job] = []
    run(space(), trials=1, pool=pool)
    assert [job.sharers for job in jobs] == [1]
    pool.sharers = 2
    run(space(), trials=3, pool=pool)
    assert [job.sharers for job in jobs] == [1, 2, 2]


def test_what_a_worker_wrote_is_named_or_removed() -> None:
    """Also where it is not sent, for its process was killed, or is not needed."""

    def evaluate(job: Job) -> Any:
        assert job.weights_to is not None
        assert (job.device, job.sharers) == ("cpu", 1)
        file = write_draft(job.weights_to, lambda path: Path(path).write_text(str(job.trial)))
        if job.trial == 1:
            raise ValueError("killed")
        return fake(job)[0], file

    pool = Inline(evaluate)
    study = run(space(), trials=3, pool=pool)
    assert kinds(study) == {1: "error"}
    runs = study.store.runs
    for trial in (0, 2):
        digest = study.evaluation(trial).weights_sha256
        assert digest is not None
        assert read_weights(runs, "s", trial, digest) == str(trial).encode()
    folder = weights_path(runs, "s", 0).parents[1]
    assert sorted(path.name for path in folder.iterdir()) == ["0", "2"]
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["model.safetensors"] * 2


def test_a_file_of_weights_that_vanished_loses_no_trial() -> None:
    def vanished(job: Job) -> Any:
        assert job.weights_to is not None
        file = write_draft(job.weights_to, lambda path: Path(path).write_text("x"))
        assert file is not None
        Path(file.path).unlink()
        return fake(job)[0], file

    pool = Inline(vanished)
    with pytest.raises(StorageLostError, match="cannot be written: No such file"):
        run(space(), trials=2, pool=pool)
    pool = Inline(fake)
    assert_sound(run(space(), trials=2, pool=pool), 2)


def test_the_dashboard_ends_no_study(monkeypatch: pytest.MonkeyPatch, jobs: list[Job]) -> None:
    monkeypatch.setattr(DashboardPublisher, "publish", PUBLISH)
    # Its libraries are not installed.
    monkeypatch.setitem(sys.modules, "moenas.dashboard.server", None)
    events: list[Event] = []
    study = run(space(), trials=2, workers="inline", listeners=[events.append])
    assert_sound(study, 2)
    said = [e.text for e in events if e.kind == "warning"]
    assert any("the dashboard's figures were not updated: ModuleNotFoundError" in t for t in said)


def test_the_front_is_read_once_for_a_whole_run(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    read, calls = Store.front_summary, []

    def counting(self: Store, name: str) -> FrontSummary:
        calls.append(name)
        return read(self, name)

    monkeypatch.setattr(Store, "front_summary", counting)
    events: list[Event] = []
    study = run(space(), trials=6, workers="inline", listeners=[events.append])
    assert calls == ["s"], "each evaluation that is recorded tells the front after it"
    assert (events[-1].progress.front, events[-1].progress.hypervolume) == (
        len(study.front()),
        study.front().hypervolume,
    )


# --- what a trial holds ------------------------------------------------------------------------

UNUSABLE: list[dict[str, Any]] = [
    {"d_model": 17},
    {"d_model": "wide"},
    {"blocks.0.repeat": 9},
    {"blocks.0.repeat": -1},
    {"blocks.0.repeat": 10**30},
    {"blocks.0.repeat": 1.5},
    {"blocks.0.repeat": math.nan},
    {"blocks.0.repeat": "two"},
    {"blocks.0.ffn": "dense", "blocks.0.ffn.dense.d_ff": 17},
    {"blocks.0.ffn": None},
    {"blocks.0.ffn": [1]},
]


@pytest.mark.parametrize("values", UNUSABLE, ids=str)
def test_an_enqueued_trial_that_is_no_point_of_the_space_fails(
    jobs: list[Job], values: dict[str, Any]
) -> None:
    study = run(space(), trials=1, workers="inline")
    study.optuna.enqueue_trial(values)
    study = run(space(), trials=3, workers="inline")
    assert_sound(study, 3)
    assert kinds(study) == {1: "parameters"}
    assert len(jobs) == 3
    assert load_study("s").optuna.trials[1].state == TrialState.FAIL


def test_an_enqueued_point_with_unknown_names_is_evaluated(jobs: list[Job]) -> None:
    study = run(space(), trials=1, workers="inline")
    study.optuna.enqueue_trial({"d_model": 16, "no.such": 3})
    study = run(space(), trials=2, workers="inline")
    assert_sound(study, 2)
    assert study.view.architectures[1]["d_model"] == 16


# --- what a worker sends -----------------------------------------------------------------------


def poisoned(change: Callable[[Evaluation], Evaluation]) -> Callable[[Job], Evaluation]:
    def script(job: Job) -> Evaluation:
        evaluation = fake(job)[0]
        return change(evaluation) if job.trial == 1 else evaluation

    return script


def measured(evaluation: Evaluation, details: Any) -> Evaluation:
    return dataclasses.replace(evaluation, measurements={"val_loss": details})


def valued(evaluation: Evaluation, value: Any) -> Evaluation:
    return dataclasses.replace(evaluation, values={**evaluation.values, "val_loss": value})


@pytest.mark.parametrize(
    "change",
    [
        lambda e: measured(e, {"reference_key": "x"}),
        lambda e: measured(e, {"reference_key": "x", "reference_ms": "fast", "ratio": 1.0}),
        lambda e: measured(e, {"reference_key": ["x"], "reference_ms": 1.0, "ratio": 1.0}),
        lambda e: measured(e, [1, 2]),
        lambda e: measured(e, {"f": object()}),
        lambda e: valued(e, 1.7e308),
        lambda e: valued(e, -1e200),
        lambda e: valued(e, "small"),
        lambda e: valued(e, None),
        lambda e: dataclasses.replace(e, values={}),
        lambda e: dataclasses.replace(e, curve=[1]),
        lambda e: dataclasses.replace(e, routing=[{"load": [1]}]),
        lambda e: dataclasses.replace(e, metrics={"x": {1, 2}}),
        lambda e: dataclasses.replace(e, status="finished"),
    ],
)
def test_what_cannot_be_used_of_a_result_fails_its_candidate(
    change: Callable[[Evaluation], Evaluation],
) -> None:
    pool = scripted(poisoned(change))
    study = run(space(), trials=4, pool=pool)
    assert_sound(study, 4)
    assert set(kinds(study)) == {1}
    assert all(math.isfinite(point.hypervolume) for point in study.view.history)
    assert_sound(run(space(), trials=5, pool=pool), 5)


# --- another program ---------------------------------------------------------------------------


def during(trial: int, act: Callable[[optuna.Study, int], None]) -> Callable[[Job], Evaluation]:
    """A script of another program that acts while a trial is evaluated."""

    def script(job: Job) -> Evaluation:
        if job.trial == trial:
            act(load_study("s").optuna, trial)
        return fake(job)[0]

    return script


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED])
def test_a_trial_that_another_program_tells_keeps_our_values(state: TrialState) -> None:
    def tell(study: optuna.Study, trial: int) -> None:
        study.tell(trial, [1.0, 2.0] if state == TrialState.COMPLETE else None, state=state)

    pool = scripted(during(2, tell))
    events: list[Event] = []
    finished = run(space(), trials=5, pool=pool, listeners=[events.append])
    assert_sound(finished, 5)
    assert kinds(finished) == {}
    assert [e.trial for e in events if e.kind == "warning"] == [2]


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL])
def test_a_trial_told_between_two_runs_is_evaluated(jobs: list[Job], state: TrialState) -> None:
    def interrupted(job: Job) -> Any:
        if job.trial == 2 and job.attempt == 1:
            press_ctrl_c()
        return fake(job)

    pool = Inline(interrupted)
    with pytest.raises(MoenasError):
        run(space(), trials=5, pool=pool)
    values = [1.0, 2.0] if state == TrialState.COMPLETE else None
    load_study("s").optuna.tell(2, values, state=state)
    events: list[Event] = []
    study = run(space(), trials=5, pool=pool, listeners=[events.append])
    assert_sound(study, 5)
    assert study.evaluation(2).attempt == 2
    assert "Optuna's tables" in next(e.text for e in events if e.kind == "warning")


def test_a_deleted_study_is_restored_from_our_rows(jobs: list[Job]) -> None:
    study = run(space(), trials=4, workers="inline")
    front = [m.trial for m in study.front()]
    optuna.delete_study(study_name="s", storage=study.store.url)
    study = run(space(), trials=6, workers="inline")
    assert_sound(study, 6)
    assert set(front) <= {e.trial for e in study.view.evaluations}
    assert len(jobs) == 6, "nothing is evaluated twice"


def test_a_study_deleted_in_mid_run_is_told_and_restored() -> None:
    def delete(study: optuna.Study, trial: int) -> None:
        optuna.delete_study(study_name="s", storage=Store.open().url)

    pool = scripted(during(3, delete))
    with pytest.raises(StorageLostError, match="deleted"):
        run(space(), trials=6, pool=pool)
    pool = scripted(lambda job: fake(job)[0])
    assert_sound(run(space(), trials=6, pool=pool), 6)


def test_an_added_and_an_asked_trial_get_rows_of_ours(jobs: list[Job]) -> None:
    study = run(space(), trials=2, workers="inline")
    given = {"d_model": CategoricalDistribution([16, 24, 32])}
    study.optuna.add_trial(
        create_trial(values=[0.5, 1.0], params={"d_model": 16}, distributions=given)
    )
    study.optuna.ask()
    study = run(space(), trials=4, workers="inline")
    assert kinds(study) == {2: "foreign"}
    told = study.optuna.get_trials()
    assert [t.number for t in told] == [e.trial for e in study.view.evaluations]
    assert not [t for t in told if not t.state.is_finished()]
    assert 2 not in [m.trial for m in study.front()]
    assert told[2].values == [0.5, 1.0], "what another program added stays as it is"
    assert len(jobs) == 4


def test_a_study_of_that_name_which_is_not_ours_is_refused(jobs: list[Job]) -> None:
    run(space(name="other"), trials=1, workers="inline")
    url = Store.open().url
    optuna.create_study(study_name="s", storage=url, directions=["minimize", "minimize"])
    with pytest.raises(InputError, match="which moenas did not make; give the space another"):
        run(space(), trials=1, workers="inline")
    assert [r.name for r in Store.open().studies()] == ["other"]


# --- the environment ---------------------------------------------------------------------------


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "FIRST_PAUSE_S", 0.01)


def full_disk() -> Failure:
    return Failure("environment", "/tmp/x: No space left on device")


def test_a_fault_of_the_environment_stops_the_run_and_uses_up_no_trial(short_pauses: None) -> None:
    broken = True

    def script(job: Job) -> Evaluation | Failure:
        return full_disk() if broken and job.trial >= 2 else fake(job)[0]

    pool = scripted(script)
    with pytest.raises(EnvironmentFaultError, match="No space left on device; put that right") as e:
        run(space(), trials=6, pool=pool)
    assert e.value.exit_code == 4
    assert Store.open().count("s") == 2
    broken = False
    study = run(space(), trials=6, pool=pool)
    assert_sound(study, 6)
    assert kinds(study) == {}


def test_a_fault_that_passes_is_waited_for(short_pauses: None) -> None:
    def script(job: Job) -> Evaluation | Failure:
        return full_disk() if job.trial == 1 and job.attempt < 3 else fake(job)[0]

    pool = scripted(script)
    events: list[Event] = []
    study = run(space(), trials=4, pool=pool, listeners=[events.append])
    assert_sound(study, 4)
    assert kinds(study) == {}
    assert sum(e.kind == "retried" for e in events) == 2


def test_one_candidate_that_always_meets_a_fault_fails_alone(short_pauses: None) -> None:
    pool = scripted(lambda job: full_disk() if job.trial == 1 else fake(job)[0])
    study = run(space(), trials=6, pool=pool)
    assert_sound(study, 6)
    assert kinds(study) == {1: "environment"}


def test_the_last_candidate_that_always_meets_a_fault_fails_at_the_third_start(
    short_pauses: None,
) -> None:
    pool = scripted(lambda job: full_disk() if job.trial == 2 else fake(job)[0])
    run(space(), trials=2, pool=pool)
    for _ in range(2):
        with pytest.raises(EnvironmentFaultError):
            run(space(), trials=3, pool=pool)
    study = run(space(), trials=3, pool=pool)
    assert_sound(study, 3)
    assert kinds(study) == {2: "environment"}


def test_the_same_failure_in_a_row_stops_a_run_at_any_time() -> None:
    def script(job: Job) -> Evaluation | Failure:
        failure = Failure("error", f"o.py:3: no file {job.trial}", cause="OSError o.py:3")
        return failure if job.trial > 3 else fake(job)[0]

    pool = scripted(script)
    with pytest.raises(StudyStoppedError, match="5 candidates in a row all failed for one"):
        run(space(), trials=40, pool=pool)
    assert attempts.evaluated(Store.open(), "s") >= 8


def test_a_result_beside_the_one_that_stops_a_run_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = scripted(lambda job: fake(job)[0])
    monkeypatch.setattr(pool, "capacity", 6)

    def wait(timeout: float) -> list[Result]:
        if timeout == 0.0:
            return []
        done = [Failure("error", "no module 'x'")] * 5 + [fake(pool.jobs[5])[0]]
        return [Result(job, outcome) for job, outcome in zip(pool.jobs, done, strict=True)]

    monkeypatch.setattr(pool, "wait", wait)
    with pytest.raises(StudyStoppedError):
        run(space(), trials=8, pool=pool)
    rows = load_study("s").view.evaluations
    assert [e.status for e in rows] == ["failed"] * 5 + ["complete"]


def test_a_part_that_counts_no_cost_fails_its_candidate(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    cost, calls = Space.cost, []

    def broken(self: Space, architecture: Architecture) -> Cost:
        calls.append(architecture)
        if len(calls) == 6:
            raise PartError("mine.py:3: SystemExit: 0")
        return cost(self, architecture)

    monkeypatch.setattr(Space, "cost", broken)
    study = run(space(), trials=6, workers="inline")
    assert list(kinds(study).values()) == ["error"]
    assert_sound(study, 6)


@pytest.mark.parametrize("sampler", ["gray_box", "evolution"])
def test_architectures_that_count_no_cost_end_no_search(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job], sampler: str
) -> None:
    """A sampler that looks at thousands of points meets all of them."""
    cost = Space.cost

    def broken(self: Space, architecture: Architecture) -> Cost:
        if architecture.d_model == 16:
            raise PartError("mine.py:3: ValueError: no cost")
        return cost(self, architecture)

    monkeypatch.setattr(Space, "cost", broken)
    study = run(space().with_search(sampler=sampler), trials=12, workers="inline")
    assert_sound(study, 12)
    assert len(jobs) == 12 - len(kinds(study)) > 6


def test_models_that_diverge_do_not_stop_a_study_that_has_candidates() -> None:
    def script(job: Job) -> Evaluation | Failure:
        return Failure("diverged", "loss is nan") if 2 < job.trial < 12 else fake(job)[0]

    pool = scripted(script)
    assert_sound(run(space(), trials=14, pool=pool), 14)


# --- samplers ----------------------------------------------------------------------------------


def sampler(text: str) -> str:
    Path("mine.py").write_text("from optuna.samplers import RandomSampler\n" + text)
    return "mine.py:Mine"


def test_a_sampler_that_stops_the_study_ends_it(jobs: list[Job]) -> None:
    name = sampler(
        "class Mine(RandomSampler):\n"
        "    told = 0\n"
        "    def after_trial(self, study, trial, state, values):\n"
        "        self.told += 1\n"
        "        if self.told == 3: study.stop()\n"
    )
    events: list[Event] = []
    study = run(
        space().with_search(sampler=name), trials=9, workers="inline", listeners=[events.append]
    )
    assert study.finished == "sampler", "one instance serves the run"
    assert len(jobs) == 3
    assert "proposes nothing more" in events[-1].text


def test_a_sampler_sees_the_attributes_of_a_trial_that_ends(jobs: list[Job]) -> None:
    """As `Study.tell` shows them: constraints of a function of the user's read them."""
    name = sampler(
        "class Mine(RandomSampler):\n"
        "    def after_trial(self, study, trial, state, values):\n"
        "        seen = [trial.user_attrs['params'], trial.constraints, len(study.trials)]\n"
        "        study._storage.set_trial_user_attr(trial._trial_id, 'seen', seen)\n"
    )
    text = space().text.replace("objectives:", "require: [params < 1e9]\nobjectives:")
    study = run(Space.parse(text, "s.yaml").with_search(sampler=name), trials=2, workers="inline")
    for trial in study.optuna.trials:
        params, constraints, n_trials = trial.user_attrs["seen"]
        assert params == trial.user_attrs["params"]
        assert constraints == trial.constraints
        assert "params < 1e9" in constraints
        assert n_trials == trial.number + 1


def test_a_trial_that_is_ended_during_its_draw_costs_no_candidate(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    draw = asker.OptunaTrials.draw

    def ended(self: asker.OptunaTrials, trial: Any) -> Any:
        if trial.number == 1:
            load_study("s").optuna.tell(1, state=TrialState.FAIL)
        return draw(self, trial)

    monkeypatch.setattr(asker.OptunaTrials, "draw", ended)
    study = run(space(), trials=3, workers="inline")
    assert kinds(study) == {1: "sampler"}
    assert len(jobs) == 3


@pytest.mark.parametrize("method", ["sample_independent", "infer_relative_search_space"])
@pytest.mark.parametrize("raised", ["raise ValueError('no idea')", "raise SystemExit(0)"])
def test_a_sampler_that_raises_fails_the_trial(jobs: list[Job], method: str, raised: str) -> None:
    name = sampler(
        "class Mine(RandomSampler):\n"
        f"    def {method}(self, study, trial, *rest):\n"
        f"        if trial.number == 1: {raised}\n"
        f"        return super().{method}(study, trial, *rest)\n"
    )
    study = run(space().with_search(sampler=name), trials=4, workers="inline")
    assert_sound(study, 4)
    assert kinds(study) == {1: "sampler"}


def test_a_sampler_that_always_raises_stops_the_run(jobs: list[Job]) -> None:
    name = sampler(
        "class Mine(RandomSampler):\n"
        "    def sample_independent(self, *rest): raise ValueError('no idea')\n"
    )
    with pytest.raises(StudyStoppedError, match="sampler: ValueError: no idea"):
        run(space().with_search(sampler=name), trials=4, workers="inline")
    Path("mine.py").write_text(Path("mine.py").read_text().replace("sample_independent", "other"))
    assert_sound(run(space().with_search(sampler=name), trials=4, workers="inline"), 4)


# --- listeners and files -----------------------------------------------------------------------


def test_a_listener_that_raises_ends_the_run_and_loses_nothing(jobs: list[Job]) -> None:
    def listener(event: Event) -> None:
        if event.kind == "finished" and event.trial == 2:
            raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        run(space(), trials=6, workers="inline", listeners=[listener])
    assert attempts.evaluated(Store.open(), "s") >= 3
    assert_sound(run(space(), trials=6, workers="inline"), 6)
    assert len(jobs) == 6


def test_a_listener_that_raises_at_the_end_is_heard(jobs: list[Job]) -> None:
    def listener(event: Event) -> None:
        if event.kind == "done":
            raise RuntimeError("the terminal is gone")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="the terminal is gone"):
            run(space(), trials=2, workers="inline", listeners=[listener])
    assert_sound(load_study("s"), 2)


def test_a_result_that_could_not_be_committed_is_not_evaluated_again(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    record = Store.record

    def lost(self: Store, evaluation: Evaluation) -> bool:
        if evaluation.trial == 3:
            raise StorageLostError("the server is gone")
        return record(self, evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "record", lost)
        with pytest.raises(StorageLostError):
            run(space(), trials=6, workers="inline")
    resumed = run(space(), trials=6, workers="inline")
    assert_sound(resumed, 6)
    assert [job.trial for job in jobs].count(3) == 1
    assert resumed.evaluation(3).weights_sha256 is not None
    assert not list(resumed.store.runs.rglob("*uncommitted*"))


def test_a_file_of_a_result_that_is_cut_off_is_dropped(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    tell = asker.OptunaTrials.tell

    def killed(self: Any, trial: Any, evaluation: Evaluation, *rest: Any) -> None:
        if evaluation.trial == 2:
            raise KeyboardInterrupt
        tell(self, trial, evaluation, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(asker.OptunaTrials, "tell", killed)
        with pytest.raises(MoenasError):
            run(space(), trials=4, workers="inline")
    (file,) = Store.open().runs.rglob("uncommitted/*.json")
    file.write_text(file.read_text()[:40])
    assert_sound(run(space(), trials=4, workers="inline"), 4)
    assert not file.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"values": {"val_loss": None}},
        {"values": [1]},
        {"study": "other"},
        {"trial": 99},
        {"attempt": 0},
        None,
    ],
    ids=str,
)
def test_a_file_that_holds_no_result_of_the_study_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job], change: dict[str, Any] | None
) -> None:
    record = Store.record

    def lost(self: Store, evaluation: Evaluation) -> bool:
        if evaluation.trial == 1:
            raise StorageLostError("the server is gone")
        return record(self, evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "record", lost)
        with pytest.raises(StorageLostError):
            run(space(), trials=2, workers="inline")
    (file,) = Store.open().runs.rglob("uncommitted/*.json")
    file.write_text(json.dumps(change and json.loads(file.read_text()) | change))
    assert_sound(run(space(), trials=2, workers="inline"), 2)
    assert not file.exists()


# --- asks ahead of need ------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "drawn"), [("gray_box", 3), ("tpe", 2)])
def test_a_slow_sampler_is_asked_while_all_workers_are_busy(
    monkeypatch: pytest.MonkeyPatch, sampler: str, drawn: int
) -> None:
    steps: list[str] = []
    ask = asker.OptunaTrials.ask

    def asked(self: asker.OptunaTrials, fruitless: int) -> Any:
        steps.append("ask")
        return ask(self, fruitless)

    monkeypatch.setattr(asker.OptunaTrials, "ask", asked)
    counts: list[int] = []

    def script(job: Job) -> Evaluation:
        counts.append(sum(t.state == TrialState.RUNNING for t in load_study("s").optuna.trials))
        steps.append("result")
        return fake(job)[0]

    pool = scripted(script)
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", lambda job: (steps.append("submit"), submit(job)))
    study = run(space().with_search(sampler=sampler), trials=8, pool=pool)
    assert_sound(study, 8)
    assert max(counts) == drawn
    assert pool.most == 2
    after = [steps[i + 1] for i, step in enumerate(steps[:-1]) if step == "result"]
    if sampler == "gray_box":
        # As long as there is something to start, a result is followed by a start, not by an ask.
        assert after[:6] == ["submit"] * 6
    else:
        assert "submit" not in after[:6]


def test_what_was_drawn_ahead_is_evaluated_by_the_next_run() -> None:
    def stop(job: Job) -> Evaluation | Failure:
        raise KeyboardInterrupt

    wanted = space().with_search(sampler="gray_box")
    with pytest.raises(MoenasError, match="Ctrl-C"):
        run(wanted, trials=5, pool=scripted(stop))
    before = [t.params for t in load_study("s").optuna.trials]
    assert [t.state for t in load_study("s").optuna.trials] == [TrialState.RUNNING] * 3
    study = run(wanted, trials=5, pool=scripted(lambda job: fake(job)[0]))
    assert_sound(study, 5)
    assert [t.params for t in study.optuna.trials[:3]] == before


def test_a_budget_that_is_used_up_leaves_no_trial_drawn_ahead() -> None:
    def script(job: Job) -> Evaluation:
        curve: Any = [{"tokens": 512, "train_loss": 2.0}]
        return dataclasses.replace(fake(job)[0], curve=curve)

    text = space().text.replace("search: {", "search: {stop: {train_tokens: 1024}, ")
    wanted = Space.parse(text, "s.yaml").with_search(sampler="gray_box", trials=20)
    study = run(wanted, pool=scripted(script))
    assert study.finished == "train_tokens"
    assert {t.state for t in study.optuna.trials} == {TrialState.COMPLETE}
    assert len(study.optuna.trials) == 4, "two that ran, one beside them, one drawn ahead"
