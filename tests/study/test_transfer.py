"""Studies under another name and in another database, on real SQLite and PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import Connection, insert, select
from studies import assert_sound, params, press_ctrl_c, space
from test_paused_candidates import halving

from moenas.errors import ConflictError, InputError, NotFoundError, StudyBusyError
from moenas.report.summary import listed_studies
from moenas.space.space import Space
from moenas.store import study_events, study_rows, submissions, tables
from moenas.store.files import remove_tree
from moenas.store.heartbeat import StudyLease
from moenas.store.object_path import ObjectPath, StorePath
from moenas.store.store import Store
from moenas.store.submissions import StudyFilter, Submission
from moenas.store.weights import read_weights, study_folder
from moenas.study import doctor, transfer
from moenas.study.archive import pack_study, unpack_study
from moenas.study.deletion import delete_study
from moenas.study.events import Event, Interrupted
from moenas.study.incoming import DRAFT, LONGEST_COPY_S, named_files
from moenas.study.launch import Study, load_study, run
from moenas.study.transfer import copy_study, rename_study

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

SOURCE = "sqlite:///source.db"


@pytest.fixture
def source(jobs: list[Any]) -> Study:
    """A finished study with weights, a failure, a note of a trial and of the study."""
    study = run(space(), trials=6, workers="inline", storage=SOURCE)
    storage = study.store.optuna_storage()
    study_id = storage.get_study_id_from_name("s")
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, 2)
    storage.set_study_system_attr(study_id, f"dashboard:{trial_id}:note_str:0", "a note")
    study.optuna.set_user_attr("team", "search")
    return study


def rows_of(store: Store, name: str) -> study_rows.StudyRows:
    return store.read(name, lambda connection: study_rows.read(connection, name))


def files_of(store: Store, name: str) -> dict[str, bytes]:
    folder = study_folder(store.runs, name)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_copy_is_equal_row_by_row_and_goes_back(source: Study, database_url: str) -> None:
    target = Store.open(database_url, create=True)
    other = optuna.create_study(study_name="other", storage=target.optuna_storage())
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)  # other ids there
    said = copy_study(source.store, "s", target)
    assert (said.trials, said.files) == (
        source.store.count("s"),
        len(named_files(rows_of(target, "s"))),
    )
    assert rows_of(target, "s") == rows_of(source.store, "s")
    assert files_of(target, "s") == files_of(source.store, "s") != {}

    back = Store.open("sqlite:///back.db", create=True)
    copy_study(target, "s", back, "t")
    expected = study_rows.renamed(rows_of(source.store, "s"), "t")
    assert rows_of(back, "t") == expected
    assert files_of(back, "t") == files_of(source.store, "s")

    # Optuna itself reads the same trials, and the note is that of the same trial.
    there, here = Study(target, "s").optuna, source.optuna
    for a, b in zip(there.trials, here.trials, strict=True):
        assert (a.number, a.state, a.values, a.params, a.distributions, a.system_attrs) == (
            *(b.number, b.state, b.values, b.params, b.distributions, b.system_attrs),
        )
        assert (a.datetime_start, a.datetime_complete) == (b.datetime_start, b.datetime_complete)
    storage = target.optuna_storage()
    study_id = storage.get_study_id_from_name("s")
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, 2)
    key = f"dashboard:{trial_id}:note_str:0"
    assert storage.get_study_system_attrs(study_id)[key] == "a note"
    assert len(other.trials) == 3
    assert doctor.examine(target, "s") == []


def test_a_copy_goes_on_like_the_original(source: Study, database_url: str) -> None:
    copy_study(source.store, "s", Store.open(database_url, create=True))
    copied = run(space(), trials=9, workers="inline", storage=database_url)
    original = run(space(), trials=9, workers="inline", storage=SOURCE)
    assert_sound(copied, 9)
    assert params(copied) == params(original)
    assert copied.front().hypervolume == original.front().hypervolume


def test_a_paused_candidate_is_copied_with_its_checkpoint(database_url: str) -> None:
    def stop(event: Event) -> None:
        if event.kind == "paused":
            press_ctrl_c()

    with pytest.raises(Interrupted):
        run(halving(), workers="inline", storage=SOURCE, listeners=[stop])
    source, target = Store.open(SOURCE), Store.open(database_url, create=True)
    copy_study(source, "s", target)
    assert [file for file in named_files(rows_of(target, "s")) if file.rung is not None]
    assert files_of(target, "s") == files_of(source, "s") != {}
    rename_study(target, "s", "renamed", "somebody")
    study = run(halving(name="renamed"), trials=6, workers="inline", storage=database_url)
    assert_sound(study, 6)


def test_a_name_that_is_taken_and_a_study_that_is_busy_are_refused(
    source: Study, database_url: str
) -> None:
    target = Store.open(database_url, create=True)
    copy_study(source.store, "s", target)
    before = rows_of(target, "s")
    with pytest.raises(ConflictError, match="already exists"):
        copy_study(source.store, "s", target)
    with pytest.raises(NotFoundError):
        copy_study(source.store, "nowhere", target)
    optuna.create_study(study_name="foreign", storage=target.optuna_storage())
    with pytest.raises(ConflictError, match="moenas did not make"):
        copy_study(source.store, "s", target, "foreign")
    with pytest.raises(InputError, match="printable"):
        copy_study(source.store, "s", target, "a\nb")
    with StudyLease(source.store, "s"), pytest.raises(StudyBusyError, match="being run by pid"):
        copy_study(source.store, "s", target, "t")
    with StudyLease(target, "s"), pytest.raises(StudyBusyError, match="being run by pid"):
        rename_study(Store.open(database_url), "s", "t", "somebody")
    assert rows_of(target, "s") == before
    assert [study.name for study in target.studies()] == ["s"]


def test_damaged_weights_are_refused_and_nothing_is_left(source: Study, database_url: str) -> None:
    file = named_files(rows_of(source.store, "s"))[0]
    file.path(source.store.runs, "s").write_bytes(b"other")
    target = Store.open(database_url, create=True)
    with pytest.raises(InputError, match="not the weights that trial"):
        copy_study(source.store, "s", target)
    assert target.studies() == []
    assert not list(target.runs.glob("*"))


KILLED = """
import os, signal, sys
from moenas.study import incoming
from moenas.cli.commands import main

def kill(*words): os.kill(os.getpid(), signal.SIGKILL)
real = os.rename
def kill_after(*words):
    real(*words)
    kill()

class Killing:
    def __getattr__(self, name): return getattr(os, name)
incoming.os = Killing()
incoming.os.{call} = {by}
sys.argv = ["moenas", "copy", "s", "--storage", "{source}", "--to", "{target}"]
main()
"""


@pytest.mark.parametrize(
    ("call", "by"), [("fsync", "kill"), ("rename", "kill"), ("rename", "kill_after")]
)
def test_a_killed_copy_leaves_nothing_half(
    source: Study, database_url: str, call: str, by: str
) -> None:
    code = KILLED.format(call=call, by=by, source=SOURCE, target=database_url)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    target = Store.open(database_url, create=True)
    assert target.studies() == []
    assert not target.holds_optuna_study("s")
    copy_study(source.store, "s", target)
    assert rows_of(target, "s") == rows_of(source.store, "s")
    assert files_of(target, "s") == files_of(source.store, "s")
    assert not list(target.runs.glob(f"{DRAFT}*"))


def test_a_renamed_study_goes_on_under_its_new_name(database_url: str, jobs: list[Any]) -> None:
    first = run(space(), trials=4, workers="inline", storage=database_url)
    before, weights = rows_of(first.store, "s"), files_of(first.store, "s")
    copied = run(space(name="later"), trials=4, workers="inline", storage=database_url)
    reuse = {"study": "later", "trial": 0, "from_study": "s", "from_trial": 0}
    first.store.apply("later", lambda connection: connection.execute(insert(tables.reuse), reuse))
    rename_study(first.store, "s", "new name", "somebody")
    assert rows_of(first.store, "new name") == study_rows.renamed(before, "new name")
    assert files_of(first.store, "new name") == weights
    assert not study_folder(first.store.runs, "s").exists()
    assert {study.name for study in first.store.studies()} == {"new name", "later"}
    reused = first.store.query(reused_studies)
    assert reused == {"new name"}
    for trial in first.store.front("new name"):
        digest = first.store.evaluation("new name", trial)
        assert digest is not None
        assert digest.weights_sha256 is not None
        read_weights(first.store.runs, "new name", trial, digest.weights_sha256)
    again = run(space(name="new name"), trials=6, workers="inline", storage=database_url)
    assert_sound(again, 6)
    assert copied.store.count("later") == 4
    events = first.store.query(lambda c: study_events.after(c, "new name", 0))
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert events[0].kind == "study_created"
    assert "renamed" in {event.kind for event in events}
    (last,) = first.store.query(lambda c: study_events.after(c, "s", 0))
    assert (last.kind, last.data) == ("deleted", {"renamed_to": "new name"})
    begun = run(space(), trials=2, workers="inline", storage=database_url)  # the name is free
    assert_sound(begun, 2)


def test_names_are_stored_in_the_form_of_space_files(source: Study, database_url: str) -> None:
    """U+00E9 is one character in NFC, and a letter with an accent in NFD."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    target = Store.open(database_url, create=True)
    assert copy_study(source.store, "s", target, decomposed).study == composed
    with pytest.raises(ConflictError, match="already exists"):
        copy_study(source.store, "s", target, composed)
    with pytest.raises(InputError, match="has this name already"):
        rename_study(target, composed, decomposed, "somebody")
    assert rename_study(target, composed, f"{decomposed} 2", "somebody").study == f"{composed} 2"
    pack_study(target, f"{composed} 2", Path("s.zip"))
    assert unpack_study(Path("s.zip"), target, decomposed).study == composed


def test_the_draft_of_a_killed_copy_is_removed_from_an_object_store(
    source: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOENAS_RUNS", f"memory://{uuid.uuid4().hex}")
    target = Store.open("sqlite:///objects.db", create=True)
    target.ensure_identity()
    root = target.runs
    assert isinstance(root, ObjectPath)
    now = int(time.time())
    dead, live = now - int(LONGEST_COPY_S) - 60, now - int(LONGEST_COPY_S) + 60
    for began in (dead, live):
        (root / f"{DRAFT}{began:x}-{'0' * 16}" / "trial_0" / "w").write_bytes(b"x")
    copy_study(source.store, "s", target)
    assert [path.name for path in root.children() if path.name.startswith(DRAFT)] == [
        f"{DRAFT}{live:x}-{'0' * 16}"
    ]
    assert len(list(root.glob("*/*/*"))) > 1


def test_the_old_name_is_taken_until_its_files_are_gone(
    source: Study, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    target = Store.open(database_url, create=True)
    copy_study(source.store, "s", target)
    seen: list[str] = []

    def checked(folder: StorePath) -> None:
        if folder == study_folder(target.runs, "s"):
            with pytest.raises(ConflictError, match="the name is not free"):
                copy_study(source.store, "s", target)
            for other in (("s", "t"), ("t", "s"), ("t", "u")):
                with pytest.raises(StudyBusyError, match="is being run by"):
                    rename_study(Store.open(database_url), *other, "somebody")
            with pytest.raises(StudyBusyError, match="is being run by"):
                delete_study(Store.open(database_url), "t", "somebody")
            seen.append("asked")
        remove_tree(folder)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "remove_tree", checked)
        rename_study(target, "s", "t", "somebody")
    assert seen == ["asked"]
    assert target.driver("t") is None
    assert_free(target, "s", source)


RENAME = """
import os
from moenas.store.store import Store
from moenas.study import transfer

def killed(folder):
    os.kill(os.getpid(), 9)

transfer.remove_tree = killed
transfer.rename_study(Store.open({url!r}), "s", "t", "somebody")
"""


@pytest.fixture
def half_renamed(source: Study, database_url: str) -> Store:
    """A database whose study `s` was renamed to `t` by a process that was killed meanwhile."""
    target = Store.open(database_url, create=True)
    copy_study(source.store, "s", target)
    code = RENAME.format(url=target.url)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    return target


def assert_free(store: Store, name: str, source: Study) -> None:
    """A study of another name that comes under this name keeps all of its files."""
    assert not study_folder(store.runs, name).exists()
    copy_study(source.store, "s", store, name)
    assert files_of(store, name) == files_of(source.store, "s")


def test_a_killed_rename_shows_the_study_once_and_is_finished_by_repeating_it(
    half_renamed: Store, source: Study, database_url: str
) -> None:
    store = half_renamed
    assert [study.name for study in store.studies()] == ["t"]
    assert [row["study"] for row in listed_studies(store)] == ["t"]
    page = store.query(lambda c: submissions.page(c, StudyFilter(), after=None, limit=9))
    assert [row.study for row in page] == ["t"]
    assert not store.knows("s")
    assert rows_of(store, "t") == study_rows.renamed(rows_of(source.store, "s"), "t")
    assert files_of(store, "t") == files_of(store, "s") == files_of(source.store, "s")
    way_out = "`moenas rename s t` finishes it"
    for refused in (
        lambda: load_study("s", database_url),
        lambda: rename_study(store, "s", "u", "somebody"),
        lambda: run(space(), trials=2, workers="inline", storage=database_url),
        lambda: copy_study(source.store, "s", store),
    ):
        with pytest.raises(InputError, match=way_out):
            refused()
    new = Submission("s", "ann", "name: s", [], 2, 0, "queued")
    with pytest.raises(ConflictError, match=way_out):
        store.transact(lambda c: submissions.submit(c, new, key=None, request_sha256="0" * 64))
    done = rename_study(store, "s", "t", "somebody")
    assert (done.study, done.trials) == ("t", store.count("t"))
    assert done.files == len(files_of(store, "t"))
    with pytest.raises(NotFoundError, match="no study 's'"):
        rename_study(store, "s", "t", "somebody")
    assert files_of(store, "t") == files_of(source.store, "s")
    (last,) = store.query(lambda c: study_events.after(c, "s", 0))[-1:]
    assert (last.kind, last.data) == ("deleted", {"renamed_to": "t"})
    assert_free(store, "s", source)


def test_a_killed_rename_is_undone_by_the_way_back(half_renamed: Store, source: Study) -> None:
    assert rename_study(half_renamed, "t", "s", "somebody").study == "s"
    assert [study.name for study in half_renamed.studies()] == ["s"]
    assert rows_of(half_renamed, "s") == rows_of(source.store, "s")
    assert files_of(half_renamed, "s") == files_of(source.store, "s")
    assert_free(half_renamed, "t", source)


@pytest.mark.parametrize("end", ["renamed", "deleted"])
def test_a_reserved_name_follows_its_study(half_renamed: Store, source: Study, end: str) -> None:
    if end == "renamed":
        rename_study(half_renamed, "t", "u", "somebody")
    else:
        delete_study(half_renamed, "t", "somebody")
    assert [study.name for study in half_renamed.studies()] == ["u"] * (end == "renamed")
    for name in ("s", "t"):
        assert_free(half_renamed, name, source)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_killed_rename_of_the_former_schema_is_finished(
    source: Study, database_url: str, deleted: bool
) -> None:
    """It has left a study without objectives under the former name."""
    store = Store.open(database_url, create=True)
    copy_study(source.store, "s", store)
    rename_study(store, "s", "t", "somebody")
    with store.engine.begin() as connection:
        for table in ("reservation", "calibration", "study_calibration"):
            connection.exec_driver_sql(f"DROP TABLE moenas_{table}")
        connection.exec_driver_sql("UPDATE moenas_alembic_version SET version_num = '0008'")
        columns = ", ".join(c.name for c in tables.study.c if c.name != "name")
        row = f"INSERT INTO moenas_study (name, {columns}) SELECT 's', {columns} FROM moenas_study"
        connection.exec_driver_sql(row)
        driver = "INSERT INTO moenas_driver VALUES ('s', 'o', 'h', 'm', 1, 'b', 0.0)"
        connection.exec_driver_sql(driver)
        if deleted:
            connection.exec_driver_sql("DELETE FROM moenas_study WHERE name = 't'")
            connection.exec_driver_sql("DELETE FROM moenas_event")
    rest = study_folder(store.runs, "s") / "trial_0"
    assert isinstance(rest, Path)
    rest.mkdir(parents=True)
    store.engine.dispose()
    store = Store.open(database_url, create=True)
    if deleted:
        assert store.studies() == []
    else:
        assert [study.name for study in store.studies()] == ["t"]
        rename_study(store, "s", "t", "somebody")
        assert not rest.exists()
    copy_study(source.store, "s", store)
    assert files_of(store, "s") == files_of(source.store, "s")


def reused_studies(connection: Connection) -> set[str]:
    return set(connection.scalars(select(tables.reuse.c.from_study)))


def test_a_submitted_study_is_renamed_only_where_no_driver_may_start(
    database_url: str, jobs: list[Any]
) -> None:
    store = run(space(), trials=2, workers="inline", storage=database_url).store
    new = Submission("t", "ann", space(name="t").text, [], 2, 0, "queued")
    store.transact(lambda c: submissions.submit(c, new, key=None, request_sha256="0" * 64))
    with pytest.raises(ConflictError, match="waits in the queue"):
        rename_study(store, "s", "t", "somebody")
    run(space(name="t"), trials=2, workers="inline", storage=database_url)
    with pytest.raises(ConflictError, match="is queued on a server"):
        rename_study(store, "t", "u", "somebody")
    store.transact(lambda c: submissions.cancel(c, "t", "ann"))
    for name in ("..", 'u "1"', "a/b"):
        with pytest.raises(InputError, match="1 to 100 letters"):
            rename_study(store, "t", name, "somebody")
    rename_study(store, "t", "u-1", "somebody")
    (rows,) = store.query(submissions.every)
    assert (rows.study, rows.state) == ("u-1", "cancelled")
    assert Space.parse(rows.space_text, "u.yaml", rows.overrides).name == "u-1"
