"""Where the files of a study's driver lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from moenas.errors import InputError
from moenas.service.drivers import Drivers
from moenas.service.settings import ServerSettings


@pytest.mark.parametrize("name", ["..", ".", "a/b", ""])
def test_a_name_that_is_no_folder_deletes_nothing(tmp_path: Path, name: str) -> None:
    work = tmp_path / "work"
    (work / "a" / "b").mkdir(parents=True)
    (tmp_path / "moenas.db").touch()
    drivers = Drivers(ServerSettings(work_dir=work), "sqlite:///moenas.db")
    drivers.forget(name)
    assert (work / "a" / "b").is_dir()
    assert (tmp_path / "moenas.db").exists()
    with pytest.raises(InputError, match="1 to 100 letters"):
        drivers.folder(name)


def test_the_files_of_a_study_are_deleted(tmp_path: Path) -> None:
    drivers = Drivers(ServerSettings(work_dir=tmp_path), "sqlite:///moenas.db")
    drivers.folder("s").mkdir()
    drivers.forget("s")
    assert not drivers.folder("s").exists()
