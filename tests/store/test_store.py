"""The store on SQLite and on a real PostgreSQL server: what is kept, and what many do at once."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
from concurrency import claim_and_record, open_empty, tell, together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moenas import pareto
from moenas.errors import (
    InputError,
    NotFoundError,
    StorageError,
    StorageLostError,
    StudyBusyError,
)
from moenas.records import Evaluation, Failure, ObjectiveInfo, StudyRecord
from moenas.store import database, migrations, rungs
from moenas.store.front_rows import FrontSummary
from moenas.store.store import Store
from moenas.store.tables import metadata
from moenas.store.urls import storage_url

OBJECTIVES = {"val_loss": "minimize", "speed": "maximize"}


@pytest.fixture
def url(database_url):
    """An empty database."""
    return database_url


@pytest.fixture
def store(url):
    return Store.open(url, create=True)


def a_study(name="x", trials=10, objectives=OBJECTIVES):
    infos = [ObjectiveInfo(n, d, f"{n} unit", "doc", "0" * 64) for n, d in objectives.items()]
    return StudyRecord(
        name=name,
        space_text="d_model: 8  # kept verbatim\n",
        overrides=["train.tokens=2e6"],
        space={"train": {"lr": 1e-3, "name": "gr\u00f6\u00dfe"}},
        space_sha256="a" * 64,
        objectives=[info.plain() for info in infos],
        data={"files": [["a.py", 12]], "entropy": [3.1, 2.4]},
        versions={"torch": "2.13"},
        trials=trials,
    )


def an_evaluation(trial, values=None, attempt=1, status="complete", study="x"):
    return Evaluation(study, trial, attempt, status, f"f{trial}", values=values or {})


def ask(store, trial, study="x"):
    store.add_candidate(study, trial, f"f{trial}", {"d_model": trial}, {"params": 10 * trial})


def finish(store, trial, values, study="x"):
    """Ask for a trial, start it and record its values in the order of the objectives."""
    ask(store, trial, study)
    named = dict(zip(OBJECTIVES, map(float, values), strict=True))
    attempt = store.start_attempt(study, trial)
    return store.record(an_evaluation(trial, named, attempt, study=study))


def sql(store, statement, *parameters):
    with store.engine.connect() as connection:
        return connection.execute(sqlalchemy.text(statement), *parameters).all()


# --- what goes in comes out --------------------------------------------------------------------


def test_studies_come_back_as_they_went_in(store, url):
    first = replace(a_study("first"), created_at="2026-01-01T00:00:00+00:00")
    store.create_study(a_study("x"))
    store.create_study(first)
    again = Store.open(url)
    assert again.study("first") == first
    assert [study.name for study in again.studies()] == ["first", "x"]
    again.set_trials("x", 99)
    assert store.study("x").trials == 99
    assert store.study("x").created_at > first.created_at


FULL = Evaluation(
    study="x",
    trial=3,
    attempt=1,
    status="complete",
    fingerprint="f3",
    values={"speed": 2.5, "val_loss": 1.0 / 3.0, "extra": 1e300},
    measurements={"speed": {"ratio": 1.1, "n": 30, "unit": "tokens/s"}, "unmeasured": {"n": 0}},
    metrics={"bits_per_byte": 1.5},
    curve=[
        {"tokens": 2**40, "train_loss": 5.5, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.1},
        {"tokens": 2**41, "train_loss": 5.0, "val_loss": 5.1, "ece": [1, 2]},
    ],
    routing=[
        {"layer": 1, "load": [0.25, 0.75], "max_vio": 0.5, "cv": 0.5, "entropy": 0.5, "dead": 0},
        {"layer": 3, "load": [1.0, 0.0], "dropped": 0.125, "dead": 1, "note": "\u00e9"},
    ],
    cost={"params": 2**40},
    violations={"params < 2e6": -1.0},
    seconds={"train": 1.5},
    device={"key": "cpu-1", "name": "A CPU", "threads": 1},
    versions={"torch": "2.13"},
    data={"name": "stdlib", "sha256": "b" * 64},
    seed=2**62,
    weights_sha256="c" * 64,
)


def test_an_evaluation_comes_back_as_it_went_in(store, url):
    store.create_study(a_study())
    ask(store, 3)
    assert store.evaluation("x", 3) is None
    assert store.start_attempt("x", 3) == 1
    assert store.record(FULL)
    assert Store.open(url).evaluation("x", 3) == FULL
    assert store.architecture("x", 3) == {"d_model": 3}


def test_a_failure_is_stored_whatever_it_says(store):
    store.create_study(a_study())
    ask(store, 0)
    failure = Failure("error", "NUL \0, half a pair \ud800", "\u00df")
    bad = replace(
        an_evaluation(0, {"val_loss": math.nan, "speed": 2.0}, status="failed", attempt=0),
        failure=failure,
        metrics={"train_loss": math.inf},
        curve=[{"tokens": 1, "train_loss": math.nan}],
        measurements={"speed": {"spread": -math.inf}},
    )
    assert store.record(bad)
    evaluation = store.evaluation("x", 0)
    assert evaluation.failure.message == "NUL \\x00, half a pair \\ud800"
    assert evaluation.failure.traceback == "\u00df"
    assert (evaluation.values, evaluation.metrics) == ({"speed": 2.0}, {"train_loss": None})
    assert (evaluation.curve, evaluation.measurements) == (
        [{"tokens": 1}],
        {"speed": {"spread": None}},
    )


@pytest.mark.parametrize("name", ["x", "gr\u00f6\u00dfe \u2713 'quoted\" -- ; DROP", "n" * 512])
def test_names_of_studies(store, name):
    store.create_study(a_study(name))
    finish(store, 0, (1, 1), study=name)
    assert store.front(name) == [0]


@pytest.mark.parametrize("name", ["", "  ", "n" * 513, "two\nlines", "nul\0"])
def test_names_that_cannot_be(store, name):
    with pytest.raises(InputError, match="study name"):
        store.create_study(a_study(name))
    assert store.studies() == []


def test_a_name_is_taken_once_and_an_unknown_one_gets_a_suggestion(store):
    store.create_study(a_study("tiny"))
    with pytest.raises(InputError, match="'tiny' already exists"):
        store.create_study(a_study("tiny"))
    with pytest.raises(NotFoundError, match=r"no study 'tinny'\. Did you mean 'tiny'\?"):
        store.study("tinny")
    with pytest.raises(NotFoundError, match="no trial 4; it has none yet"):
        store.architecture("tiny", 4)
    ask(store, 0, "tiny")
    with pytest.raises(NotFoundError, match="no trial 4; it has 1, up to trial 0"):
        store.start_attempt("tiny", 4)


def test_a_trial_keeps_its_architecture(store):
    store.create_study(a_study())
    ask(store, 0)
    ask(store, 0)
    with pytest.raises(InputError, match="trial 0 is architecture f0"):
        store.add_candidate("x", 0, "another", {}, {})
    assert store.view("x").architectures == {0: {"d_model": 0}}


def test_the_first_reference_time_holds(store):
    store.create_study(a_study())
    assert store.set_reference_ms("x", "cpu/decode", 1.5) == 1.5
    assert store.set_reference_ms("x", "cpu/decode", 9.0) == 1.5
    assert store.set_reference_ms("x", "gpu/decode", 0.5) == 0.5
    assert store.reference_ms("x") == {"cpu/decode": 1.5, "gpu/decode": 0.5}


# --- attempts ----------------------------------------------------------------------------------


def test_an_evaluation_counts_once(store):
    store.create_study(a_study())
    assert finish(store, 0, (1, 1))
    before = store.view("x")
    assert store.record(an_evaluation(0, {"val_loss": 0.0, "speed": 9.0}))
    assert store.view("x") == before


def test_a_late_result_is_refused_and_a_retry_takes_the_place_of_a_failure(store, caplog):
    store.create_study(a_study())
    ask(store, 0)
    crash = Failure("crashed", "SIGKILL")
    assert store.attempts("x", 0) == 0
    store.start_attempt("x", 0)
    failed = replace(an_evaluation(0, status="failed"), failure=crash, curve=[{"tokens": 1}])
    assert store.record(failed)
    assert store.start_attempt("x", 0) == 2
    assert store.start_attempt("x", 0) == 3
    with caplog.at_level(logging.WARNING, "moenas"):
        assert not store.record(an_evaluation(0, {"val_loss": 1.0, "speed": 1.0}, attempt=2))
    assert "attempt 2 came too late" in caplog.text
    assert store.evaluation("x", 0) == failed
    third = an_evaluation(0, {"val_loss": 2.0, "speed": 1.0}, attempt=3)
    assert store.record(third)
    assert store.evaluation("x", 0) == third
    assert store.attempts("x", 0) == 3
    rows = sql(store, "SELECT attempt, status FROM moenas_attempt ORDER BY attempt")
    assert rows == [(1, "failed"), (2, None), (3, "complete")]


def test_a_complete_trial_stays_as_it_is(store):
    store.create_study(a_study())
    finish(store, 0, (1, 1))
    before = store.evaluation("x", 0)
    attempt = store.start_attempt("x", 0)
    assert not store.record(an_evaluation(0, {"val_loss": 0.0, "speed": 9.0}, attempt))
    assert store.evaluation("x", 0) == before


@pytest.mark.parametrize("values", [{"val_loss": 1.0}, {"val_loss": 1.0, "speed": math.inf}])
def test_a_complete_trial_without_a_finite_value_leaves_nothing(store, values):
    store.create_study(a_study())
    ask(store, 0)
    with pytest.raises(InputError, match=r"speed is (None|inf)"):
        store.record(an_evaluation(0, values))
    assert store.evaluations("x") == []
    with pytest.raises(NotFoundError, match="no trial 5"):
        store.record(an_evaluation(5, {"val_loss": 1.0, "speed": 1.0}))


# --- the front ---------------------------------------------------------------------------------


def expected(values):
    """The reference point, history and front by front.py alone."""
    directions, trials = list(OBJECTIVES.values()), range(len(values))
    corner = pareto.reference_point(values, directions)
    on = np.flatnonzero(pareto.non_dominated(values, directions))
    return corner, pareto.history(values, directions, corner, trials), sorted(map(int, on))


def check_front(store, values, name="x"):
    corner, steps, on = expected(values)
    assert list(store.study(name).reference_point.values()) == corner
    points = store.history(name)
    assert [replace(s, hypervolume=0.0) for s in points] == [
        replace(s, hypervolume=0.0) for s in steps
    ]
    assert [s.hypervolume for s in points] == pytest.approx([s.hypervolume for s in steps])
    assert store.front_summary(name) == FrontSummary(points[-1].size, points[-1].hypervolume)
    best_first = [values[trial][0] for trial in store.front(name)]
    assert sorted(store.front(name)) == on
    assert best_first == sorted(best_first)


def test_front_and_history_after_each_trial(store):
    store.create_study(a_study())
    assert (store.front("x"), store.history("x"), store.front_summary("x")) == (
        [],
        [],
        FrontSummary(0, None),
    )
    values = np.random.default_rng(0).integers(0, 5, size=(15, 2)).astype(float)
    for trial, point in enumerate(values):
        finish(store, trial, point)
        check_front(store, values[: trial + 1])


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=6))
def test_front_and_history_of_any_values(store, values):
    name = uuid.uuid4().hex
    store.create_study(a_study(name))
    for trial, point in enumerate(values):
        finish(store, trial, point, study=name)
    check_front(store, [list(map(float, point)) for point in values], name)


def test_only_complete_trials_are_on_the_front(store):
    store.create_study(a_study())
    ask(store, 0)
    store.record(an_evaluation(0, {"val_loss": 0.0, "speed": 9.0}, status="failed"))
    ask(store, 1)
    broken = an_evaluation(1, {"val_loss": 0.0, "speed": 9.0}, attempt=0, status="infeasible")
    store.record(replace(broken, violations={"params < 1": 3.0}))
    finish(store, 2, (5, 5))
    finish(store, 3, (6, 6))
    ask(store, 4)
    view = store.view("x")
    assert view.front == [2, 3]
    assert store.count("x") == 4, "every trial with an evaluation, whatever came of it"
    assert [point.trial for point in view.history] == [2, 3]
    assert [e.trial for e in view.evaluations] == [0, 1, 2, 3]
    assert view.study == store.study("x")
    assert view.study.reference_point == {"val_loss": 6.1, "speed": 4.9}


def test_the_view_pareto_front_says_all_in_plain_sql(store):
    store.create_study(a_study())
    for trial, point in enumerate([(3, 1), (2, 2), (1, 1), (4, 4)]):
        finish(store, trial, point)
    rows = sql(
        store,
        """
        SELECT trial, fingerprint, entered_seq,
               MAX(CASE WHEN objective = 'val_loss' THEN value END) AS loss,
               MAX(CASE WHEN objective = 'speed' THEN value END) AS speed,
               MAX(unit), COUNT(*)
        FROM pareto_front WHERE study = 'x'
        GROUP BY trial, fingerprint, entered_seq ORDER BY loss
        """,
    )
    assert rows == [
        (2, "f2", 3, 1.0, 1.0, "val_loss unit", 2),
        (1, "f1", 2, 2.0, 2.0, "val_loss unit", 2),
        (3, "f3", 4, 4.0, 4.0, "val_loss unit", 2),
    ]
    left = sql(store, "SELECT trial, entered_seq, left_seq FROM moenas_front ORDER BY trial")
    assert left == [(0, 1, 2), (1, 2, None), (2, 3, None), (3, 4, None)]


def test_the_view_pareto_front_names_device_and_architecture(store):
    store.create_study(a_study())
    ask(store, 3)
    store.record(replace(FULL, attempt=0))
    rows = sql(store, "SELECT device, architecture, entered_at FROM pareto_front")
    assert {row.device for row in rows} == {"A CPU"}
    texts = [r.architecture for r in rows]
    assert all((json.loads(t) if isinstance(t, str) else t) == {"d_model": 3} for t in texts)
    assert all(row.entered_at.endswith("+00:00") for row in rows)


# --- the driver --------------------------------------------------------------------------------


def test_one_driver_at_a_time(store, url):
    store.create_study(a_study())
    store.claim("x")
    store.claim("x")
    other = Store.open(url)
    with pytest.raises(StudyBusyError) as refused:
        other.claim("x")
    who = f"pid {os.getpid()} on host {os.uname().nodename} (last seen "
    assert str(refused.value).startswith(f"study 'x' is being run by {who}")
    assert str(other.driver("x")).startswith(who)
    other.release("x")
    store.renew("x")
    store.release("x")
    assert store.driver("x") is None
    other.claim("x")


def test_a_driver_that_is_not_heard_of_loses_the_study(store, url):
    store.create_study(a_study())
    store.claim("x")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE moenas_driver SET heartbeat = heartbeat - 29")
    other = Store.open(url)
    with pytest.raises(StudyBusyError, match=r"last seen (29|30) s ago"):
        other.claim("x")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE moenas_driver SET heartbeat = heartbeat - 2")
    assert other.driver("x") is None
    other.claim("x")
    with pytest.raises(StudyBusyError, match=f"taken over by pid {os.getpid()}"):
        store.renew("x")
    store.release("x")
    other.renew("x")


def test_a_heartbeat_in_the_future_counts_no_longer_than_others(store, url):
    """A dead driver of another host, whose clock was a day ahead."""
    store.create_study(a_study())
    store.claim("x")
    with store.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE moenas_driver SET heartbeat = heartbeat + 86400, machine = 'another'"
        )
    other = Store.open(url)
    assert "its clock is 86" in other.driver("x")
    with pytest.raises(
        StudyBusyError, match=r"its clock is 86... s ahead of the clock of this host"
    ):
        other.claim("x")
    with pytest.raises(StudyBusyError, match="last seen 0 s ago"):
        other.claim("x")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE moenas_driver SET heartbeat = heartbeat - 31")
    other.claim("x")


CLAIM_AND_WAIT = """
import sys
from moenas.store.store import Store
Store.open(sys.argv[1]).claim("x")
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_killed_driver_is_replaced_at_once(store, url):
    store.create_study(a_study())
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(StudyBusyError, match=f"pid {process.pid} "):
            store.claim("x")
        process.kill()
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT) is None:
            pass
        store.claim("x")  # the dead process is not even waited for yet


# --- many at once ------------------------------------------------------------------------------


def test_six_processes_may_make_the_tables_at_once(url):
    assert together(open_empty, url, 6) == [0] * 6


def test_of_two_that_claim_and_record_at_once_one_wins(store, url):
    rounds = 6
    store.create_study(a_study())
    for trial in range(rounds):
        store.create_study(a_study(f"s{trial}"))
        ask(store, trial)
        store.start_attempt("x", trial)
    (claimed, fixed), (claimed_too, fixed_too) = together(claim_and_record, url, 2, rounds)
    assert claimed == [not other for other in claimed_too]
    assert fixed == fixed_too
    rows = store.evaluations("x")
    assert [e.trial for e in rows] == list(range(rounds))
    order = [point.trial for point in store.history("x")]
    assert sorted(order) == list(range(rounds))
    stored = {e.trial: [e.values["val_loss"], e.values["speed"]] for e in rows}
    _, steps, on = expected([stored[trial] for trial in order])
    assert sorted(order[row] for row in on) == sorted(store.front("x"))
    volumes = [point.hypervolume for point in store.history("x")]
    assert volumes == pytest.approx([step.hypervolume for step in steps])


def test_of_two_that_tell_a_trial_at_once_one_is_believed(store, url):
    import optuna

    trials = 8
    study = optuna.create_study(
        study_name="x", storage=store.optuna_storage(), directions=["minimize", "maximize"]
    )
    for _ in range(trials):
        study.ask()
    first, second = together(tell, url, 2, trials)
    assert sorted(first + second) == list(range(trials))
    told = {trial.number: int(trial.values[0]) for trial in study.trials}
    assert [told[trial] for trial in sorted(first)] == [0] * len(first)
    assert [told[trial] for trial in sorted(second)] == [1] * len(second)


# --- beside Optuna -----------------------------------------------------------------------------


def test_optuna_and_we_leave_one_another_alone(store, url):
    import optuna

    store.create_study(a_study())
    finish(store, 0, (1, 1))
    storage = store.optuna_storage()
    optuna.create_study(study_name="x", storage=storage)
    storage.upgrade()
    optuna.delete_study(study_name="x", storage=storage)
    assert storage.get_all_studies() == []
    assert Store.open(url).front("x") == [0]
    tables = sqlalchemy.inspect(store.engine).get_table_names()
    assert {"alembic_version", "moenas_alembic_version", "studies", "moenas_study"} <= set(tables)


def test_a_serving_storage_does_not_keep_a_writer_waiting(store):
    storage = store.optuna_storage(serving=True)
    with storage.engine.connect() as reader:
        reader.exec_driver_sql("SELECT * FROM studies").all()
        store.create_study(a_study())
    assert [study.name for study in store.studies()] == ["x"]


def test_an_optuna_schema_of_another_version_is_said(store):
    store.optuna_storage()
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v99'")
    with pytest.raises(StorageError, match="updating optuna"):
        store.optuna_storage()


def test_ten_objectives_and_130_members_are_recorded_at_once(tmp_path):
    names = {f"q{i}": "minimize" for i in range(10)}
    store = Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True)
    store.create_study(a_study(objectives=names))
    drawn = np.abs(np.random.default_rng(0).normal(size=(130, 10)))
    points = 1 - drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    longest, volumes = 0.0, []
    for trial, point in enumerate(points.tolist()):
        ask(store, trial)
        began = time.process_time()
        store.record(an_evaluation(trial, dict(zip(names, point, strict=True))))
        longest = max(longest, time.process_time() - began)
        volumes.append(store.front_summary("x").hypervolume)
    assert longest < 20.0, "an exact hypervolume of so many objectives takes minutes"
    assert volumes[-1] > volumes[0] > 0
    history = [point.hypervolume for point in store.history("x")]
    assert history == sorted(history)
    assert front_of(store) == 130


def front_of(store):
    return len(store.front("x"))


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 1e200])
def test_the_largest_values_leave_finite_numbers(store, value):
    store.create_study(a_study())
    for trial, values in enumerate([(1.0, 2.0), (value, -value), (-value, value), (0.0, 0.0)]):
        assert finish(store, trial, values)
    volumes = [point.hypervolume for point in store.history("x")]
    assert np.isfinite(volumes).all()
    assert volumes == sorted(volumes)


# --- the schema --------------------------------------------------------------------------------


def test_the_migrations_end_at_the_tables(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    store.optuna_storage()
    with store.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": migrations.VERSION_TABLE,
                "include_object": lambda thing, name, kind, *_: (
                    (kind != "table" or name.startswith("moenas_"))
                    and name != migrations.VERSION_TABLE
                ),
                "compare_type": True,
            },
        )
        assert compare_metadata(context, metadata) == []


def test_a_database_of_the_fourth_schema_keeps_its_rows(url, monkeypatch):
    """The fifth copies the evaluations on SQLite, whose view reads them."""
    monkeypatch.setattr(database, "REVISIONS", migrations.REVISIONS[:4])
    old = Store.open(url, create=True)
    old.create_study(a_study())
    with old.engine.begin() as connection:
        assert not sqlalchemy.inspect(connection).has_table("moenas_rung")
    monkeypatch.undo()
    for trial in range(3):
        ask(old, trial)
    row = "('x', {}, 1, 'complete', 'f', '2026', {}, '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', '{{}}')"
    names = (
        "study, trial, attempt, status, fingerprint, recorded_at, seed, metrics, cost, violations"
    )
    names += ", seconds, device, versions, data"
    with old.engine.begin() as connection:
        for trial in range(2):
            text = f"INSERT INTO moenas_evaluation ({names}) VALUES {row.format(trial, 2**40)}"
            connection.exec_driver_sql(text)
    before = old.evaluations("x")
    assert rungs.results(old, "x") == []
    assert rungs.pauses(old, "x") == {}
    old.engine.dispose()
    store = Store.open(url, create=True)
    assert store.evaluations("x") == before
    assert before[1].seed == 2**40
    with store.engine.connect() as connection:
        connection.exec_driver_sql("SELECT * FROM pareto_front").all()
    store.record(an_evaluation(2, {}, status="stopped"))
    assert store.evaluation("x", 2).status == "stopped"
    with pytest.raises(sqlalchemy.exc.IntegrityError), store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE moenas_evaluation SET status = 'unheard of'")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM moenas_candidate WHERE trial = 1")
    assert [e.trial for e in store.evaluations("x")] == [0, 2]


def test_the_list_of_versions_is_that_of_the_files():
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "moenas.store:migrations")
    revisions = ScriptDirectory.from_config(config).walk_revisions()
    assert [script.revision for script in revisions] == list(reversed(migrations.REVISIONS))


@pytest.mark.parametrize("create", [False, True])
def test_a_newer_schema_is_refused(store, url, create):
    store.create_study(a_study())
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE moenas_alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match=r"newer moenas \(schema 9999, this one knows 0011\)"):
        Store.open(url, create=create)
    assert sql(store, "SELECT version_num FROM moenas_alembic_version") == [("9999",)]


def test_a_database_without_our_tables_is_left_as_it_is(url):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE somebody (x INTEGER)")
    with pytest.raises(StorageError, match="holds no study of moenas"):
        Store.open(url)
    assert sqlalchemy.inspect(engine).get_table_names() == ["somebody"]
    Store.open(url, create=True)
    engine.dispose()


# --- SQLite ------------------------------------------------------------------------------------


def test_sqlite_readers_and_the_writer_do_not_wait_for_one_another(tmp_path):
    path = tmp_path / "moenas.db"
    store = Store.open(f"sqlite:///{path}", create=True)
    store.create_study(a_study())
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE moenas_study SET trials = 77")
    assert store.view("x").study.trials == 10
    writer.execute("COMMIT")
    assert store.view("x").study.trials == 77
    writer.close()


def test_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv("MOENAS_RUNS", raising=False)
    store = Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True)
    assert store.runs.parent == tmp_path / "moenas_runs"
    monkeypatch.setenv("MOENAS_RUNS", "/elsewhere")
    assert Store.open(store.url).runs == Path("/elsewhere") / store.runs.name


def test_nothing_is_left_beside_a_closed_database(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True)
    store.engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == ["moenas.db"]


def test_a_missing_file_is_named_and_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"sqlite:///moenas\.db: no such file .*moenas run"):
        Store.open()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "moenas.db"
    path.write_bytes(b"not a database, but somebody's letter" * 100)
    before = path.read_bytes()
    for create in (False, True):
        with pytest.raises(StorageError, match=r"moenas\.db: file is not a database; it is"):
            Store.open(f"sqlite:///{path}", create=create)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["moenas.db"]


def test_a_directory_that_is_missing_or_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match=f"there is no directory {tmp_path}/none; make it"):
        Store.open(f"sqlite:///{tmp_path}/none/moenas.db", create=True)
    with pytest.raises(StorageError, match="give a file in a directory that you may write"):
        Store.open("sqlite:////proc/moenas.db", create=True)
    with pytest.raises(StorageError, match="cannot be opened"):
        Store.open(f"sqlite:///{tmp_path}", create=True)


def test_a_database_that_may_only_be_read_is_read(tmp_path):
    path = tmp_path / "moenas.db"
    Store.open(f"sqlite:///{path}", create=True).create_study(a_study())
    url = f"sqlite:///file:{path}?mode=ro&uri=true"
    with pytest.raises(StorageError, match="readonly database; make the file"):
        Store.open(url, create=True)
    store = Store.open(url)
    assert store.study("x").trials == 10
    with pytest.raises(StorageLostError, match="readonly database; make the file"):
        store.set_trials("x", 11)


# --- URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("postgres://u:p@h/n", "postgresql+psycopg://u:p@h/n"),
        ("postgresql://u:p@h:1/n", "postgresql+psycopg://u:p@h:1/n"),
        ("postgresql+psycopg://h/n", "postgresql+psycopg://h/n"),
    ],
)
def test_urls_name_their_driver(given, used):
    assert storage_url(given).render_as_string(hide_password=False) == used


def test_where_the_url_comes_from(monkeypatch):
    monkeypatch.delenv("MOENAS_STORAGE", raising=False)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    assert str(storage_url(None)) == "sqlite:///moenas.db"
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///optuna.db")
    assert str(storage_url(None)) == "sqlite:///optuna.db"
    monkeypatch.setenv("MOENAS_STORAGE", "sqlite:///ours.db")
    assert str(storage_url(None)) == "sqlite:///ours.db"
    assert str(storage_url("sqlite:///given.db")) == "sqlite:///given.db"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("moenas.db", "not the URL of a database; write sqlite:///moenas.db"),
        ("mysql://me:secret@h/n", "'mysql' is not a database that moenas knows"),
        ("postgresql+asyncpg://me:secret@h/n", "'postgresql.asyncpg' is not"),
        ("postgresql://me:secret@h:port/n", "not the URL of a database"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://me:secret@127.0.0.1:1/n", "check that the server runs"),
        ("postgresql://127.0.0.1:1/n?user=me&password=secret", "check that the server runs"),
    ],
)
def test_bad_urls_are_said_in_one_line_without_the_password(url, said):
    with pytest.raises(StorageError, match=said) as refused:
        Store.open(url, create=True)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_store_shows_its_place_without_the_password(postgres_url, tmp_path):
    odd = sqlalchemy.make_url(postgres_url).set(password="se{c}ret")
    store = Store.open(odd.render_as_string(hide_password=False), create=True)
    assert "se{c}ret" in sqlalchemy.make_url(store.url).password
    assert "ret" not in store.place
    store.optuna_storage().get_all_studies()
    assert store.runs.parent.name == "moenas_runs"


def test_a_database_that_is_not_on_the_server(postgres_url):
    url = sqlalchemy.make_url(postgres_url).set(database="nowhere")
    with pytest.raises(StorageError, match='"nowhere" does not exist; create it'):
        Store.open(url.render_as_string(), create=True)


def test_a_connection_that_the_server_closed_is_opened_again(postgres_url):
    store = Store.open(postgres_url, create=True)
    storage = store.optuna_storage()
    names = [study.study_name for study in storage.get_all_studies()]
    records = store.studies()
    other = sqlalchemy.create_engine(postgres_url)
    with other.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database()"
        )
    other.dispose()
    assert store.studies() == records
    assert [study.study_name for study in storage.get_all_studies()] == names
