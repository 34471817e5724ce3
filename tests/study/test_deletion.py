"""A study is deleted with its files, while its name is taken."""

from __future__ import annotations

import pytest
from studies import space

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
