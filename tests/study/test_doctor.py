"""A study that others have damaged is examined, backed up and repaired."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from sqlalchemy import create_engine, make_url, text
from studies import assert_sound, space

from moenas.errors import StorageLostError, StudyBusyError
from moenas.records import Evaluation, Job
from moenas.store.store import Store
from moenas.store.weights import weights_path
from moenas.study import doctor
from moenas.study.launch import Event, Study, run

pytestmark = pytest.mark.usefixtures("study_folder", "jobs")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "sqlite":
        yield "sqlite:///moenas.db"
        return
    server = make_url(request.getfixturevalue("postgres_url"))
    own = server.set(database=f"doctor_{uuid.uuid4().hex}")
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {own.database}"))
    engine.dispose()
    yield own.render_as_string(hide_password=False)


@pytest.fixture
def study(url: str, jobs: list[Job]) -> Study:
    return run(space(), storage=url, trials=6, workers="inline")


def areas(study: Study) -> dict[str, int]:
    problems: dict[str, int] = {}
    for finding in doctor.examine(study.store, study.name):
        problems[finding.area] = problems.get(finding.area, 0) + 1
    return problems


def change(study: Study, *statements: str) -> None:
    with study.store.engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


DAMAGES = {
    "a state of Optuna's": ("UPDATE trials SET state = 'FAIL' WHERE number = 2", "trials"),
    "a value of Optuna's": (
        "UPDATE trial_values SET value = 9 WHERE objective = 0 AND trial_id ="
        " (SELECT min(trial_id) FROM trials)",
        "trials",
    ),
    "a member of the front": (
        "DELETE FROM moenas_front WHERE trial = (SELECT min(trial) FROM moenas_front"
        " WHERE left_seq IS NULL)",
        "front",
    ),
    "a hypervolume": ("UPDATE moenas_hypervolume SET hypervolume = 1", "front"),
    "a row of the history": ("DELETE FROM moenas_hypervolume WHERE seq = 3", "front"),
    "a reference point": ("UPDATE moenas_objective SET reference = 1e6", "front"),
    "all of the front": ("DELETE FROM moenas_front", "front"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_repaired(study: Study, damage: str) -> None:
    front, volume = [m.trial for m in study.front()], study.front().hypervolume
    assert doctor.examine(study.store, "s") == []
    statement, area = DAMAGES[damage]
    change(study, statement)
    assert set(areas(study)) == {area}
    backup = doctor.repair(study.store, "s", doctor.examine(study.store, "s"))
    assert backup is not None
    assert backup.is_file()
    again = Study(Store.open(study.store.url), "s")
    assert areas(again) == {}
    assert_sound(again, 6)
    assert [m.trial for m in again.front()] == front
    assert again.front().hypervolume == pytest.approx(volume, rel=1e-12)


def test_a_study_that_was_deleted_from_optuna_s_tables_is_restored(study: Study) -> None:
    optuna.delete_study(study_name="s", storage=study.store.url)
    assert areas(study) == {"trials": 6}
    doctor.repair(study.store, "s", doctor.examine(study.store, "s"))
    again = Study(Store.open(study.store.url), "s")
    assert areas(again) == {}
    assert_sound(again, 6)


def test_lost_and_changed_weights_are_named(study: Study) -> None:
    paths = [weights_path(study.store.runs, "s", trial) for trial in (0, 1)]
    paths[0].unlink()
    paths[1].write_bytes(b"others")
    findings = doctor.examine(study.store, "s")
    assert [(f.area, f.trial, f.repair) for f in findings] == [
        ("weights", 0, None),
        ("weights", 1, None),
    ]
    assert doctor.repair(study.store, "s", findings) is None


def test_the_start_of_a_run_examines_what_it_relies_on(study: Study) -> None:
    change(study, "UPDATE moenas_hypervolume SET hypervolume = 1")
    weights_path(study.store.runs, "s", 0).unlink()
    events: list[Event] = []
    run(space(), storage=study.store.url, trials=7, workers="inline", listeners=[events.append])
    said = [event.text for event in events if event.kind == "warning"]
    assert any("hypervolume" in text and "computed again" in text for text in said)
    assert any("weights of 1 trials, such as 0, are not there" in text for text in said)
    assert study.store.history("s")[5].hypervolume > 100
    assert set(areas(study)) == {"weights"}


def test_what_a_killed_run_left_is_removed(study: Study) -> None:
    folder = weights_path(study.store.runs, "s", 0).parents[1]
    for name in ("99/model.safetensors", "0/.model.safetensors.x1"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"half")
    assert areas(study) == {"files": 2}
    doctor.repair(study.store, "s", doctor.examine(study.store, "s"))
    assert areas(study) == {}
    assert not (folder / "99").exists()
    assert (folder / "0/model.safetensors").is_file()


def test_a_result_that_was_not_committed_keeps_its_weights(
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
            run(space(), trials=4, workers="inline")
    store = Store.open()
    problems = doctor.examine(store, "s")
    assert [(f.area, f.trial, f.repair) for f in problems] == [("files", 3, "record it")]
    assert doctor.examine(store, "s") == problems, "to examine changes nothing"
    doctor.repair(store, "s", problems)
    assert doctor.examine(store, "s") == []
    assert_sound(run(space(), trials=4, workers="inline"), 4)
    assert len(jobs) == 4


def test_a_study_at_work_is_not_examined(jobs: list[Job]) -> None:
    said: list[str] = []

    def listener(event: Event) -> None:
        if event.kind == "finished":
            with pytest.raises(StudyBusyError) as error:
                doctor.examine(Store.open(), "s")
            said.append(str(error.value))

    run(space(), trials=2, workers="inline", listeners=[listener])
    assert len(said) == 2
    assert all("is being run by pid" in line for line in said)


@pytest.mark.slow
def test_a_backup_of_postgresql_holds_the_rows(postgres_url: str, jobs: list[Job]) -> None:
    study = run(space(name="b"), storage=postgres_url, trials=2, workers="inline")
    backup = doctor.back_up(study.store, "b")
    with gzip.open(backup, "rt") as file:
        rows = json.load(file)
    assert len(rows["moenas_evaluation"]) == 2
    assert {row["state"] for row in rows["optuna"]} == {"COMPLETE"}


def test_a_backup_is_a_whole_database(study: Study, url: str) -> None:
    if not url.startswith("sqlite"):
        pytest.skip("a copy of the file is one of SQLite")
    backup = doctor.back_up(study.store, "s")
    assert backup.parent == Path.cwd()
    assert Store.open(f"sqlite:///{backup}").count("s") == 6
