"""A study is deleted with its files, while its name is taken."""

from __future__ import annotations

import pytest
from studies import space

from moenas.data.loading import load
from moenas.data.published import publish
from moenas.store.files import remove_tree
from moenas.study import deletion
from moenas.study.launch import run

pytestmark = pytest.mark.usefixtures("study_folder")


def test_the_name_is_taken_until_the_files_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    store = run(space(), trials=2, workers="inline").store
    known: list[bool] = []

    def remove(folder: object) -> None:
        known.append(store.knows("s"))
        remove_tree(folder)  # type: ignore[arg-type]

    monkeypatch.setattr(deletion, "remove_tree", remove)
    assert deletion.delete_study(store, "s", "somebody") == 2
    assert known == [True]
    assert not store.knows("s")
    assert not list(store.runs.glob("s/*/*"))


def test_a_published_corpus_goes_with_its_last_study(database_url: str) -> None:
    store = run(space(), trials=1, workers="inline", storage=database_url).store
    run(space(name="t"), trials=1, workers="inline", storage=database_url)
    publish(store.runs, load(space().data))
    assert len(list(store.runs.glob("corpora/*"))) == 1
    assert deletion.delete_study(store, "s", "somebody") == 1
    assert len(list(store.runs.glob("corpora/*"))) == 1
    deletion.delete_study(store, "t", "somebody")
    assert not list(store.runs.glob("corpora/*"))
