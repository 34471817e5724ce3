"""Columns of text: rows of JSON Lines, Parquet and Arrow files, and data sets of Hugging Face."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moenas import formats
from moenas.data.tokenizer_file import EXTRA
from moenas.errors import DataError

if TYPE_CHECKING:
    import pyarrow

JSON_LINES = "JSON Lines"
DEFAULT = "text"
"""The column that is read if none is named."""
LINE = 1 << 20
"""Bytes of a first line that are looked at."""
ROWS = 1024
"""Rows that are read at a time."""
UNREADABLE = (OSError, ValueError, KeyError, MemoryError)
"""Errors of pyarrow for a file that it cannot read; its own ones derive from these."""
VAL_SPLITS = ("validation", "valid", "val", "dev", "test")
"""Splits of a data set of Hugging Face that validate; the first that there is."""


def text_format(path: str) -> str | None:
    """Return the format of a file of tables; None if it is text.

    Raises:
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        detected = formats.file_format(file.read(formats.HEAD))
    return detected if detected in formats.TABLES else None


def text_column(path: str, wanted: str | None) -> str:
    """Return the name of the column of text in a file of tables.

    Without `wanted` it is "text", or the only column of text.

    Raises:
        DataError: naming the columns of the file.
    """
    schema = _opened(path)[0]
    texts = [str(field.name) for field in schema if _is_text(field.type)]
    listed = f"its columns of text are {', '.join(texts)}" if texts else "it has no column of text"
    if wanted is not None:
        if wanted not in texts:
            raise DataError(f"'{path}' has no column of text {wanted!r}; {listed}", path="data")
        return wanted
    if DEFAULT in texts:
        return DEFAULT
    if len(texts) != 1:
        raise DataError(f"'{path}': {listed}; name one as `text_column`", path="data")
    return texts[0]


def rows(path: str, column: str) -> Iterator[str]:
    """Yield the texts of a column in order; empty ones are left out.

    Raises:
        DataError: naming file and row of what is no text.
    """
    if text_format(path) is None:
        yield from _json_rows(path, column)
        return
    schema, batches = _opened(path, column)
    if schema.names.count(column) != 1:
        raise DataError(f"{path}: has no single column {column!r} any more", path="data")
    try:
        for batch in batches:
            yield from filter(None, batch.column(column).to_pylist())
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read: {reason}", path="data") from None


def _json_rows(path: str, column: str) -> Iterator[str]:
    """Yield a field of each line, which is a JSON object."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from filter(None, [_json_text(path, number, line, column)])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", path="data") from None


def _json_text(path: str, number: int, line: bytes, column: str) -> str | None:
    place = f"{path}:{number}:"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(":")[0]
        raise DataError(f"{place} is no JSON ({reason}); give JSON Lines", path="data") from None
    if not isinstance(row, dict) or column not in row:
        keys = ", ".join(row) if isinstance(row, dict) else "no object"
        raise DataError(f"{place} has no {column!r} ({keys}); check text_column", path="data")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place} {column!r} is {type(text).__name__}, not text", path="data")
    return text


def check_json_lines(path: str, column: str) -> None:
    """Check the first row of a file of JSON Lines.

    Raises:
        DataError: naming file and line.
    """
    for _ in _json_rows(path, column):
        return


def json_lines_keys(path: str) -> list[str]:
    """Return the keys of the first line if it is a JSON object; else none."""
    with open(path, "rb") as file:
        line = file.readline(LINE)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return []
    return list(row) if isinstance(row, dict) else []


def _is_text(type_: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_string(type_) or types.is_large_string(type_))


def _opened(
    path: str, column: str | None = None
) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """Return the schema of a file of tables, and its rows in batches.

    Raises:
        DataError: if pyarrow is missing, or cannot read the file.
    """
    name = text_format(path)
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise DataError(
            f"'{path}' is a file of {name}, which needs pyarrow: {EXTRA}", path="data"
        ) from None
    try:
        if name == formats.PARQUET:
            file = parquet.ParquetFile(path, memory_map=True)
            columns = None if column is None else [column]
            return file.schema_arrow, file.iter_batches(batch_size=ROWS, columns=columns)
        source = pyarrow.memory_map(path)
        if name == formats.ARROW_STREAM:
            stream = ipc.open_stream(source)
            return stream.schema, iter(stream)
        table = ipc.open_file(source)
        return table.schema, map(table.get_batch, range(table.num_record_batches))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"'{path}' cannot be read as {name}: {reason}", path="data") from None


def is_low(text: bytes, share: float) -> bool:
    """Whether the digest of a text is in the lowest share of all digests."""
    return int(hashlib.sha256(text).hexdigest()[:8], 16) < share * 16**8


# --- data sets of Hugging Face, as `save_to_disk` writes them ------------------------------------


def is_dataset(folder: str) -> bool:
    """Whether a folder holds a data set or a dictionary of data sets."""
    names = ("state.json", "dataset_dict.json")
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def dataset_files(folder: str) -> tuple[list[str], list[str]]:
    """Return the Arrow files of a data set: those to train on, and those that validate.

    Of a dictionary of splits, `train` trains; the first of VAL_SPLITS validates.

    Raises:
        DataError: if one of its files is missing or has another format.
    """
    if os.path.isfile(os.path.join(folder, "state.json")):
        return _arrow_files(folder), []
    splits = _json(os.path.join(folder, "dataset_dict.json")).get("splits")
    if not isinstance(splits, list) or "train" not in splits:
        raise DataError(f"'{folder}' has no split 'train'; name the folder of one", path="data")
    val = next((split for split in VAL_SPLITS if split in splits), None)
    train_files = _arrow_files(os.path.join(folder, "train"))
    return train_files, _arrow_files(os.path.join(folder, val)) if val else []


def _arrow_files(folder: str) -> list[str]:
    state = _json(os.path.join(folder, "state.json"))
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"'{folder}/state.json' lists no data files", path="data") from None
    if state.get("_indices_files"):
        raise DataError(
            f"'{folder}' selects rows by an index; call flatten_indices() before save_to_disk",
            path="data",
        )
    if any(os.path.basename(name) != name for name in names):
        raise DataError(f"'{folder}/state.json' names a file of another folder", path="data")
    return [os.path.join(folder, name) for name in names]


def _json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}", path="data") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is no JSON object", path="data")
    return content
