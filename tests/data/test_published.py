"""A corpus that one machine publishes is the same on another one that has none of its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moenas.data import cache, loading
from moenas.data.corpus import Corpus
from moenas.data.published import FOLDER, fetch, publish
from moenas.data.section import parse
from moenas.errors import DataError
from moenas.records import Plain
from moenas.resources import Node
from moenas.store.files import matching, root_at
from moenas.store.object_path import ObjectPath, StorePath


@pytest.fixture
def root(root_url: str) -> StorePath:
    return root_at(root_url, Path("/"))


@pytest.fixture(autouse=True)
def another_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and no corpus in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_KEPT", {})
    monkeypatch.setattr(cache, "_FETCHED", {})
    return tmp_path / "cache" / "moenas"


def section_of(kind: str, folder: Path) -> Plain:
    folder.mkdir(exist_ok=True)
    if kind == "files":
        for name in ("a", "b"):
            (folder / f"{name}.txt").write_text(f"a line of {name}\n" * 400)
        return parse(Node.wrap({"files": [f"{folder}/*.txt"]}))
    values = np.random.default_rng(1).integers(0, 70_000, 4001)
    if kind == "shards":
        for number in range(3):
            part = values[number * 1500 : (number + 1) * 1500]
            part.astype("uint32").tofile(folder / f"t{number}.bin")
        return parse(Node.wrap({"tokens": f"{folder}/*.bin", "vocab_size": 70_000}))
    values.astype("uint32").tofile(folder / "t.bin")
    return parse(Node.wrap({"tokens": f"{folder}/t.bin", "vocab_size": 70_000}))


def assert_equal(fetched: Corpus, corpus: Corpus) -> None:
    assert fetched.sha256 == corpus.sha256
    for split in ("train", "val"):
        ours, theirs = getattr(fetched, split), getattr(corpus, split)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert (fetched.entropy, fetched.bigram_loss) == (corpus.entropy, corpus.bigram_loss)
    assert (fetched.vocab_size, fetched.is_bytes) == (corpus.vocab_size, corpus.is_bytes)
    assert fetched.domain_names == corpus.domain_names
    a, b = fetched.batch(3, 2, 16, 5), corpus.batch(3, 2, 16, 5)
    assert all((x == y).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["files", "tokens", "shards"])
def test_a_node_without_the_files_has_the_same_corpus(
    root: StorePath, tmp_path: Path, kind: str
) -> None:
    section = section_of(kind, tmp_path / "data")
    corpus = loading.load(section)
    address = publish(root, corpus)
    assert publish(root, corpus) == address
    assert [path.name for path in matching(root / FOLDER, "*")] == [f"{corpus.sha256}.corpus"]
    for file in (tmp_path / "data").iterdir():
        file.rename(tmp_path / file.name)
    fetched = cache.load(section, corpus.sha256, address)
    for file in (tmp_path / "data").parent.glob("*.[tb]*"):
        file.rename(tmp_path / "data" / file.name)
    assert_equal(fetched, loading.load(section))
    assert cache.load(section, corpus.sha256, address) is fetched


def test_a_node_with_other_files_gets_those_of_the_study(root: StorePath, tmp_path: Path) -> None:
    section = section_of("files", tmp_path / "data")
    corpus = loading.load(section)
    address = publish(root, corpus)
    (tmp_path / "data" / "a.txt").write_text("another text\n" * 400)
    assert loading.load(section).sha256 != corpus.sha256
    assert_equal(cache.load(section, corpus.sha256, address), corpus)


@pytest.mark.parametrize("root_url", ["memory"], indirect=True)
def test_an_object_is_fetched_once_and_again_if_it_was_changed(
    root: ObjectPath, tmp_path: Path, another_node: Path
) -> None:
    corpus = loading.load(section_of("files", tmp_path / "data"))
    address = publish(root, corpus)
    fetch(address, corpus.sha256)
    (kept,) = another_node.glob("*.corpus")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert_equal(fetch(address, corpus.sha256), corpus)
    root.remove_tree()
    assert_equal(fetch(address, corpus.sha256), corpus)


def test_what_is_not_there_or_is_wrong_is_named(root: StorePath, tmp_path: Path) -> None:
    section = section_of("files", tmp_path / "data")
    corpus = loading.load(section)
    address = publish(root, corpus)
    missing = {"path": address["path"].replace(corpus.sha256, "0" * 64)}
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(missing, "0" * 64)
    with pytest.raises(DataError, match=f"digest is {corpus.sha256[:12]}, not 000000000000"):
        fetch(address, "0" * 64)
    (tmp_path / "data" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt.*cannot be fetched"):
        cache.load(section, corpus.sha256, missing)
