"""A corpus against the space that trains on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moenas.data import loading as data
from moenas.errors import DataError, SpaceError
from moenas.evaluate import matching
from moenas.report.space_check import check_report, check_text
from moenas.space.space import Space

SPACE = """
architecture:
  vocab_size: 300
  d_model: 16
  blocks: [{{mixer: {{kind: attention, head_dim: 8}}}}]
objectives: [val_loss]
data: {data}
train: {{context: 32, batch: 4, tokens: {tokens}, val_tokens: 256}}
"""


def space(data: object, tokens: int = 1000) -> Space:
    return Space.parse(SPACE.format(data=data, tokens=tokens), "s.yaml")


def random_tokens(path: Path, count: int = 4000, high: int = 300, seed: int = 0) -> str:
    np.random.default_rng(seed).integers(0, high, count).astype("<u2").tofile(path)
    return str(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: random_tokens(path, 40), "the val split of 't.bin' holds 2 tokens"),
        (lambda path: random_tokens(path, high=4000), "is not below vocab_size"),
    ],
)
def test_what_a_corpus_lacks_is_told_at_its_place(
    tmp_path: Path, write: Callable[[Path], str], message: str
) -> None:
    parsed = space({"tokens": write(tmp_path / "t.bin"), "vocab_size": 300})
    with pytest.raises(DataError) as error:
        check_report(parsed, 2)
    assert str(error.value).startswith("s.yaml:7:7: data")
    assert message in str(error.value)


def test_a_wrapped_file_is_refused_at_its_place(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    table.write_bytes(b"PAR1" + bytes(4000))
    for section in ({"files": [str(table)]}, {"tokens": str(table), "vocab_size": 300}):
        with pytest.raises(SpaceError, match=r"s\.yaml:7:\d+: data\.\w+: .* Parquet"):
            space(section)


def test_check_says_what_the_files_are(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 4000).astype("<u2")
    header = np.zeros(256, dtype="<i4")
    for i in range(3):
        header[:3] = 20240520, 1, len(tokens)
        (tmp_path / f"{i}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    report = check_report(space({"tokens": str(tmp_path), "vocab_size": 300}), 2)
    assert report["corpus"]["formats"] == {"llm.c": 3}
    text = check_text(report)
    assert (
        "corpus: 3 files of llm.c (uint16); 11,400 tokens to train on, 600 to validate on" in text
    )
    assert "vocabulary 300" in text
    assert report["tokens_per_parameter"]["max"] < 20
    assert "compute-optimal training of dense models takes 20 (Hoffmann et al., 2022)" in text
    many = check_report(space({"tokens": str(tmp_path), "vocab_size": 300}, 10**6), 2)
    assert many["tokens_per_parameter"]["min"] == 10**6 / many["active_params"] > 20
    assert "compute-optimal" not in check_text(many)


def test_json_lines_that_are_read_as_bytes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"body": "words of row {i}"}}\n' for i in range(400)))
    notes = check_report(space({"files": [str(path)]}), 2)["notes"]
    assert any(
        "is JSON Lines and is read as bytes" in n and "text_column: body" in n for n in notes
    )
    report = check_report(space({"files": [str(path)], "text_column": "body"}), 2)
    assert not any("JSON Lines" in note for note in report["notes"])
    assert report["corpus"]["formats"] == {"JSON Lines": 1}


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = random_tokens(tmp_path / "t.bin")
    notes = check_report(space({"files": [str(path)]}), 2)["notes"]
    (note,) = [n for n in notes if "has zero bytes" in n]
    assert f"'{path}'" in note
    assert "data.tokens" in note
    text = tmp_path / "a.txt"
    text.write_text("Zeros are 0, and an umlaut is \u00e4.\n" * 400)
    assert not any(
        "has zero bytes" in n for n in check_report(space({"files": [str(text)]}), 2)["notes"]
    )


def test_how_often_training_reads_the_corpus_is_told(tmp_path: Path) -> None:
    path = random_tokens(tmp_path / "t.bin")
    again = check_report(space({"tokens": path, "vocab_size": 300}, 38_000), 2)["notes"]
    assert any("each is seen 10.0 times" in note for note in again)
    assert any("fewer than train.val_tokens" in note for note in again)
    assert check_report(space("pydoc"), 2)["notes"] == []


def test_validation_text_that_stands_in_training_is_told(tmp_path: Path) -> None:
    train, other = random_tokens(tmp_path / "a.bin"), random_tokens(tmp_path / "b.bin", seed=1)
    inside = tmp_path / "inside.bin"
    np.fromfile(train, dtype="<u2")[501:1400].tofile(inside)
    shares = {}
    for name, val in {"equal": train, "inside": str(inside), "other": other}.items():
        section = {"tokens": train, "val": val, "vocab_size": 300}
        shares[name] = matching.leaked(data.load(space(section).data))
    assert shares == {"equal": 1.0, "inside": 1.0, "other": 0.0}
    text = check_text(check_report(space({"tokens": train, "val": train, "vocab_size": 300}), 2))
    assert "100% of the validation text is in the training text word for word" in text


def test_windows_are_found_across_the_parts_of_a_long_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matching, "CHUNK", 100)
    tokens = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint16)
    digests = np.concatenate(list(matching._digests(tokens)))
    assert len(digests) == 1000 - matching.WINDOW + 1
    for i in (0, 77, 99, 100, 500, len(digests) - 1):
        assert next(matching._digests(tokens[i : i + matching.WINDOW]))[0] == digests[i]


def test_copies_with_other_line_ends_are_one_text(tmp_path: Path) -> None:
    for i in range(10):
        lines = "".join(f"{n} some words\n" for n in range(i * 500, i * 500 + 500))
        (tmp_path / f"d{i}.txt").write_bytes(lines.encode())
        (tmp_path / f"w{i}.txt").write_bytes(lines.replace("\n", "\r\n").encode())
    corpus = data.load(space({"files": [str(tmp_path / "*.txt")]}).data)
    assert len(corpus.manifest["files"]) == 10
    assert matching.leaked(corpus) == 0.0


def test_a_candidate_too_large_for_the_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moenas.evaluate.footprint.free_bytes", lambda device: 2**16)
    notes = check_report(space("pydoc"), 2)["notes"]
    assert any(note.startswith("memory: a training step") for note in notes)
    assert matching.room(Space.load("zoo/mixtral_8x7b"), []) == []


def test_the_search_for_a_leak_is_done_once_for_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(4000)))
    corpus = data.load(space(f"{{files: [{tmp_path}/a.txt]}}").data)
    first = matching._kept_leak(corpus)
    assert first == matching.leaked(corpus)
    monkeypatch.setattr(matching, "leaked", None)
    assert matching._kept_leak(corpus) == first
