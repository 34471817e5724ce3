"""The section `data` of a space file: the corpora that it may name, and their description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import tokenizers
from corpora import section, write_tokens
from pyarrow import parquet

from moenas.data.section import parse, paths
from moenas.errors import SpaceError
from moenas.resources import Node

# --- the section -------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "kind"), [("stdlib", "stdlib"), ("{kind: pydoc}", "pydoc")])
def test_built_in_corpora_go_by_name(text: str, kind: str) -> None:
    assert section(text) == {"kind": kind}


def test_files_become_absolute_and_patterns_the_files_they_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub.txt").mkdir()
    monkeypatch.chdir(tmp_path)
    wanted = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.md")]
    assert section("{files: ['*.txt', a.txt, c.md]}") == {"kind": "files", "files": wanted}
    assert section("{files: c.md}") == {"kind": "files", "files": wanted[2:]}


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_a_folder_of_tokens_is_its_two_splits(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "val"):
        write_tokens(tmp_path / f"{split}.{suffix}", range(9))
    data = section(f"{{tokens: {tmp_path}, vocab_size: 9}}")
    assert Path(data["tokens"]).name == f"train.{suffix}"
    assert Path(data["val"]).name == f"val.{suffix}"


def test_the_validation_split_of_a_folder_is_taken_from_val(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tokens(tmp_path / f"{split}.bin", range(9))
    data = section(f"{{tokens: {tmp_path}/train.bin, val: {tmp_path}, vocab_size: 9}}")
    assert Path(data["val"]).name == "val.bin"


@pytest.mark.parametrize(("size", "dtype"), [("65536", "uint16"), ("65537", "uint32")])
def test_raw_tokens_are_as_wide_as_the_vocabulary_asks(
    tmp_path: Path, size: str, dtype: str
) -> None:
    path = write_tokens(tmp_path / "t.bin", range(8), "uint32")
    assert section(f"{{tokens: {path}, vocab_size: {size}}}")["dtype"] == dtype


def test_a_npy_file_says_its_own_type(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t.npy", range(8), "uint32")
    assert section(f"{{tokens: {path}, vocab_size: 9}}")["dtype"] == "uint32"


def test_what_parse_gives_reads_as_itself(tmp_path: Path) -> None:
    for name in ("t", "v"):
        write_tokens(tmp_path / f"{name}.npy", range(8), "uint32")
    text = f"{{tokens: {tmp_path}/t.npy, val: {tmp_path}/v.npy, vocab_size: 1e3}}"
    (tmp_path / "a.txt").write_text("text")
    for data in (section("stdlib"), section(f"{{files: {tmp_path}/*.txt}}"), section(text)):
        assert parse(Node.wrap(data)) == data


BAD = [
    ("stdlb", "2:3: data: no corpus 'stdlb'. Did you mean 'stdlib'?"),
    ("3", "2:3: data: 3 is no corpus; give stdlib, pydoc"),
    ("[stdlib]", "2:3: data: ['stdlib'] is no corpus"),
    ("{}", "2:3: data: names no corpus (nothing)"),
    ("{file: x}", "2:3: data: names no corpus (file). Did you mean 'files'?"),
    ("{kind: stdlib, shuffle: true}", "2:18: data.shuffle: no key of 'stdlib' data."),
    ("{kind: tokens}", "2:3: data: 'vocab_size' is missing"),
    ("{files: []}", "2:11: data.files: is empty"),
    ("{files: [GONE]}", "2:12: data.files: 'GONE' matches no file"),
    ("{files: 'DIR/*.tex'}", "2:11: data.files: 'DIR/*.tex' matches no file"),
    ("{files: DIR}", "2:11: data.files: 'DIR/float.npy' is a .npy array; name it under data.tokens"),
    ("{files: DIR/nothing}", "2:11: data.files: 'DIR/nothing' is a folder without files"),
    ("{files: DIR/no*}", "2:11: data.files: 'DIR/no*' matches folders; give 'DIR/no*/*'"),
    ("{files: [3]}", "2:12: data.files: 3 is not a path"),
    ("{files: DIR/empty}", "2:11: data.files: 'DIR/empty' is empty"),
    ("{files: /dev/null}", "2:11: data.files: '/dev/null' is not a plain file"),
    ("{tokens: DIR/t.bin}", "2:3: data: 'vocab_size' is missing"),
    ("{tokens: DIR/t.bin, vocab_size: .5}", "data.vocab_size: 0.5 is not a whole number"),
    ("{tokens: DIR/t.bin, vocab_size: 1e999}", "data.vocab_size: inf is not a whole number"),
    ("{tokens: DIR/t.bin, vocab_size: 1e300}", "data.vocab_size: 1e+300 is too large; the maximum is"),
    ("{tokens: DIR/t.bin, vocab_size: yes}", "data.vocab_size: 'yes' is not a whole number"),
    ("{tokens: DIR/t.bin, vocab_size: 9, dtype: int8}", "data.dtype: 'int8' is not one of uint8"),
    ("{tokens: DIR/t.bin, vocab_size: 9, vocab: 3}", "no key of 'tokens' data. Did you mean"),
    ("{tokens: DIR/odd, vocab_size: 9}", "'DIR/odd' has 3 bytes, not whole uint16 numbers"),
    ("{tokens: DIR/t.bin, val: GONE, vocab_size: 9}", "data.val: 'GONE' does not exist"),
    ("{tokens: DIR, vocab_size: 9}", "data.tokens: 'DIR/fake.npy' is no .npy array"),
    ("{tokens: DIR/nothing, vocab_size: 9}", "data.tokens: 'DIR/nothing' has no .bin and no .npy file"),
    ("{tokens: DIR/*.tok, vocab_size: 9}", "data.tokens: 'DIR/*.tok' matches no file of tokens"),
    ("{tokens: [], vocab_size: 9}", "data.tokens: is empty; give at least one"),
    ("{tokens: DIR/fake.npy, vocab_size: 9}", "'DIR/fake.npy' is no .npy array"),
    ("{tokens: DIR/square.npy, vocab_size: 9}", "holds uint16 in shape (2, 2); give one row"),
    ("{tokens: DIR/float.npy, vocab_size: 9}", "holds float64 in shape (4,)"),
    ("{tokens: DIR/t.npy, dtype: uint32, vocab_size: 9}", "holds uint16 in shape (4,); give one row of uint32"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_a_bad_section_is_refused_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "odd").write_bytes(b"odd")
    (tmp_path / "fake.npy").write_bytes(b"not an array")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), dtype=np.uint16))
    np.save(tmp_path / "float.npy", np.zeros(4))
    for name in ("t.bin", "t.npy"):
        write_tokens(tmp_path / name, range(4))
    with pytest.raises(SpaceError) as error:
        section(text.replace("DIR", str(tmp_path)))
    assert str(error.value).startswith("x.yaml:2:")
    assert message.replace("DIR", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


# --- text ----------------------------------------------------------------------------------------


def test_a_folder_is_its_files_below_in_order(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a.md", ".git/config", "b/.hidden", "b/empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name.endswith("empty") else name)
    wanted = [str(tmp_path / name) for name in ("a.md", "b/x.txt")]
    assert section(f"{{files: {tmp_path}}}") == {"kind": "files", "files": wanted}


def write_tables(folder: Path) -> None:
    table = pyarrow.table({"n": [1, 2], "text": ["a", "b"], "title": ["c", "d"]})
    parquet.write_table(table, folder / "text.parquet")
    parquet.write_table(
        table.drop_columns(["title"]).rename_columns(["n", "body"]), folder / "one.parquet"
    )
    parquet.write_table(
        table.drop_columns(["text"]).add_column(0, "body", [["e", "f"]]), folder / "two.parquet"
    )
    parquet.write_table(table.select(["n"]), folder / "none.parquet")
    (folder / "fake.parquet").write_bytes(b"PAR1 and nothing more")
    (folder / "a.txt").write_text("text")
    (folder / "rows.jsonl").write_text('{"text": "a", "n": 1}\n')
    (folder / "made").mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<eos>": 1, "b": 6}, "a")).save(
        str(folder / "made" / "tokenizer.json")
    )
    (folder / "nonsense.json").write_text('{"model": 3}')


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("files: DIR/text.parquet", {"text_column": "text"}),
        ("files: DIR/text.parquet, text_column: title", {"text_column": "title"}),
        ("files: DIR/one.parquet", {"text_column": "body"}),
        ("files: DIR/rows.jsonl, text_column: text", {"text_column": "text"}),
        ("files: [DIR/rows.jsonl, DIR/text.parquet], text_column: text", {"text_column": "text"}),
        ("files: DIR/a.txt", {}),
        ("files: DIR/a.txt, tokenizer: DIR/made", {"end_of_text": "<eos>", "vocab_size": 7}),
        ("files: DIR/a.txt, tokenizer: DIR/made, end_of_text: b", {"end_of_text": "b"}),
        ("files: DIR/a.txt, tokenizer: DIR/made, end_of_text: null", {"end_of_text": None}),
        ("kind: stdlib, tokenizer: DIR/made/tokenizer.json", {"end_of_text": "<eos>"}),
    ],
)
def test_what_a_file_says_of_itself_is_written_out(
    tmp_path: Path, text: str, wanted: dict[str, Any]
) -> None:
    write_tables(tmp_path)
    data = section("{" + text.replace("DIR", str(tmp_path)) + "}")
    assert wanted.items() <= data.items()
    assert ("text_column" in data) == ("text_column" in wanted)
    assert parse(Node.wrap(data)) == data
    if "tokenizer" in text:
        assert data["tokenizer"] == str(tmp_path / "made" / "tokenizer.json")
        assert data["tokenizer"] in paths(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("files: DIR/two.parquet", "its columns of text are body, title; name one as `text_column`"),
        ("files: DIR/none.parquet", "it has no column of text"),
        ("files: DIR/fake.parquet", "'DIR/fake.parquet' cannot be read as Parquet"),
        ("files: DIR/text.parquet, text_column: n", "has no column of text 'n'; its columns of text are text, title"),
        ("files: DIR/text.parquet, text_column: 3", "data.text_column: 3 is not the name of a column"),
        ("files: [DIR/a.txt, DIR/text.parquet]", "'DIR/a.txt' is text, 'DIR/text.parquet' is a table of the column 'text'"),
        ("files: [DIR/one.parquet, DIR/text.parquet]", "name files of one kind by a pattern"),
        ("files: DIR/a.txt, text_column: text", "DIR/a.txt:1: is no JSON"),
        ("files: DIR/rows.jsonl, text_column: body", "DIR/rows.jsonl:1: has no 'body' (text, n)"),
        ("files: DIR/rows.jsonl, text_column: n", "DIR/rows.jsonl:1: 'n' is int, not text"),
        ("files: DIR/a.txt, val: DIR/*.txt", "data.val: 'DIR/a.txt' is in data.files as well"),
        ("files: DIR/a.txt, tokenizer: DIR/gone", "data.tokenizer: 'DIR/gone' does not exist"),
        ("files: DIR/a.txt, tokenizer: DIR/a.txt", "'DIR/a.txt' is no JSON; give a tokenizer.json"),
        ("files: DIR/a.txt, tokenizer: DIR/nonsense.json", "is no tokenizer.json of the library tokenizers"),
        ("files: DIR/a.txt, tokenizer: DIR/made, end_of_text: x", "has no token 'x'"),
        ("files: DIR/a.txt, tokenizer: DIR/made, vocab_size: 9", "data.vocab_size: 9 is not the 7 of"),
        ("files: DIR/a.txt, end_of_text: x", "data.end_of_text: text needs a `tokenizer` for it"),
        ("tokens: DIR/text.parquet, vocab_size: 9", "is a Parquet table of text; name it under data.files"),
        ("tokens: DIR/a.txt, vocab_size: 6, tokenizer: DIR/made", "data.vocab_size: 6 is below the 7 tokens of"),
    ],
)  # fmt: skip
def test_bad_text_is_refused_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    write_tables(tmp_path)
    with pytest.raises(SpaceError) as error:
        section("{" + text.replace("DIR", str(tmp_path)) + "}")
    assert str(error.value).startswith("x.yaml:2:")
    assert message.replace("DIR", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


def write_dataset(folder: Path, rows: list[str], **state: Any) -> None:
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": rows})
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_data_set_of_hugging_face_is_its_files_and_splits(tmp_path: Path) -> None:
    for split in ("train", "test", "validation"):
        write_dataset(tmp_path / "both" / split, [split])
    splits = {"splits": ["train", "test", "validation"]}
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps(splits))
    data = section(f"{{files: {tmp_path}/both}}")
    file = "data-00000-of-00001.arrow"
    assert data["files"] == [str(tmp_path / "both" / "train" / file)]
    assert data["val"] == [str(tmp_path / "both" / "validation" / file)]
    assert data["text_column"] == "text"
    one = section(f"{{files: {tmp_path}/both/test}}")
    assert (one["files"], one.get("val")) == ([str(tmp_path / "both" / "test" / file)], None)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../../other.arrow"}]}, "names a file of another folder"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow' is not a plain file"),
        ({"_data_files": 3}, "lists no data files"),
        ({"_indices_files": [{"filename": "indices.arrow"}]}, "call flatten_indices()"),
    ],
)
def test_a_bad_data_set_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    write_dataset(tmp_path / "set", ["a"], **state)
    with pytest.raises(SpaceError, match=r"x\.yaml:2:11: data\.files: ") as error:
        section(f"{{files: {tmp_path}/set}}")
    assert message in str(error.value)


# --- shards --------------------------------------------------------------------------------------


def test_shards_are_in_the_order_of_the_list_and_of_their_numbers(tmp_path: Path) -> None:
    for name in ("s_1", "s_2", "s_10", "first"):
        write_tokens(tmp_path / f"{name}.npy", range(9))
    data = section(f"{{tokens: [{tmp_path}/first.npy, '{tmp_path}/s_*.npy'], vocab_size: 9}}")
    assert [Path(path).stem for path in data["tokens"]] == ["first", "s_1", "s_2", "s_10"]
    assert parse(Node.wrap(data)) == data


def test_words_in_the_names_of_shards_are_their_splits(tmp_path: Path) -> None:
    for name in ("fw_train_000001", "fw_train_000002", "fw_val_000000"):
        write_tokens(tmp_path / f"{name}.bin", range(9))
    data = section(f"{{tokens: {tmp_path}, vocab_size: 9}}")
    assert [Path(path).stem for path in data["tokens"]] == ["fw_train_000001", "fw_train_000002"]
    assert Path(data["val"]).stem == "fw_val_000000"
    write_tokens(tmp_path / "other.bin", range(9))
    with pytest.raises(SpaceError, match=r"other\.bin' says no split"):
        section(f"{{tokens: {tmp_path}, vocab_size: 9}}")


def test_shards_have_one_type(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.npy", range(9))
    write_tokens(tmp_path / "b.npy", range(9), "uint32")
    with pytest.raises(
        SpaceError, match=r"b\.npy' holds uint32 in shape \(9,\); give one row of uint16"
    ):
        section(f"{{tokens: {tmp_path}, vocab_size: 9}}")


def test_a_pattern_of_shards_has_the_splits_of_its_names(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write_tokens(tmp_path / f"{name}.bin", range(9))
    data = section(f"{{tokens: '{tmp_path}/*.bin', vocab_size: 9}}")
    assert (data["tokens"], data["val"]) == (f"{tmp_path}/train.bin", f"{tmp_path}/val.bin")
    assert parse(Node.wrap(data)) == data
    (tmp_path / "train.bin").rename(tmp_path / "train_1.bin")
    assert section(f"{{tokens: {tmp_path}, vocab_size: 9}}")["tokens"] == f"{tmp_path}/train_1.bin"
    write_tokens(tmp_path / "other.bin", range(9))
    data = section(f"{{tokens: '{tmp_path}/*.bin', vocab_size: 9}}")
    assert len(data["tokens"]) == 4, "a file without a split: the names tell nothing"


def test_tables_of_a_folder_have_the_splits_of_their_names(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-0", "test-0"):
        parquet.write_table(pyarrow.table({"text": [name]}), tmp_path / f"{name}.parquet")
    for files in (tmp_path, f"'{tmp_path}/*.parquet'"):
        data = section(f"{{files: {files}}}")
        assert [Path(path).name[:8] for path in data["files"]] == ["train-00", "train-00"]
        assert [Path(path).stem for path in data["val"]] == ["validation-0"]
        assert parse(Node.wrap(data)) == data
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "more.parquet")
    data = section(f"{{files: {tmp_path}}}")
    assert (len(data["files"]), data.get("val")) == (5, None)


def test_names_of_text_files_are_no_splits(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("some text\n")
    data = section(f"{{files: {tmp_path}}}")
    assert (len(data["files"]), data.get("val")) == (2, None)
