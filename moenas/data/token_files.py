"""Files of tokens: the format, by the header or the index, and the memory-mapped array."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np

from moenas import formats
from moenas.data.shards import Shard, Tokens

DTYPES = ("uint8", "uint16", "uint32")
"""Types of tokens."""
RAW = "raw"
"""The format of an array without a header, as nanoGPT writes it."""
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Of a Megatron index: magic, version, code of the type, count of sequences, of documents.

Then stand the lengths of the sequences (int32) and their places in bytes (int64); source:
`_IndexWriter` in megatron/core/datasets/indexed_dataset.py.
"""
INDEX_DTYPES = {1: "uint8", 4: "uint32", 8: "uint16"}
"""Code of a Megatron index -> type. int32 (4) is read as uint32: a negative token is too large."""


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens: its format, and where its array is."""

    path: str
    format: str
    """RAW, or a format of `formats`."""
    dtype: str
    offset: int
    """Bytes before the first token; of a .npy array numpy knows them."""
    tokens: int

    def map(self) -> Shard:
        """Map the array into memory.

        Raises:
            OSError: if the file cannot be read.
        """
        if self.format == formats.NPY:
            array: Tokens = np.load(self.path, mmap_mode="r", allow_pickle=False)
        else:
            array = np.memmap(
                self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.tokens,)
            )
        return Shard(self.path, array)


def inspect(path: str, raw_dtype: str) -> TokenFile:
    """Return what a file of tokens is; a raw array has the type `raw_dtype`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: saying what is wrong with it.
    """
    with open(path, "rb") as file:
        head = file.read(formats.HEAD)
    size = os.path.getsize(path)
    name = formats.file_format(head)
    if name == formats.NPY or path.endswith(".npy"):
        return _inspect_npy(path)
    if (index := index_of(path)) is not None:
        return _inspect_megatron(path, index, size)
    if name == formats.LLM_C:
        return _inspect_llm_c(path, head, size)
    if name != formats.ARROW_STREAM and (what := formats.container(head)) is not None:
        raise ValueError(f"'{path}' is {what}")
    if size % np.dtype(raw_dtype).itemsize:
        raise ValueError(f"'{path}' has {size} bytes, not whole {raw_dtype} numbers")
    return TokenFile(path, RAW, raw_dtype, 0, size // np.dtype(raw_dtype).itemsize)


def _inspect_npy(path: str) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"'{path}' is no .npy array: {error}") from None
    if array.ndim != 1 or array.dtype.name not in DTYPES or not array.dtype.isnative:
        order = "" if array.dtype.isnative else "in the byte order of another machine, "
        raise ValueError(
            f"'{path}' holds {order}{array.dtype.name} in shape {array.shape}; give one row of"
            f" {' or '.join(DTYPES)}"
        )
    return TokenFile(path, formats.NPY, array.dtype.name, 0, len(array))


def _inspect_llm_c(path: str, head: bytes, size: int) -> TokenFile:
    header = formats.llm_c_header(head)
    assert header is not None
    room = (size - formats.LLM_C_HEADER) // np.dtype(header.dtype).itemsize
    if header.tokens != room:
        raise ValueError(
            f"'{path}' is cut short or damaged: its llm.c header says {header.tokens:,} tokens,"
            f" the file has room for {max(0, room):,}"
        )
    return TokenFile(path, formats.LLM_C, header.dtype, formats.LLM_C_HEADER, room)


def index_of(path: str) -> str | None:
    """Return the Megatron index that stands beside a .bin file, or None."""
    stem, suffix = os.path.splitext(path)
    index = f"{stem}.idx"
    if suffix != ".bin" or not os.path.isfile(index):
        return None
    with open(index, "rb") as file:
        head = file.read(formats.HEAD)
    return index if formats.file_format(head) == formats.MEGATRON else None


def _inspect_megatron(path: str, index: str, size: int) -> TokenFile:
    """Read the type and the count of tokens from the index.

    The sequences must lie one after another, as Megatron's preprocessing writes them.
    """
    with open(index, "rb") as file:
        head = file.read(INDEX_HEADER.size)
    if len(head) < INDEX_HEADER.size:
        raise ValueError(f"'{index}' is cut short; write the Megatron data set again")
    _, version, code, sequences, _ = INDEX_HEADER.unpack(head)
    if version != 1 or code not in INDEX_DTYPES:
        raise ValueError(
            f"'{index}' is a Megatron index of version {version} and type {code}; read are version"
            " 1 with uint8, uint16 or int32"
        )
    dtype = INDEX_DTYPES[code]
    width = np.dtype(dtype).itemsize
    if os.path.getsize(index) < INDEX_HEADER.size + 12 * sequences:
        raise ValueError(f"'{index}' is cut short; write the Megatron data set again")
    lengths = np.fromfile(index, np.int32, sequences, offset=INDEX_HEADER.size)
    places = np.fromfile(index, np.int64, sequences, offset=INDEX_HEADER.size + lengths.nbytes)
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = int(ends[-1]) if sequences else 0
    if tokens * width != size or not np.array_equal(places, (ends - lengths) * width):
        raise ValueError(
            f"'{path}' has {size} bytes, and its index says {tokens:,} tokens of {dtype} one after"
            " another; write the Megatron data set again"
        )
    return TokenFile(path, formats.MEGATRON, dtype, 0, tokens)
