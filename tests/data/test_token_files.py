"""Files of tokens as nanoGPT, llm.c, Megatron and numpy write them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from moenas.data.token_files import inspect

TOKENS = np.array([5, 0, 7, 3, 2, 2, 9, 1], dtype=np.uint16)
CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}
"""Types of a Megatron index."""


def write_llm_c(path: Path, tokens: np.ndarray, *, more: int = 0) -> Path:
    """256 int32, of which the first three are magic, version and count; then the tokens."""
    header = np.zeros(256, dtype="<i4")
    magic, version = (20240520, 1) if tokens.dtype == np.uint16 else (20240801, 7)
    header[:3] = magic, version, len(tokens) + more
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def write_megatron(
    path: Path, documents: list[list[int]], dtype: str = "uint16", version: int = 1
) -> Path:
    """An index and tokens as `IndexedDatasetBuilder` writes them."""
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    places = (np.cumsum(lengths) - lengths).astype(np.int64) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QB", version, CODES[dtype])
    head += struct.pack("<QQ", len(documents), len(documents) + 1)
    ends = np.arange(len(documents) + 1, dtype=np.int64)
    path.with_suffix(".idx").write_bytes(
        head + lengths.tobytes() + places.tobytes() + ends.tobytes()
    )
    np.concatenate([np.array(document, dtype=dtype) for document in documents]).tofile(path)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_files_of_llm_c_begin_behind_their_header(tmp_path: Path, dtype: str) -> None:
    path = write_llm_c(tmp_path / "a.bin", TOKENS.astype(dtype))
    program = inspect(path.as_posix(), "uint8")
    assert (program.format, program.dtype, program.tokens) == ("llm.c", dtype, 8)
    assert program.map().tokens.tolist() == TOKENS.tolist()


@pytest.mark.parametrize(
    ("dtype", "read_as"), [("uint8", "uint8"), ("uint16", "uint16"), ("int32", "uint32")]
)
def test_megatron_says_its_type_in_the_index(tmp_path: Path, dtype: str, read_as: str) -> None:
    path = write_megatron(tmp_path / "a.bin", [[5, 0, 7], [3], [2, 2, 9, 1]], dtype)
    program = inspect(str(path), "uint16")
    assert (program.format, program.dtype, program.tokens) == ("Megatron", read_as, 8)
    assert program.map().tokens.tolist() == TOKENS.tolist()


def test_a_file_without_a_header_is_raw_and_a_npy_array_says_its_type(tmp_path: Path) -> None:
    TOKENS.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", TOKENS.astype(np.uint32))
    raw, npy = (inspect(str(tmp_path / name), "uint16") for name in ("a.bin", "a.npy"))
    assert (raw.format, raw.dtype, raw.tokens) == ("raw", "uint16", 8)
    assert (npy.format, npy.dtype, npy.tokens) == (".npy", "uint32", 8)
    assert raw.map().tokens.tolist() == npy.map().tokens.tolist() == TOKENS.tolist()


@pytest.mark.parametrize("more", [-1, 1, -8])
def test_a_file_of_llm_c_that_was_cut_short_is_refused(tmp_path: Path, more: int) -> None:
    path = write_llm_c(tmp_path / "a.bin", TOKENS, more=more)
    with pytest.raises(ValueError, match=f"header says {8 + more} tokens, the file has room for 8"):
        inspect(str(path), "uint16")


def test_a_damaged_megatron_data_set_is_refused(tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", [[1, 2], [3]])
    index = path.with_suffix(".idx")
    whole = index.read_bytes()
    index.write_bytes(whole[:30])
    with pytest.raises(ValueError, match=r"a\.idx' is cut short"):
        inspect(str(path), "uint16")
    index.write_bytes(whole[:40])
    with pytest.raises(ValueError, match=r"a\.idx' is cut short"):
        inspect(str(path), "uint16")
    index.write_bytes(whole)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="has 4 bytes, and its index says 3 tokens of uint16"):
        inspect(str(path), "uint16")
    with pytest.raises(ValueError, match="version 1 and type 5"):
        inspect(str(write_megatron(tmp_path / "b.bin", [[1]], "int64")), "uint16")
    with pytest.raises(ValueError, match="version 2 and type 8"):
        inspect(str(write_megatron(tmp_path / "c.bin", [[1]], version=2)), "uint16")


def test_a_npy_array_of_another_byte_order_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "swapped.npy", TOKENS.astype(">u2"))
    with pytest.raises(ValueError, match="byte order of another machine"):
        inspect(str(tmp_path / "swapped.npy"), "uint16")
