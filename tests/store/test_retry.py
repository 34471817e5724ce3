"""What fails for a reason that passes is done later; what does not pass is said at once."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from test_store import a_study, an_evaluation, ask

from moenas.errors import InputError, StorageLostError
from moenas.store import retry
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True).create_study(a_study())
    return tmp_path / "moenas.db"


def locked(path: Path, seconds: float) -> threading.Thread:
    """Let another connection hold the file for some seconds."""
    held = threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        held.set()
        time.sleep(seconds)
        connection.execute("ROLLBACK")
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    return thread


def test_a_lock_is_waited_for_and_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(f"sqlite:///{path}", create=True)
    storage = store.optuna_storage()
    thread = locked(path, 2.5)
    store.set_trials("x", 11)
    thread.join()
    assert store.study("x").trials == 11
    thread = locked(path, 2.5)
    optuna.create_study(storage=storage, study_name="x")
    thread.join()
    said = [r.getMessage() for r in caplog.records if r.name == "moenas.store.retry"]
    assert len(said) == 2
    for text in said:
        assert "database is locked" in text
        assert text.endswith("trying again for up to 300 s")


def test_patience_ends_with_what_holds_the_database(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOENAS_RETRY_S", "0.5")
    store = Store.open(f"sqlite:///{path}", create=True)
    storage = store.optuna_storage()
    thread = locked(path, 4)
    for change in (lambda: store.set_trials("x", 11), storage.get_all_studies):
        with pytest.raises(StorageLostError, match="database is locked; another program holds it"):
            change()
    thread.join()


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "1e9"])
def test_a_patience_that_is_no_number_of_seconds(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOENAS_RETRY_S", given)
    with pytest.raises(InputError, match=f"MOENAS_RETRY_S={given}: give a number of seconds"):
        retry.patience()


WAITING = """
import sys
from moenas.store.store import Store
store = Store.open(sys.argv[1], create=True)
print("open", flush=True)
sys.stdin.readline()
store.set_trials("x", 11)
"""


def test_ctrl_c_ends_a_wait_at_once(path: Path) -> None:
    command = [sys.executable, "-c", WAITING, f"sqlite:///{path}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "open\n"
        thread = locked(path, 6)
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(2)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert time.monotonic() - began < 2
        assert process.returncode == -signal.SIGINT
        thread.join()
    assert Store.open(f"sqlite:///{path}").study("x").trials == 10


def test_the_end_of_a_run_waits_for_no_lock(path: Path) -> None:
    lease = StudyLease(Store.open(f"sqlite:///{path}", create=True), "x")
    lease.__enter__()
    thread = locked(path, 8)
    began = time.monotonic()
    lease.__exit__()
    assert time.monotonic() - began < 5
    thread.join()


def test_optuna_says_what_the_database_said(path: Path) -> None:
    store = Store.open(f"sqlite:///{path}", create=True)
    storage = store.optuna_storage()
    study = optuna.create_study(storage=storage, study_name="x")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE trial_user_attributes")
    with pytest.raises(StorageLostError, match="no such table: trial_user_attributes"):
        study.ask().set_user_attr("a", 1)


class Lost:
    """Loses the answer of the next commit, which the database has done."""

    def __init__(self, engine: sqlalchemy.Engine) -> None:
        self.armed = False
        dialect = engine.dialect
        stock = dialect.do_commit

        def do_commit(connection: object) -> None:
            stock(connection)
            if self.armed:
                self.armed = False
                raise sqlite3.OperationalError("disk I/O error")

        dialect.do_commit = do_commit


def test_a_commit_whose_answer_was_lost_counts_once(path: Path) -> None:
    store = Store.open(f"sqlite:///{path}", create=True)
    lost = Lost(store.engine)

    def losing(call, *arguments):
        lost.armed = True
        returned = call(*arguments)
        assert not lost.armed
        return returned

    losing(store.create_study, a_study("y"))
    assert [study.name for study in store.studies()] == ["x", "y"]
    with pytest.raises(InputError, match="already exists"):
        store.create_study(a_study("y"))
    losing(store.claim, "x")
    losing(ask, store, 0)
    assert losing(store.start_attempt, "x", 0) == 1
    assert store.attempts("x", 0) == 1
    assert losing(store.record, an_evaluation(0, {"val_loss": 1.0, "speed": 1.0}))
    assert [point.trial for point in store.history("x")] == [0]
    assert losing(store.set_reference_ms, "x", "k", 2.0) == 2.0
    losing(store.set_trials, "x", 12)
    losing(store.release, "x")
    assert (store.study("x").trials, store.driver("x")) == (12, None)


def test_a_told_trial_whose_answer_was_lost_is_told_once(path: Path) -> None:
    store = Store.open(f"sqlite:///{path}", create=True)
    storage = store.optuna_storage()
    study = optuna.create_study(storage=storage, study_name="x")
    lost, trial = Lost(storage.engine), study.ask()
    lost.armed = True
    study.tell(trial, 1.5)
    assert not lost.armed
    assert [t.value for t in study.get_trials()] == [1.5]
    with pytest.raises(ValueError, match="Cannot tell a COMPLETE trial"):
        study.tell(trial, 2.5)


def test_a_server_that_was_restarted_is_waited_for(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every connection is cut, in and between transactions, while studies are written."""
    caplog.set_level(logging.WARNING)
    name = f"cut{os.getpid()}"
    store = Store.open(postgres_url, create=True)
    store.create_study(a_study(name))
    storage = store.optuna_storage()
    study = optuna.create_study(storage=storage, study_name=name)
    killer, over = sqlalchemy.create_engine(postgres_url), threading.Event()

    def cut() -> None:
        pause = 0.05  # it grows: on a busy machine, no transaction ends in 0.05 s
        while not over.wait(pause):
            pause *= 1.2
            with killer.connect() as connection:
                connection.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE pid <> pg_backend_pid() AND datname = current_database()"
                )

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        for trial in range(8):
            store.add_candidate(name, trial, f"f{trial}", {"d_model": 1}, {"params": 1})
            assert store.start_attempt(name, trial) == 1
            evaluation = an_evaluation(trial, {"val_loss": 1.0, "speed": trial}, study=name)
            assert store.record(evaluation)
            asked = study.ask()
            study.tell(asked, trial)
    finally:
        over.set()
        thread.join()
        killer.dispose()
    assert store.finished(name) == list(range(8))
    assert store.front_summary(name).size == 1
    values = [t.value for t in study.get_trials() if t.state.is_finished()]
    assert values == list(map(float, range(8)))
