"""Weights lie inside the runs folder whatever the study is called, and are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moenas.errors import InputError, NotFoundError
from moenas.records import Plain, WeightsFile
from moenas.resources import sha256
from moenas.store.weights import (
    adopt_draft,
    copy_weights,
    is_draft,
    place,
    read_weights,
    remove_drafts,
    sweep,
    weights_path,
    write_draft,
    write_weights,
)

HOSTILE = ["", "..", ".", "/etc/passwd", "a/../../b", "\x00", "a\nb", "CON", "x" * 500, "\ud800"]


@pytest.mark.parametrize("study", HOSTILE)
def test_no_name_leaves_the_folder(tmp_path: Path, study: str) -> None:
    runs = tmp_path / "runs"
    digest = write_weights(runs, study, 3, b"data")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files == [weights_path(runs, study, 3)]
    assert files[0].relative_to(runs).parts[1:] == ("3", "model.safetensors")
    assert read_weights(runs, study, 3, digest) == b"data"


@given(st.lists(st.text(), min_size=2, max_size=8, unique=True))
def test_names_never_share_a_folder(names: list[str]) -> None:
    paths = {weights_path(Path("runs"), name, 0) for name in names}
    assert len(paths) == len(names)
    assert all(path.parts[0] == "runs" and len(path.parts) == 4 for path in paths)


def test_a_failed_write_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = write_weights(tmp_path, "s", 0, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_weights(tmp_path, "s", 0, b"new")
    monkeypatch.undo()
    assert read_weights(tmp_path, "s", 0, digest) == b"old"
    assert [p.name for p in weights_path(tmp_path, "s", 0).parent.iterdir()] == [
        "model.safetensors"
    ]
    assert write_weights(tmp_path, "s", 0, b"new") == sha256(b"new")


def names(runs: Path, trial: int) -> list[str]:
    return [p.name for p in weights_path(runs, "s", trial).parent.iterdir()]


def test_a_copy_is_the_same_file_until_one_of_them_is_replaced(tmp_path: Path) -> None:
    digest = write_weights(tmp_path, "s", 0, b"data")
    for _ in range(2):
        copy_weights(tmp_path, "s", 0, 1, digest)
        assert weights_path(tmp_path, "s", 1).samefile(weights_path(tmp_path, "s", 0))
        assert names(tmp_path, 1) == ["model.safetensors"]
    other = write_weights(tmp_path, "s", 0, b"other")
    assert read_weights(tmp_path, "s", 0, other) == b"other"
    assert read_weights(tmp_path, "s", 1, digest) == b"data"
    copy_weights(tmp_path, "s", 0, 1, other)
    assert read_weights(tmp_path, "s", 1, other) == b"other"


def test_a_copy_without_hard_links_is_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    digest = write_weights(tmp_path, "s", 0, b"data")
    copy_weights(tmp_path, "s", 0, 1, digest)
    assert read_weights(tmp_path, "s", 1, digest) == b"data"
    assert not weights_path(tmp_path, "s", 1).samefile(weights_path(tmp_path, "s", 0))
    assert names(tmp_path, 1) == ["model.safetensors"]


def test_a_failed_copy_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, old = write_weights(tmp_path, "s", 0, b"new"), write_weights(tmp_path, "s", 1, b"old")
    with pytest.raises(InputError, match="not the weights that trial 0 ended with"):
        copy_weights(tmp_path, "s", 0, 1, old)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        copy_weights(tmp_path, "s", 0, 1, digest)
    assert read_weights(tmp_path, "s", 1, old) == b"old"
    assert names(tmp_path, 1) == ["model.safetensors"]


def test_missing_and_changed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="trial 7 are not there; set MOENAS_RUNS"):
        read_weights(tmp_path, "s", 7, "0" * 64)
    digest = write_weights(tmp_path, "s", 7, b"data")
    weights_path(tmp_path, "s", 7).write_bytes(b"Data")
    with pytest.raises(InputError, match="not the weights that trial 7 ended with"):
        read_weights(tmp_path, "s", 7, digest)


# --- written by a worker -------------------------------------------------------------------------


def draft(runs: Path, data: bytes = b"data", trial: int = 3) -> tuple[Plain, WeightsFile]:
    """The place that a worker gets for its weights, and the file that it writes there."""
    to = place(runs, "s", trial)
    assert to is not None
    file = write_draft(to, lambda path: Path(path).write_bytes(data))
    assert file is not None
    return to, file


def test_a_worker_writes_the_weights_and_the_driver_names_them(tmp_path: Path) -> None:
    to, file = draft(tmp_path)
    assert (file.size, file.sha256) == (4, sha256(b"data"))
    assert is_draft(file, to)
    assert not weights_path(tmp_path, "s", 3).exists()
    assert adopt_draft(weights_path(tmp_path, "s", 3), file) == file.sha256
    assert read_weights(tmp_path, "s", 3, file.sha256) == b"data"
    assert names(tmp_path, 3) == ["model.safetensors"]
    _, later = draft(tmp_path, b"other")
    assert read_weights(tmp_path, "s", 3, file.sha256) == b"data"
    adopt_draft(weights_path(tmp_path, "s", 3), later)
    assert read_weights(tmp_path, "s", 3, later.sha256) == b"other"


@pytest.mark.parametrize(
    "other", [{"machine": "another boot"}, {"user": -1}, {"inode": [0, 0]}, {"path": "/no/1/x"}]
)
def test_elsewhere_nothing_is_written(tmp_path: Path, other: Plain) -> None:
    to = place(tmp_path, "s", 3)
    assert to is not None
    assert write_draft({**to, **other}, lambda path: pytest.fail("written")) is None
    assert not weights_path(tmp_path, "s", 3).parent.exists()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def full(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise ValueError("I/O error: No space left on device")

    to = place(tmp_path, "s", 3)
    assert to is not None
    assert write_draft(to, full) is None
    assert not weights_path(tmp_path, "s", 3).parent.exists()
    (tmp_path / "file").touch()
    assert place(tmp_path / "file", "s", 3) is None


def test_a_draft_that_is_not_as_described_is_refused(tmp_path: Path) -> None:
    to, file = draft(tmp_path)
    digest = write_weights(tmp_path, "s", 3, b"old")
    Path(file.path).write_bytes(b"short" * 3)
    with pytest.raises(OSError, match="not the 4 bytes that were written"):
        adopt_draft(weights_path(tmp_path, "s", 3), file)
    Path(file.path).unlink()
    with pytest.raises(FileNotFoundError):
        adopt_draft(weights_path(tmp_path, "s", 3), file)
    Path(file.path).symlink_to(weights_path(tmp_path, "s", 3))
    with pytest.raises(OSError, match="not the 4 bytes"):
        adopt_draft(weights_path(tmp_path, "s", 3), file)
    assert read_weights(tmp_path, "s", 3, digest) == b"old"
    folder = weights_path(tmp_path, "s", 3).parent
    for path in (
        "/etc/passwd",
        f"{folder}/model.safetensors",
        f"{folder}/.model.safetensors./../x",
    ):
        assert not is_draft(WeightsFile(path, 4, ""), to)
    assert not is_draft(file, None)


def test_what_a_killed_worker_left_is_removed(tmp_path: Path) -> None:
    _, mine = draft(tmp_path)
    _, lost = draft(tmp_path)
    remove_drafts(tmp_path, "s", 3, but=mine)
    assert Path(mine.path).exists()
    assert not Path(lost.path).exists()
    sweep(tmp_path, "s")
    assert not Path(mine.path).parent.exists()
    remove_drafts(tmp_path, "s", 4)
