"""Paths below a URL do what pathlib does with the same names in a folder, in memory and on an S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest
from object_store import empty_root

from moenas.errors import InputError
from moenas.store.object_path import ObjectPath, check_url, is_url


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> ObjectPath:
    bucket = "memory://runs" if request.param == "memory" else request.getfixturevalue("s3_bucket")
    return ObjectPath(empty_root(bucket))


def test_names_are_those_of_pathlib() -> None:
    for text in ("a/b/c.txt", "bucket/.x", "b/c"):
        path, other = ObjectPath(f"s3://{text}"), Path(f"/{text}")
        assert path.name == other.name
        assert str(path.parent / "d") == f"s3:/{other.with_name('d')}" == str(path.with_name("d"))
    assert ObjectPath("s3://a/b/") == ObjectPath("s3://a/b")
    assert len({ObjectPath("s3://a"), ObjectPath("s3://a/"), ObjectPath("gs://a")}) == 2
    assert is_url("s3://a")
    assert not is_url("/a:b/c")


NAMES = ("0/model", "0/.model.1", "1/model", "1/checkpoint-1", "uncommitted/0-1.json", "deep/1/2/x")


@pytest.mark.parametrize(
    "pattern", ["*/model", "*/*", "*", "0/*", "*/.model.*", "uncommitted/*.json"]
)
def test_patterns_match_what_pathlib_matches(
    root: ObjectPath, tmp_path: Path, pattern: str
) -> None:
    for name in NAMES:
        (root / name).write_bytes(name.encode())
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    matched = {str(path).removeprefix(f"{root}/"): path.read_bytes() for path in root.glob(pattern)}
    files = [path for path in tmp_path.glob(pattern) if path.is_file()]
    assert matched == {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}


def test_objects_are_written_copied_renamed_and_removed(root: ObjectPath, tmp_path: Path) -> None:
    first, second = root / "a/first", root / "b/second"
    assert not first.is_file()
    assert not root.is_dir()
    with pytest.raises(FileNotFoundError) as caught:
        first.read_bytes()
    assert caught.value.filename == str(first)
    first.unlink()
    (tmp_path / "local").write_bytes(b"one")
    first.upload(str(tmp_path / "local"))
    assert (first.size(), first.read_bytes(), first.open().read()) == (3, b"one", b"one")
    assert root.is_dir()
    first.copy(second)
    first.write_bytes(b"other")
    assert second.read_bytes() == b"one"
    first.replace(second)
    assert second.read_bytes() == b"other"
    assert [path.name for path in root.glob("*/*")] == ["second"]
    second.download(str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"other"
    root.remove_tree()
    assert not root.is_dir()


def test_a_prefix_does_not_match_a_longer_name(root: ObjectPath) -> None:
    (root / "study-1/0/model").write_bytes(b"x")
    (root / "study-11/0/model").write_bytes(b"y")
    (root / "study-1").remove_tree()
    assert [str(path) for path in root.glob("*/*/*")] == [f"{root}/study-11/0/model"]


def test_a_url_that_can_be_written_is_left_as_it_was(root: ObjectPath) -> None:
    check_url(root.url, "MOENAS_RUNS")
    assert not root.is_dir()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nowhere://x", "not a file system of fsspec"),
        ("ftp://user:secret@host/x", "holds a password"),
        ("gs://bucket/x", r"pip install 'moenas\[gcs\]'"),
        ("s3://no-such-bucket-here/x", "cannot be written"),
        ("http://127.0.0.1:9/x", "cannot be written"),
    ],
)
def test_a_url_that_cannot_be_written_is_refused(s3_bucket: str, url: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_url(url, "MOENAS_RUNS")
    assert "secret" not in str(caught.value)
