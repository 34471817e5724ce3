"""A study whose weights lie below a URL does all that one with a folder does, with the same results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from studies import assert_sound, params, press_ctrl_c, space
from test_paused_candidates import halving

from moenas.errors import InputError
from moenas.evaluate.job import evaluate
from moenas.export.formats import export
from moenas.records import Evaluation, Job, WeightsFile
from moenas.store import study_rows
from moenas.store.files import matching, root_at
from moenas.store.object_path import StorePath
from moenas.store.store import Store
from moenas.store.weights import read_weights, study_folder, weights_path
from moenas.study import doctor
from moenas.study.archive import pack_study, unpack_study
from moenas.study.deletion import delete_study
from moenas.study.events import Event, Interrupted
from moenas.study.launch import Study, run
from moenas.study.maintenance import remeasure
from moenas.study.transfer import copy_study, rename_study
from moenas.workers.pool import Inline

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]


@pytest.fixture
def shared(root_url: str, monkeypatch: pytest.MonkeyPatch) -> StorePath:
    """Let weights lie below a URL of each kind; return it as a path."""
    monkeypatch.setenv("MOENAS_RUNS", root_url)
    return root_at(root_url, Path("/"))


def rows_of(store: Store, name: str) -> study_rows.StudyRows:
    return store.read(name, lambda connection: study_rows.read(connection, name))


def names_of(study: Study) -> list[str]:
    """The files of a study, without the folder of the study."""
    folder = study_folder(study.store.runs, study.name)
    files = [p for p in matching(folder, "*/*") if p.is_file()]
    return [f"{path.parent.name}/{path.name}" for path in files]


def assert_same_weights(one: Study, other: Study) -> None:
    """Every trial has the same values, and weights that are equal to the last bit."""
    for a, b in zip(one.view.evaluations, other.view.evaluations, strict=True):
        assert (a.trial, a.status, a.values) == (b.trial, b.status, b.values)
        if a.weights_sha256 is None:
            assert b.weights_sha256 is None
            continue
        first, second = (
            safetensors.torch.load(read_weights(s.store.runs, s.name, e.trial, e.weights_sha256))
            for s, e in ((one, a), (other, b))
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_workers_write_and_read_by_themselves(
    shared: StorePath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[object] = []
    jobs: list[Job] = []

    def noted(job: Job) -> object:
        assert job.weights is None
        assert job.checkpoint is None
        evaluation: tuple[Evaluation, Any] = evaluate(job)
        jobs.append(job)
        sent.append(evaluation[1])
        return evaluation

    study = run(halving(), storage="sqlite:///a.db", pool=Inline(noted))  # type: ignore[arg-type]
    assert_sound(study, 14)
    assert all(isinstance(file, WeightsFile) for file in sent)
    assert any(job.checkpoint_at is not None for job in jobs)
    assert str(study.store.runs).startswith(str(shared))
    complete = [e.trial for e in study.view.evaluations if e.status == "complete"]
    assert names_of(study) == sorted(f"{trial}/model.safetensors" for trial in complete)
    assert doctor.examine(study.store, "s") == []

    # 1. The same study with a folder has the same results. The study needs no setting to be read.
    monkeypatch.delenv("MOENAS_RUNS")
    assert_same_weights(
        Study(Store.open("sqlite:///a.db"), "s"),
        run(halving(), storage="sqlite:///b.db", workers="inline"),
    )
    # 2. An export and a new measurement read the weights from the URL.
    export(Store.open("sqlite:///a.db"), "s", complete[0], tmp_path / "out")
    before = study.evaluation(complete[0]).values
    said = remeasure("s", objective="val_loss", storage="sqlite:///a.db", workers="inline")
    assert said.complete == len(said.trials) > 0
    assert study.evaluation(complete[0]).values == before


@pytest.mark.parametrize("root_url", ["s3"], indirect=True)
def test_a_worker_without_the_corpus_fetches_it(
    shared: StorePath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def elsewhere(job: Job) -> object:
        return evaluate(replace(job, data={"kind": "files", "files": ["/nowhere/corpus.txt"]}))

    study = run(space(), trials=2, pool=Inline(elsewhere))  # type: ignore[arg-type]
    assert [e.status for e in study.view.evaluations] == ["complete"] * 2
    (kept,) = (tmp_path / "cache").rglob("*.corpus")
    assert kept.stem == study.record.data["sha256"]


@pytest.mark.parametrize("root_url", ["s3"], indirect=True)
def test_an_interrupted_study_goes_on_from_its_checkpoints(shared: StorePath) -> None:
    def stop(event: Event) -> None:
        if event.kind == "paused":
            press_ctrl_c()

    with pytest.raises(Interrupted):
        run(halving(), workers="inline", listeners=[stop])
    store = Store.open()
    (checkpoint,) = matching(study_folder(store.runs, "s"), "*/checkpoint-*")
    draft = checkpoint.parent / ".model.safetensors.0"
    draft.write_bytes(b"left by a killed worker")
    study = run(halving(), workers="inline")
    assert_sound(study, 14)
    complete = [e.trial for e in study.view.evaluations if e.status == "complete"]
    assert names_of(study) == sorted(f"{trial}/model.safetensors" for trial in complete)


@pytest.mark.parametrize("root_url", ["memory"], indirect=True)
def test_a_checkpoint_that_is_lost_costs_its_candidate_alone(shared: StorePath) -> None:
    paused: list[int | None] = []

    def stop(event: Event) -> None:
        if event.kind == "paused":
            paused.append(event.trial)
            if len(paused) == 3:  # one of three trains on
                press_ctrl_c()

    with pytest.raises(Interrupted):
        run(halving(), workers="inline", listeners=[stop])
    checkpoints = matching(study_folder(Store.open().runs, "s"), "*/checkpoint-*")
    assert len(checkpoints) == 3
    for checkpoint in checkpoints:
        checkpoint.unlink()
    said: list[str] = []
    study = run(halving(), workers="inline", listeners=[lambda event: said.append(event.text)])
    again = [text for text in said if "trained again from its start" in text]
    assert again
    assert all(any(str(checkpoint) in text for checkpoint in checkpoints) for text in again)
    assert_sound(study, 14)


def test_studies_are_copied_renamed_packed_and_deleted(
    shared: StorePath, jobs: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = run(space(), trials=6, workers="inline", storage="sqlite:///a.db")
    source, files = study.store, names_of(study)
    assert files
    # 1. From the URL to a folder and back.
    monkeypatch.setenv("MOENAS_RUNS", "local")
    target = Store.open("sqlite:///b.db", create=True)
    copy_study(source, "s", target)
    monkeypatch.setenv("MOENAS_RUNS", str(source.runs.parent).replace("/tmp", "file:///tmp", 1))
    if not str(source.runs).startswith("/"):
        monkeypatch.setenv("MOENAS_RUNS", str(source.runs.parent))
    back = Store.open("sqlite:///c.db", create=True)
    copy_study(target, "s", back, "t")
    for store, name in ((target, "s"), (back, "t")):
        assert names_of(Study(store, name)) == files
        assert doctor.examine(store, name) == []
    assert type(back.runs) is type(source.runs)
    # 2. Under another name, in the same store.
    rename_study(source, "s", "renamed", "somebody")
    assert names_of(Study(source, "renamed")) == files
    assert not study_folder(source.runs, "s").is_dir()
    # 3. In a file.
    pack_study(source, "renamed", tmp_path / "packed.zip")
    unpack_study(tmp_path / "packed.zip", back, "unpacked")
    assert names_of(Study(back, "unpacked")) == files
    assert not matching(back.runs, ".incoming-*/*/*")
    expected = study_rows.renamed(rows_of(source, "renamed"), "unpacked")
    assert rows_of(back, "unpacked") == expected
    # 4. The rest of the study runs on there; a deletion leaves the other studies.
    again = run(space(name="unpacked"), trials=8, workers="inline", storage=back.url)
    assert_sound(again, 8)
    assert params(again)[:6] == params(Study(back, "t"))[:6]
    delete_study(back, "unpacked", "somebody")
    assert not study_folder(back.runs, "unpacked").is_dir()
    assert names_of(Study(back, "t")) == files


def test_an_unknown_root_makes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for url in ("nowhere://x", "file://host/x", "http://127.0.0.1:9/x"):
        monkeypatch.setenv("MOENAS_RUNS", url)
        with pytest.raises(InputError, match="MOENAS_RUNS"):
            run(space(), workers="inline")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


@pytest.mark.parametrize("root_url", ["memory"], indirect=True)
def test_lost_weights_are_named_at_the_start(shared: StorePath, jobs: list[Any]) -> None:
    study = run(space(), trials=4, workers="inline")
    trial = next(e.trial for e in study.view.evaluations if e.weights_sha256)
    weights_path(study.store.runs, "s", trial).unlink()
    said: list[str] = []
    run(space(), trials=5, workers="inline", listeners=[lambda event: said.append(event.text)])
    assert any(f"weights of 1 trials, such as {trial}, are not there" in text for text in said)
