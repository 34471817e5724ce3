"""Private folders: what others made is left alone, and what is left of the dead is removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from moenas import folders
from moenas.errors import MachineError
from moenas.folders import OWNER, is_private, make, roots, sweep

PREFIX = "moenas-t"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return roots()


def of_the_dead() -> Path:
    """A folder whose process has ended."""
    script = f"from moenas.folders import make; print(make({PREFIX!r}, 1000))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip())


def test_the_first_place_that_can_be_used_is_taken(places: list[Path]) -> None:
    assert [path.name for path in places] == ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TMPDIR"]
    folder = make(PREFIX, 1000)
    assert folder.parent == places[0]
    assert is_private(folder)
    places[1].rmdir()
    with pytest.raises(MachineError, match="its path is too long") as error:
        make(PREFIX, 10)
    assert all(str(path) in str(error.value) for path in places)
    (places[0] / folder.name / OWNER).unlink()
    folder.rmdir()
    places[0].rmdir()
    assert make(PREFIX, 1000).parent == places[2]


def test_what_the_dead_left_is_removed_and_nothing_else(places: list[Path]) -> None:
    dead, living = of_the_dead(), make(PREFIX, 1000)
    kept = [living]
    for name in ("a", "1x-a", "99999999999999999999-a", "abcdefgh", "ABCDEFGH"):
        kept.append(places[0] / (PREFIX + name))
        kept[-1].mkdir(mode=0o700)
    for owner in (
        "",
        "[]",
        "{}",
        "not JSON",
        '{"machine": 5, "pid": "x", "process_start": 1, "host": 2}',
    ):
        kept.append(Path(tempfile.mkdtemp(prefix=PREFIX, dir=places[1])))
        (kept[-1] / OWNER).write_text(owner)
    link = places[2] / (PREFIX + "linkname")
    link.symlink_to(living)
    sweep(PREFIX)
    assert not dead.exists()
    assert all(path.exists() for path in [*kept, link])


def test_a_process_of_another_namespace_is_not_judged(places: list[Path]) -> None:
    """Its number says nothing here. A folder of an earlier boot goes once it is a day old."""
    folder = of_the_dead()
    file = folder / OWNER
    owner = json.loads(file.read_text())
    boot = owner["machine"].partition("/")[0]
    file.write_text(json.dumps(owner | {"machine": f"{boot}/pid:[1]"}))
    old = time.time() - 2 * folders.FORGOTTEN_S
    os.utime(folder, (old, old))
    sweep(PREFIX)
    assert folder.exists()
    file.write_text(json.dumps(owner | {"machine": "another-boot/pid:[1]"}))
    os.utime(folder)
    sweep(PREFIX)
    assert folder.exists()
    os.utime(folder, (old, old))
    sweep(PREFIX)
    assert not folder.exists()
