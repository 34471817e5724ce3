"""Which domain each token of a corpus is of."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moenas.data import domains, loading
from moenas.data.domains import NAMED, OTHER, Domains
from moenas.data.section import parse
from moenas.resources import Node

PIECES = st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.integers(1, 9)), max_size=30)


@given(PIECES, PIECES)
def test_runs_say_the_domain_of_every_token(
    train: list[domains.Piece], val: list[domains.Piece]
) -> None:
    splits = {"train": train, "val": val}
    sizes = {d: sum(n for p in splits.values() for e, n in p if e == d) for d, _ in train + val}
    plain = domains.table(splits)
    if len(sizes) < 2:
        assert plain is None
        return
    assert plain is not None
    parsed = Domains.parse(json.loads(json.dumps(plain)))
    named = set(parsed.names) - {OTHER}
    assert len(named) == min(len(sizes), NAMED)
    assert (OTHER in parsed.names) is (len(sizes) > NAMED)
    unnamed = sizes.keys() - named
    assert all(sizes[small] <= sizes[large] for small in unnamed for large in named)
    for split, pieces in splits.items():
        each = [d if d in named else OTHER for d, size in pieces for _ in range(size)]
        places = np.arange(len(each))
        assert [parsed.names[i] for i in parsed.at(split, places)] == each
        runs = [number for number, _ in plain[split]]
        assert all(a != b for a, b in pairwise(runs)), "runs are merged"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/t/a/x.txt", "/t/a/b/y.txt", "/t/c/z.md"], ["a/", "a/", "c/"]),
        (["/t/a/x.txt", "/t/z.md"], ["a/", "./"]),
        (["/t/x.txt", "/t/y.py", "/t/LICENCE"], [".txt", ".py", "no extension"]),
        (["/t/x.txt", "/t/y.txt"], ["x.txt", "y.txt"]),
        (["/t/x.txt"], ["x.txt"]),
    ],
)
def test_files_are_told_apart_by_folder_then_extension_then_name(
    paths: list[str], expected: list[str]
) -> None:
    assert list(domains.of_files(paths).values()) == expected


def test_library_files_are_of_their_package() -> None:
    names = ["abc.py", "asyncio/events.py", "email/mime/text.py"]
    assert list(domains.of_library(names).values()) == ["modules", "asyncio", "email"]


@pytest.mark.parametrize("sizes", [(4000, 4000, 60), (9000, 300, 60)], ids=["tails", "files"])
def test_the_tokens_of_a_batch_have_the_domains_of_their_files(
    tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    """Each file repeats a letter of its own, so that a token says where it is from."""
    for letter, size in zip("xyz", sizes, strict=True):
        (tmp_path / letter).mkdir()
        (tmp_path / letter / "text.txt").write_text(letter * size)
    corpus = loading.load(parse(Node.wrap({"files": [f"{tmp_path}/*/*.txt"]})))
    assert corpus.domains is not None
    letters = {i: ord(name[0]) for i, name in enumerate(corpus.domains.names)}
    assert set(letters.values()) == set(map(ord, "xyz"))

    def check(tokens: object, where: object) -> None:
        flat = np.asarray(tokens).flatten()
        named = np.array([letters[int(i)] for i in np.asarray(where).flatten()])
        same = flat == named
        assert (same | (flat == ord("\n"))).all()
        assert same.mean() > 0.8

    for step in range(3):
        batch = (step, 8, 16, 5)
        check(corpus.batch(*batch)[0], corpus.batch_domains(*batch))
    sizes_ = (16, 4, 200)
    for (tokens, _), where in zip(
        corpus.val_batches(*sizes_), corpus.val_domains(*sizes_), strict=True
    ):
        check(tokens, where)


def test_one_text_and_token_arrays_have_no_domains(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abc " * 500)
    np.save(tmp_path / "tokens.npy", np.arange(500, dtype=np.uint16) % 7)
    for section in (
        {"files": [str(tmp_path / "one.txt")]},
        {"tokens": str(tmp_path / "tokens.npy"), "vocab_size": 7},
    ):
        corpus = loading.load(parse(Node.wrap(section)))
        assert corpus.domains is None
        assert corpus.batch_domains(0, 2, 8, 0) is None
        assert set(corpus.val_domains(8, 2, 64)) == {None}


@pytest.mark.parametrize("kind", ["stdlib", "pydoc"])
def test_built_in_text_has_named_domains_from_the_cache_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, again = loading.load({"kind": kind}), loading.load({"kind": kind})
    for corpus in (first, again):
        assert corpus.domains is not None
        assert len(corpus.domains.names) == NAMED + 1
        for split, tokens in (("train", corpus.train), ("val", corpus.val)):
            assert corpus.domains.ends[split][-1] == len(tokens)
    assert ("asyncio" in first.domains.names) is (kind == "stdlib")


def test_a_cache_without_domains_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = loading.load({"kind": "stdlib"})
    (place,) = (tmp_path / "moenas").iterdir()
    head, _, body = place.read_bytes().partition(b"\n")
    manifest = json.loads(head)
    del manifest["domains"]
    place.write_bytes(json.dumps(manifest).encode() + b"\n" + body)
    again = loading.load({"kind": "stdlib"})
    assert again.domains is not None
    assert again.sha256 == first.sha256
