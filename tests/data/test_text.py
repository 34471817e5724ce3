"""How text is read, cleaned and split."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moenas.data import text as texts
from moenas.errors import DataError

RULED = [
    ("0.py", 340, "train"),
    ("7.py", 354, "train"),
    ("14.py", 360, "val"),
    ("21.py", 360, "train"),
    ("28.py", 360, "train"),
    ("35.py", 360, "val"),
]
"""What the rules make of the sources below: path, bytes, split."""

HEADER = b"""#!/usr/bin/env python
# Copyright 2001 by Somebody. All Rights Reserved.
#
# Permission to use is granted.

# What this module does is worth keeping.

import os
# a licence word in the code below the header stays
"""


def test_a_licence_header_goes_and_all_else_stays() -> None:
    assert texts.without_licence(HEADER) == HEADER[HEADER.index(b"# What this") :]


def test_a_shebang_in_a_paragraph_of_its_own_stays() -> None:
    text = b"#!/usr/bin/env python\n\n# Licensed to somebody.\nimport os\n"
    assert texts.without_licence(text) == b"#!/usr/bin/env python\n\nimport os\n"


@given(st.lists(st.sampled_from([b"x = 1", b"", b"# words", b"    '''licence'''"])))
def test_text_without_a_licence_comment_keeps_every_line(lines: list[bytes]) -> None:
    text = b"\n".join(lines)
    assert texts.without_licence(text) == text.lstrip(b"\r\n")


def _lines(first: int, last: int) -> bytes:
    return b"".join(b"line %d\n" % i for i in range(first, last))


@pytest.mark.parametrize(
    ("shared", "goes"),
    [(20, False), (36, True), (100, True)],
    ids=["16 of 96 shingles", "32 of 96 shingles", "equal"],
)
def test_a_near_duplicate_shares_over_30_percent_of_its_shingles(shared: int, goes: bool) -> None:
    other = _lines(0, shared) + _lines(1000, 1100 - shared)
    files = [("a", _lines(0, 100)), ("b", other), ("c", _lines(5000, 5100))]
    kept, dropped = texts.without_near_duplicates(files)
    assert dropped == (["b"] if goes else [])
    assert [name for name, _ in kept] == [name for name in "abc" if name not in dropped]


def test_white_space_does_not_hide_a_duplicate() -> None:
    indented = b"\n\n".join(b"    " + line for line in _lines(0, 50).splitlines())
    assert texts.without_near_duplicates([("a", _lines(0, 50)), ("b", indented)])[1] == ["b"]


def test_files_without_a_line_go() -> None:
    assert texts.without_near_duplicates([("a", b"\n \n")]) == ([], ["a"])


def test_the_library_has_no_tests_and_no_copies() -> None:
    sources = texts.stdlib_sources()
    names = [name for name, _ in sources]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
    assert names == sorted(names)
    text = texts.stdlib(sources)
    assert not {row["path"] for row in text.files} & set(text.details["near_duplicates"])
    assert text.details["python"] == platform.python_version()
    size = [sum(map(len, split)) for split in (text.train, text.val)]
    assert 0.03 < size[1] / sum(size) < 0.15


def test_the_split_of_a_name_does_not_depend_on_the_other_files() -> None:
    sources = texts.stdlib_sources()[:120]
    whole = {row["path"]: row["split"] for row in texts.stdlib(sources).files}
    half = {row["path"]: row["split"] for row in texts.stdlib(sources[::2]).files}
    both = whole.keys() & half.keys()
    assert {whole[name] for name in both} == {"train", "val"}
    assert all(whole[name] == half[name] for name in both)


def test_no_paragraph_of_the_reference_stands_twice() -> None:
    text = texts.pydoc()
    paragraphs = [
        b" ".join(p.split()) for part in text.train + text.val for p in part.split(b"\n\n")
    ]
    assert len(set(paragraphs)) == len(paragraphs) > 1000
    assert text.val


def test_the_rules_are_those_of_their_version() -> None:
    """If this fails, the rules make another corpus than before: raise RULES, then these."""
    body = [b"def f%d(x):\n    return x + %d\n" % (i, i) for i in range(60)]
    sources = [(f"{i}.py", b"# licence\n\n" + b"".join(body[i : i + 12])) for i in range(40)]
    text = texts.stdlib(sources)
    rows = [(row["path"], row["bytes"], row["split"]) for row in text.files]
    assert (texts.RULES, rows) == (1, RULED)


def _write(folder: Path, parts: dict[str, bytes]) -> list[str]:
    for name, part in parts.items():
        (folder / name).write_bytes(part)
    return [str(folder / name) for name in parts]


def test_several_files_are_split_by_file(tmp_path: Path) -> None:
    parts = {f"{i}.txt": b"%d " % i * 1000 + b"\n" for i in range(20)}
    text = texts.files(_write(tmp_path, parts))
    assert {*text.train, *text.val} == set(parts.values())
    assert not set(text.train) & set(text.val)
    size = sum(map(len, text.val)) / sum(map(len, parts.values()))
    assert 0.05 <= size <= 0.2


@pytest.mark.parametrize("sizes", [[1000], [1000, 900], [100_000, 10]])
def test_few_files_are_split_by_their_tails(tmp_path: Path, sizes: list[int]) -> None:
    parts = {f"{i}.txt": bytes([97 + i]) * size for i, size in enumerate(sizes)}
    text = texts.files(_write(tmp_path, parts))
    assert b"".join(a + b for a, b in zip(text.train, text.val, strict=True)) == b"".join(
        parts.values()
    )
    assert sum(map(len, text.val)) == pytest.approx(0.05 * sum(sizes), abs=len(sizes))


def test_equal_files_count_once(tmp_path: Path) -> None:
    text = texts.files(_write(tmp_path, {"a": b"x" * 100, "b": b"x" * 100}))
    assert [Path(row["path"]).name for row in text.files] == ["a"]
    lines = b"one line\n" * 20
    copies = {"a": lines, "b": lines.replace(b"\n", b"\r\n"), "c": b"another line\n" * 20}
    text = texts.files(_write(tmp_path, copies))
    assert [Path(row["path"]).name for row in text.files] == ["a", "c"]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        texts.files([str(tmp_path / "gone.txt")])


@pytest.mark.parametrize("change", [("a", b"y"), ("b", b"x")])
def test_the_digest_sees_names_and_bytes(change: tuple[str, bytes]) -> None:
    assert texts.digest([("a", b"x")]) != texts.digest([change])
