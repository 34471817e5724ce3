"""A database knows which one it is, and its weights do not replace another's."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy
from test_store import a_study, an_evaluation, ask

from moenas.errors import InputError, NotFoundError, StorageLostError
from moenas.store.identity import ReplacedError
from moenas.store.store import Store
from moenas.store.weights import FILE, read_weights, weights_path, write_weights


@pytest.fixture(autouse=True)
def no_folder_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOENAS_RUNS", raising=False)


def made(path: Path, data: bytes | None = None) -> tuple[Store, str]:
    """A store with study x, which this process runs, and the weights of trial 0."""
    store = Store.open(f"sqlite:///{path}", create=True)
    store.create_study(a_study())
    store.claim("x")
    digest = "" if data is None else write_weights(store.runs, "x", 0, data)
    store.release("x")
    store.engine.dispose()
    return store, digest


def opened(path: Path) -> Store:
    return Store.open(f"sqlite:///{path}")


def test_two_databases_in_one_folder_keep_their_weights(tmp_path: Path) -> None:
    _, first = made(tmp_path / "a.db", b"a")
    _, second = made(tmp_path / "b.db", b"b")
    assert read_weights(opened(tmp_path / "a.db").runs, "x", 0, first) == b"a"
    assert read_weights(opened(tmp_path / "b.db").runs, "x", 0, second) == b"b"


def test_a_copy_that_is_run_leaves_the_weights_of_the_original(tmp_path: Path) -> None:
    _, digest = made(tmp_path / "a.db", b"a")
    shutil.copy(tmp_path / "a.db", tmp_path / "copy.db")
    copy = Store.open(f"sqlite:///{tmp_path}/copy.db", create=True)
    copy.claim("x")
    assert read_weights(copy.runs, "x", 0, digest) == b"a"
    write_weights(copy.runs, "x", 0, b"of the copy")
    assert read_weights(opened(tmp_path / "a.db").runs, "x", 0, digest) == b"a"


def test_a_database_that_was_moved_with_its_folder_finds_its_weights(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    store, digest = made(tmp_path / "old" / "a.db", b"a")
    name = store.runs.name
    (tmp_path / "old").rename(tmp_path / "new")
    moved = Store.open(f"sqlite:///{tmp_path}/new/a.db", create=True)
    moved.claim("x")
    assert moved.runs == tmp_path / "new" / "moenas_runs" / name
    assert read_weights(moved.runs, "x", 0, digest) == b"a"


def test_a_database_that_was_moved_without_its_folder_goes_on_using_it(tmp_path: Path) -> None:
    store, digest = made(tmp_path / "a.db", b"a")
    (tmp_path / "new").mkdir()
    (tmp_path / "a.db").rename(tmp_path / "new" / "a.db")
    assert read_weights(opened(tmp_path / "new" / "a.db").runs, "x", 0, digest) == b"a"
    for _ in range(2):
        moved = Store.open(f"sqlite:///{tmp_path}/new/a.db", create=True)
        moved.claim("x")
        moved.release("x")
        assert moved.runs == store.runs
        assert read_weights(moved.runs, "x", 0, digest) == b"a"


def test_a_copy_in_another_folder_finds_the_weights_of_the_original(tmp_path: Path) -> None:
    _, digest = made(tmp_path / "a.db", b"a")
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "a.db", tmp_path / "new" / "a.db")
    for _ in range(2):
        copy = Store.open(f"sqlite:///{tmp_path}/new/a.db", create=True)
        copy.claim("x")
        copy.release("x")
        assert copy.runs.parent == tmp_path / "new" / "moenas_runs"
        assert read_weights(copy.runs, "x", 0, digest) == b"a"


LATER_TABLES = (
    "database", "change", "ended", "rung", "run", "reuse", "enqueued", "event", "event_counter",
    "runner", "token", "audit", "submission", "replicate", "reservation", "calibration",
    "study_calibration",
)  # fmt: skip
"""Tables that the first schema does not have."""


def test_weights_of_the_first_schema_are_found(tmp_path: Path) -> None:
    """A study of an earlier version: no identity, and weights right in moenas_runs."""
    store, _ = made(tmp_path / "a.db")
    digest = write_weights(tmp_path / "moenas_runs", "x", 3, b"of yesterday")
    with store.engine.begin() as connection:
        for table in LATER_TABLES:
            connection.exec_driver_sql(f"DROP TABLE moenas_{table}")
        connection.exec_driver_sql("UPDATE moenas_alembic_version SET version_num = '0001'")
    store.engine.dispose()
    before = (tmp_path / "a.db").read_bytes()
    reader = opened(tmp_path / "a.db")
    assert read_weights(reader.runs, "x", 3, digest) == b"of yesterday"
    assert reader.study("x").trials == 10
    assert reader.ended("x") is None
    reader.engine.dispose()
    assert (tmp_path / "a.db").read_bytes() == before, "a reader has written"
    run = Store.open(f"sqlite:///{tmp_path}/a.db", create=True)
    run.claim("x")
    run.set_ended("x", "exhausted")
    assert run.ended("x") == "exhausted"
    assert run.runs.parent == tmp_path / "moenas_runs"
    assert read_weights(run.runs, "x", 3, digest) == b"of yesterday"
    with pytest.raises(NotFoundError):
        read_weights(run.runs, "x", 4, digest)


def test_the_folder_that_a_run_was_told_holds_for_later_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOENAS_RUNS", str(tmp_path / "big"))
    _, digest = made(tmp_path / "a.db", b"a")
    monkeypatch.setenv("MOENAS_RUNS", str(tmp_path / "other"))
    other = Store.open(f"sqlite:///{tmp_path}/a.db", create=True)
    with pytest.raises(InputError, match=f"lie in {tmp_path}/big; move the folder"):
        other.claim("x")
    monkeypatch.delenv("MOENAS_RUNS")
    monkeypatch.chdir("/")
    assert opened(tmp_path / "a.db").runs.parent == tmp_path / "big"
    assert read_weights(opened(tmp_path / "a.db").runs, "x", 0, digest) == b"a"


def test_on_postgresql_every_folder_leads_to_one(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = sqlalchemy.create_engine(postgres_url)
    for name in ("one", "two"):
        with server.begin() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    urls = [
        server.url.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(False)
        for name in ("one", "two")
    ]
    digests = {}
    try:
        for url in urls:
            (tmp_path / "a").mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / "a")
            store = Store.open(url, create=True)
            store.create_study(a_study())
            store.claim("x")
            digests[url] = write_weights(store.runs, "x", 0, url.encode())
            store.release("x")
        (tmp_path / "b").mkdir()
        monkeypatch.chdir(tmp_path / "b")
        for url in urls:
            again = Store.open(url, create=True)
            again.claim("x")
            assert again.runs.parent == tmp_path / "a" / "moenas_runs"
            assert read_weights(again.runs, "x", 0, digests[url]) == url.encode()
        assert not (tmp_path / "b" / "moenas_runs").exists()
    finally:
        with server.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA one CASCADE")
            connection.exec_driver_sql("DROP SCHEMA two CASCADE")
        server.dispose()


def test_a_claim_sweeps_what_a_killed_run_left_half_written(tmp_path: Path) -> None:
    store, digest = made(tmp_path / "a.db", b"a")
    folder = weights_path(store.runs, "x", 0).parent
    (folder / f".{FILE}.abc").write_bytes(b"half")
    (folder / f".{FILE}.def").mkdir()
    (folder / f".{FILE}.def" / FILE).write_bytes(b"half")
    again = Store.open(f"sqlite:///{tmp_path}/a.db", create=True)
    again.claim("x")
    assert os.listdir(folder) == [FILE]
    assert read_weights(again.runs, "x", 0, digest) == b"a"


# --- the file in mid-run ---------------------------------------------------------------------------


def running(tmp_path: Path) -> tuple[Store, Path]:
    path = tmp_path / "moenas.db"
    store = Store.open(f"sqlite:///{path}", create=True)
    store.create_study(a_study())
    store.claim("x")
    store.renew("x")
    return store, path


def test_a_file_that_was_deleted_ends_the_run_and_is_not_made_anew(tmp_path: Path) -> None:
    store, path = running(tmp_path)
    for each in tmp_path.glob("moenas.db*"):
        each.unlink()
    for ask_it in (lambda: store.renew("x"), store.verify):
        with pytest.raises(ReplacedError, match="was moved or deleted while it was in use"):
            ask_it()
    with pytest.raises(StorageLostError, match=r"unable to open|moved or deleted"):
        store.optuna_storage()
    assert not path.exists()


def test_a_file_that_was_replaced_ends_the_run(tmp_path: Path) -> None:
    store, path = running(tmp_path)
    made(tmp_path / "other.db")
    path.rename(tmp_path / "elsewhere.db")
    (tmp_path / "other.db").rename(path)
    with pytest.raises(ReplacedError, match="was replaced by another one while it was in use"):
        store.renew("x")


def test_another_database_under_the_same_name_ends_the_run(tmp_path: Path) -> None:
    store, _ = running(tmp_path)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE moenas_database SET uuid = 'another'")
    with pytest.raises(ReplacedError, match="another database than the one that was opened"):
        store.renew("x")


def test_damage_is_found_before_a_run_is_done(tmp_path: Path) -> None:
    store, path = running(tmp_path)
    for trial in range(300):
        ask(store, trial)
    store.verify()
    store.engine.dispose()
    size = path.stat().st_size
    with path.open("r+b") as file:
        for page in range(8, size // 4096):
            file.seek(4096 * page)
            file.write(os.urandom(4096))
    with pytest.raises(StorageLostError, match=r"malformed.*restore a copy"):
        store.verify()


def test_no_change_of_folder_leads_to_another_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.open("sqlite:///moenas.db", create=True)
    store.create_study(a_study())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.engine.dispose()
    assert [study.name for study in store.studies()] == ["x"]
    store.optuna_storage().get_all_studies()
    assert store.runs.parent == tmp_path / "moenas_runs"
    assert os.listdir() == []


# --- reading where nobody may write ----------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_study_in_a_folder_of_another_user_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path("/tmp") / f"moenas-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        store, _ = made(folder / "moenas.db")
        ask(store, 0)
        store.record(an_evaluation(0, {"val_loss": 1.0, "speed": 2.0}))
        store.engine.dispose()
        os.seteuid(65534)
        try:
            reader = opened(folder / "moenas.db")
            assert reader.summary("x").counts == {"complete": 1}
            assert reader.front("x") == [0]
            reader.engine.dispose()
            assert caplog.text == ""
            os.seteuid(0)
            (folder / "moenas.db-wal").write_bytes(b"changes")
            os.seteuid(65534)
            opened(folder / "moenas.db").engine.dispose()
            assert "latest changes lie in" in caplog.text
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def test_readers_of_a_deleted_table_say_so(tmp_path: Path) -> None:
    store, _ = made(tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("DROP TABLE moenas_study")
    connection.close()
    with pytest.raises(StorageLostError, match="no such table: moenas_study; a table of moenas is"):
        store.studies()
