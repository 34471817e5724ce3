"""The section `data` of a space file: the corpus and its files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from glob import glob
from typing import TypeVar

from moenas import formats
from moenas.data import text_columns, token_files, tokenizer_file
from moenas.data.token_files import DTYPES, TokenFile
from moenas.errors import DataError, suggestion
from moenas.records import Plain
from moenas.resources import Node

MAX_VOCAB_SIZE = 2**31
"""Token ids are 32-bit whole numbers."""
TOKENIZER = ("tokenizer", "end_of_text", "vocab_size")
KEYS = {
    "stdlib": ("kind", *TOKENIZER),
    "pydoc": ("kind", *TOKENIZER),
    "files": ("kind", "files", "val", "text_column", *TOKENIZER),
    "tokens": ("kind", "tokens", "val", "vocab_size", "dtype", "tokenizer"),
}
WANTED = (
    "give stdlib, pydoc, {files: [paths, folders or patterns]} or {tokens: [the same], vocab_size:"
    " n}, with an optional {val: paths, tokenizer: tokenizer.json}"
)
Found = TypeVar("Found")

VAL_WORDS, TRAIN_WORDS, TEST_WORDS = {"val", "valid", "validation"}, {"train"}, {"test"}
"""Words in the names of shards that tell their split."""


def parse(node: Node) -> Plain:
    """Read the `data` section of a space file; reading the result again changes nothing.

    `stdlib` and `pydoc` become {"kind": ...}; paths become absolute (relative ones start from
    the folder where moenas runs), folders and patterns the files in them, and what the files say
    of themselves (column, type of tokens, vocabulary) is written out.

    Raises:
        SpaceError: `file:line:column: data: what is wrong; what would be right`.
    """
    value = node.value
    if isinstance(value, str):
        value = {"kind": node}
    if not isinstance(value, dict):
        raise node.error("data", f"{node.plain!r} is no corpus; {WANTED}")
    kind = _kind(node, value)
    for key, inner in value.items():
        if key not in KEYS[kind]:
            near, known = suggestion(key, KEYS[kind]), ", ".join(KEYS[kind])
            raise inner.error(
                f"data.{key}", f"no key of '{kind}' data.{near} It takes {known}.", key=True
            )
    if kind == "tokens":
        return _parse_tokens(node, value)
    section: Plain = {"kind": kind}
    if kind == "files":
        section |= _parse_files(_need(node, value, "files", "a list of paths"), value)
    return section | _parse_tokenizer(value)


def paths(section: Plain) -> list[str]:
    """Return every file that a section, as `parse` gives it, names."""
    named_paths: list[str] = []
    for key in ("files", "tokens", "val", "tokenizer"):
        value = section.get(key) or []
        named_paths += [value] if isinstance(value, str) else value
    return named_paths


def _kind(node: Node, value: dict[str, Node]) -> str:
    """Return which of the four kinds of corpus is meant."""
    if "kind" in value:
        kind = value["kind"]
        if not isinstance(kind.value, str) or kind.value not in KEYS:
            near = suggestion(str(kind.plain), KEYS)
            raise kind.error("data", f"no corpus {kind.plain!r}.{near} Right would be: {WANTED}")
        return kind.value
    kind_given = next((kind for kind in ("files", "tokens") if kind in value), None)
    if kind_given is None:
        keys = ", ".join(value) or "nothing"
        near = next(filter(None, (suggestion(key, KEYS) for key in value)), "")
        raise node.error("data", f"names no corpus ({keys}).{near} Right would be: {WANTED}")
    return kind_given


def _need(node: Node, value: dict[str, Node], key: str, wanted: str) -> Node:
    if key not in value:
        raise node.error("data", f"'{key}' is missing; give {wanted}")
    return value[key]


def _given(value: dict[str, Node], key: str) -> Node | None:
    """Return a field that is written and not null."""
    node = value.get(key)
    return node if node is not None and node.value is not None else None


def _items(node: Node, key: str) -> Iterator[tuple[Node, str]]:
    """Yield each path of a field with its node, as an absolute path."""
    for item in node.value if isinstance(node.value, list) else [node]:
        if not isinstance(item.value, str) or not item.value:
            raise item.error(key, f"{item.plain!r} is not a path or a pattern")
        yield item, os.path.abspath(os.path.expanduser(item.value))


def _check_readable(node: Node, key: str, path: str) -> None:
    if not os.path.isfile(path):
        raise node.error(key, f"'{path}' is not a plain file")
    try:
        with open(path, "rb") as file:
            head = file.read(formats.HEAD)
    except OSError as error:
        raise node.error(key, f"'{path}' cannot be read: {error.strerror}") from None
    if not head:
        raise node.error(key, f"'{path}' is empty")


def _checked(node: Node, key: str, look: Callable[[], Found]) -> Found:
    """Return what a look into a file gives; an error names the place in the space file."""
    try:
        return look()
    except DataError as error:
        raise node.error(key, error.message) from None
    except OSError as error:
        raise node.error(key, f"'{error.filename}' cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise node.error(key, str(error)) from None


def _files_below(folder: str) -> list[str]:
    """Return the files of a folder and its folders that are neither hidden nor empty."""
    kept = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = [os.path.join(base, name) for name in names if not name.startswith(".")]
        kept += [path for path in inside if not os.path.isfile(path) or os.path.getsize(path)]
    return sorted(kept)


# --- text ----------------------------------------------------------------------------------------


def _parse_files(node: Node, value: dict[str, Node]) -> Plain:
    """Read {files, val, text_column}."""
    files, val = _text_paths(node, "data.files")
    given = _given(value, "val")
    if given is not None:
        val = _text_paths(given, "data.val")[0]
        if both := sorted(set(files) & set(val)):
            raise given.error("data.val", f"'{both[0]}' is in data.files as well")
    section: Plain = {"files": files}
    if val:
        section["val"] = val
    column = _column(node, _given(value, "text_column"), [*files, *val])
    return section if column is None else {**section, "text_column": column}


def _text_paths(node: Node, key: str) -> tuple[list[str], list[str]]:
    """Return the absolute paths of every file named or matched, each once, sorted.

    The second list has the files of the split of a data set that validates.
    """
    train: set[str] = set()
    val: list[str] = []
    for item, text in _items(node, key):
        if os.path.isdir(text):
            listed, more = _text_folder(item, key, text)
            val += more
        else:
            matched = [text] if os.path.exists(text) else sorted(glob(text, recursive=True))
            listed = [path for path in matched if not os.path.isdir(path)]
            if not listed:
                reason = f"matches folders; give '{item.value}/*'" if matched else "matches no file"
                raise item.error(key, f"'{item.value}' {reason}")
            if len(listed) > 1:
                listed, more = _table_splits(listed)
                val += more
        for path in [*listed, *val]:
            _check_text(item, key, path)
        train.update(listed)
    if not train:
        raise node.error(key, "is empty; give at least one path or pattern")
    return sorted(train), val


def _text_folder(item: Node, key: str, folder: str) -> tuple[list[str], list[str]]:
    """Return the files of a folder or of a data set of Hugging Face, and the files of val."""
    if text_columns.is_dataset(folder):
        listed, val = _checked(item, key, lambda: text_columns.dataset_files(folder))
    else:
        listed, val = _table_splits(_files_below(folder))
    if not listed:
        raise item.error(key, f"'{item.value}' is a folder without files")
    return listed, val


def _table_splits(paths: list[str]) -> tuple[list[str], list[str]]:
    """Return the tables to train on, and those that validate, by words in their names.

    Tables of a test split are left out. Names tell nothing where one file is no table or says no
    split, or where no table validates.
    """
    splits = _named_splits(paths)
    tables = all(text_columns.text_format(path) is not None for path in paths)
    if not tables or splits[""] or not (splits["train"] and splits["val"]):
        return paths, []
    return splits["train"], splits["val"]


def _named_splits(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return train, val, test and "" -> the files whose names say that split, or none."""
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    words_of = {"val": VAL_WORDS, "train": TRAIN_WORDS, "test": TEST_WORDS}
    for path in paths:
        words = set(re.split(r"[^a-z]+", os.path.basename(path).lower()))
        split = next((name for name, known in words_of.items() if words & known), "")
        splits[split].append(path)
    return splits


def _check_text(node: Node, key: str, path: str) -> None:
    """Check that a file is readable, and that it is text or a table."""
    _check_readable(node, key, path)
    if text_columns.text_format(path) is not None:
        return
    with open(path, "rb") as file:
        what = formats.container(file.read(formats.HEAD))
    if what is not None:
        raise node.error(key, f"'{path}' is {what}")


def _column(node: Node, named: Node | None, files: list[str]) -> str | None:
    """Return the column of text that all files have; None if they are text themselves."""
    if named is not None and not isinstance(named.value, str):
        raise named.error("data.text_column", f"{named.plain!r} is not the name of a column")
    wanted = None if named is None else str(named.value)
    columns: dict[str | None, str] = {}
    for path in files:
        if text_columns.text_format(path) is not None:
            look = _column_look(path, wanted)
            columns.setdefault(_checked(named or node, "data.text_column", look), path)
        elif wanted is not None:
            _checked(named or node, "data.text_column", _row_look(path, wanted))
            columns.setdefault(wanted, path)
        else:
            columns.setdefault(None, path)
    if len(columns) > 1:
        (a, first), (b, second) = list(columns.items())[:2]
        said = ["text" if name is None else f"a table of the column {name!r}" for name in (a, b)]
        raise node.error(
            "data.files",
            f"'{first}' is {said[0]}, '{second}' is {said[1]}; name files of one kind by a pattern"
            " such as 'texts/*.parquet'",
        )
    return next(iter(columns))


def _column_look(path: str, wanted: str | None) -> Callable[[], str]:
    return lambda: text_columns.text_column(path, wanted)


def _row_look(path: str, wanted: str) -> Callable[[], None]:
    return lambda: text_columns.check_json_lines(path, wanted)


def _parse_tokenizer(value: dict[str, Node]) -> Plain:
    """Read {tokenizer, end_of_text, vocab_size} of text."""
    node = _given(value, "tokenizer")
    if node is None:
        for key in ("end_of_text", "vocab_size"):
            if key in value:
                raise value[key].error(f"data.{key}", "text needs a `tokenizer` for it", key=True)
        return {}
    end = _given(value, "end_of_text")
    if end is not None and not isinstance(end.value, str):
        raise end.error("data.end_of_text", f"{end.plain!r} is not a token")
    named = None if end is None else str(end.value)
    ends = "end_of_text" not in value or end is not None
    path = _tokenizer_path(node)
    tokenizer = _checked(
        end or node, "data.tokenizer", lambda: tokenizer_file.read(path, named, ends=ends)
    )
    size = _given(value, "vocab_size")
    if size is not None and _vocab_size(size) != tokenizer.vocab_size:
        raise size.error(
            "data.vocab_size", f"{size.plain!r} is not the {tokenizer.vocab_size} of '{path}'"
        )
    return {
        "tokenizer": path,
        "end_of_text": tokenizer.end_of_text,
        "vocab_size": tokenizer.vocab_size,
    }


def _tokenizer_path(node: Node) -> str:
    if not isinstance(node.value, str) or not node.value:
        raise node.error("data.tokenizer", f"{node.plain!r} is not a path")
    path = os.path.abspath(os.path.expanduser(node.value))
    if os.path.isdir(path):
        path = os.path.join(path, "tokenizer.json")
    if not os.path.exists(path):
        raise node.error(
            "data.tokenizer", f"'{node.value}' does not exist (looked at {path}); give a file"
        )
    _check_readable(node, "data.tokenizer", path)
    return path


# --- arrays of tokens ----------------------------------------------------------------------------


def _parse_tokens(node: Node, value: dict[str, Node]) -> Plain:
    """Read {tokens, val, vocab_size, dtype, tokenizer}."""
    vocab_size, tokenizer = _vocabulary(node, value)
    tokens = _need(node, value, "tokens", "paths of arrays of tokens (.npy, .bin, or raw)")
    train, val = _token_paths(tokens, "data.tokens")
    val_node = _given(value, "val")
    if val_node is not None:
        listed, more = _token_paths(val_node, "data.val")
        val = more or listed
    named = _given(value, "dtype")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    if named is not None:
        if named.value not in DTYPES:
            near, known = suggestion(str(named.plain), DTYPES), ", ".join(DTYPES)
            raise named.error("data.dtype", f"{named.plain!r} is not one of {known}.{near}")
        dtype = str(named.value)
    first = _check_tokens(tokens, "data.tokens", train[0], dtype)
    wanted = dtype if named is not None else first.dtype
    for key, place, listed in (
        ("data.tokens", tokens, train),
        ("data.val", val_node or tokens, val),
    ):
        for path in listed:
            token_file = _check_tokens(place, key, path, wanted)
            if token_file.dtype != wanted:
                shape = (
                    f" in shape ({token_file.tokens},)" if token_file.format == formats.NPY else ""
                )
                raise place.error(
                    key, f"'{path}' holds {token_file.dtype}{shape}; give one row of {wanted}"
                )
    section: Plain = {"kind": "tokens", "tokens": _one_or_all(train)}
    section |= {"vocab_size": vocab_size, "dtype": wanted}
    section |= {"val": _one_or_all(val)} if val else {}
    return section if tokenizer is None else {**section, "tokenizer": tokenizer}


def _one_or_all(listed: list[str]) -> str | list[str]:
    return listed[0] if len(listed) == 1 else listed


def _vocabulary(node: Node, value: dict[str, Node]) -> tuple[int, str | None]:
    """Return the number of different tokens, and the path of the tokenizer if one is named."""
    named = _given(value, "tokenizer")
    path, known = None, 0
    if named is not None:
        path = _tokenizer_path(named)
        known = _checked(named, "data.tokenizer", _size_look(path))
    if named is not None and "vocab_size" not in value:
        return known, path
    size = _need(node, value, "vocab_size", "the number of different tokens, or a `tokenizer`")
    given_size = _vocab_size(size)
    if given_size < known:
        raise size.error(
            "data.vocab_size", f"{size.plain!r} is below the {known} tokens of '{path}'"
        )
    return given_size, path


def _size_look(path: str) -> Callable[[], int]:
    return lambda: tokenizer_file.read(path).vocab_size


def _vocab_size(size: Node) -> int:
    number = size.value if isinstance(size.value, int | float) else 0
    if number < 2 or not float(number).is_integer():
        raise size.error("data.vocab_size", f"{size.plain!r} is not a whole number of at least 2")
    if number > MAX_VOCAB_SIZE:
        raise size.error(
            "data.vocab_size", f"{size.plain!r} is too large; the maximum is {MAX_VOCAB_SIZE}"
        )
    return int(number)


def _token_paths(node: Node, key: str) -> tuple[list[str], list[str]]:
    """Return the files of tokens that are named, in order, and those that validate by their names.

    Words in the names tell the splits of a folder or a pattern.
    """
    train: list[str] = []
    val: list[str] = []
    for item, text in _items(node, key):
        if os.path.isdir(text):
            listed, more = _token_folder(item, key, text)
            val += more
        elif os.path.isfile(f"{text}.bin") and os.path.isfile(f"{text}.idx"):
            listed = [f"{text}.bin"]  # the prefix of a Megatron data set
        elif os.path.exists(text):
            listed = [text]
        else:
            listed = _matched(item, key, text)
            splits = _named_splits(listed)
            if splits["train"] and splits["val"] and not splits[""]:
                listed = splits["train"]
                val += splits["val"]
        for path in listed:
            stem, suffix = os.path.splitext(path)
            path = f"{stem}.bin" if suffix == ".idx" else path
            _check_readable(item, key, path)
            train.append(path)
        for path in val:
            _check_readable(item, key, path)
    if not train:
        raise node.error(key, "is empty; give at least one path or pattern")
    return train, val


def _matched(item: Node, key: str, text: str) -> list[str]:
    """Return the files of tokens that a pattern matches, by name; numbers count as numbers."""
    matched = [path for path in glob(text, recursive=True) if not os.path.isdir(path)]
    shards = {path for path in matched if not path.endswith(".idx")}
    if shards:
        return sorted(shards, key=_natural)
    if glob(text) or any(sign in text for sign in "*?["):
        raise item.error(key, f"'{item.value}' matches no file of tokens")
    raise item.error(key, f"'{item.value}' does not exist (looked at {text})")


def _natural(path: str) -> list[str | int]:
    """Return a key by which shard 2 comes before shard 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path)]


def _token_folder(item: Node, key: str, folder: str) -> tuple[list[str], list[str]]:
    """Return the shards of a folder; words in their names, such as train and val, tell splits.

    A pair train.bin and val.bin, or .npy, is taken whatever else there is.
    """
    for suffix in ("bin", "npy"):
        pair = [os.path.join(folder, f"{split}.{suffix}") for split in ("train", "val")]
        if all(map(os.path.isfile, pair)):
            return pair[:1], pair[1:]
    inside = [path for path in _files_below(folder) if path.endswith((".bin", ".npy"))]
    if not inside:
        raise item.error(key, f"'{folder}' has no .bin and no .npy file; give the arrays' paths")
    splits = _named_splits(sorted(inside, key=_natural))
    if not splits["train"]:  # a test split is left out beside a train split alone
        splits[""] += splits.pop("test")
    named = splits["train"] or splits["val"]
    if named and splits[""]:
        raise item.error(
            key,
            f"'{splits[''][0]}' says no split, and '{named[0]}' does; name the files of tokens and"
            " of val",
        )
    if splits["val"] and not splits["train"]:
        raise item.error(key, f"'{folder}' has shards of val alone; name those to train on")
    return splits["train"] or splits[""], splits["val"]


def _check_tokens(node: Node, key: str, path: str, dtype: str) -> TokenFile:
    return _checked(node, key, lambda: token_files.inspect(path, dtype))
