"""Where the files of a study's driver lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from moenas.service.drivers import Drivers
from moenas.service.settings import ServerSettings


@pytest.mark.parametrize("name", ["..", ".", "a/b", "", "x\0y", "a" * 300, "-rf", "_"])
def test_a_name_that_is_no_folder_deletes_nothing(tmp_path: Path, name: str) -> None:
    work = tmp_path / "work"
    (work / "a" / "b").mkdir(parents=True)
    (tmp_path / "moenas.db").touch()
    drivers = Drivers(ServerSettings(work_dir=work), "sqlite:///moenas.db")
    drivers.forget(name)
    assert (work / "a" / "b").is_dir()
    assert (tmp_path / "moenas.db").exists()
    assert drivers.folder(name).parent == work


def test_the_files_of_a_study_are_deleted(tmp_path: Path) -> None:
    drivers = Drivers(ServerSettings(work_dir=tmp_path), "sqlite:///moenas.db")
    drivers.folder("s").mkdir()
    drivers.forget("s")
    assert not drivers.folder("s").exists()


def test_two_names_never_share_a_folder(tmp_path: Path) -> None:
    drivers = Drivers(ServerSettings(work_dir=tmp_path), "sqlite:///moenas.db")
    names = ["s", "S", "a b", "a/b", "a b ", "", ".", "..", "x" * 100, "x" * 101, "x" * 102]
    folders = {drivers.folder(name) for name in names}
    assert len(folders) == len(names)
    assert {folder.parent for folder in folders} == {tmp_path}
