"""A corpus is loaded once in a process, as long as it is the one that is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moenas.data import cache as corpus_cache
from moenas.data import loading
from moenas.data.section import parse
from moenas.records import Plain
from moenas.resources import Node


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_cache, "_KEPT", {})


def text(path: Path, word: str) -> Plain:
    path.write_text(f"{word} of a text\n" * 400)
    return parse(Node.wrap({"files": [str(path)]}))


def test_text_with_the_digest_asked_for_is_loaded_once(tmp_path: Path) -> None:
    section = text(tmp_path / "a.txt", "line")
    digest = loading.load(section).sha256
    first = corpus_cache.load(section, digest)
    assert corpus_cache.load(section, digest) is first
    unwanted = corpus_cache.load(section, "0" * 64)
    assert unwanted.sha256 == digest
    assert corpus_cache.load(section, "0" * 64) is not unwanted
    text(tmp_path / "a.txt", "other line")
    assert corpus_cache.load(section, digest).sha256 != digest, "the file has changed"


def test_few_are_kept_and_the_last_used_ones(tmp_path: Path) -> None:
    sections = [text(tmp_path / f"{i}.txt", f"word {i}") for i in range(corpus_cache.MOST + 1)]
    digests = [loading.load(section).sha256 for section in sections]
    first, second, *_ = [
        corpus_cache.load(*pair) for pair in zip(sections[:2], digests[:2], strict=True)
    ]
    assert corpus_cache.load(sections[0], digests[0]) is first
    corpus_cache.load(sections[2], digests[2])
    assert corpus_cache.load(sections[0], digests[0]) is first
    assert corpus_cache.load(sections[1], digests[1]) is not second


def test_arrays_of_tokens_are_looked_at_each_time(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    np.array([1, 2, 3] * 30, dtype="uint16").tofile(path)
    section = parse(Node.wrap({"tokens": str(path), "vocab_size": 9}))
    digest = loading.load(section).sha256
    assert corpus_cache.load(section, digest).sha256 == digest
    np.array([3, 2, 1] * 30, dtype="uint16").tofile(path)
    assert corpus_cache.load(section, digest).sha256 != digest
