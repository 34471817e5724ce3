"""Formats of files that hold text or tokens, detected by their first bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_UNPACK = "unpack it, and name the files inside"
HEAD = 16
"""Bytes from the start of a file that tell its format."""
PARQUET, ARROW, ARROW_STREAM = "Parquet", "Arrow", "Arrow stream"
NPY, LLM_C, MEGATRON = ".npy", "llm.c", "Megatron"
TABLES = (PARQUET, ARROW, ARROW_STREAM)
"""Formats with columns of text; pyarrow reads them."""
_MAGIC: dict[bytes, str] = {
    b"PAR1": PARQUET,
    b"ARROW1": ARROW,
    b"\x93NUMPY": NPY,
    b"MMIDIDX\0\0": MEGATRON,
}
_TOKENS = "; name it under data.tokens"
CONTAINERS: dict[bytes, str] = {
    b"MMIDIDX\0\0": f"the index of a Megatron data set{_TOKENS}",
    b"\x93NUMPY": f"a .npy array{_TOKENS}",
    b"PAR1": "a Parquet table of text; name it under data.files",
    b"ARROW1": "an Arrow table of text; name it under data.files",
    b"PK\x03\x04": f"a zip archive; {_UNPACK}",
    b"\x1f\x8b": f"compressed by gzip; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"compressed by zstd; {_UNPACK}",
    b"\xfd7zXZ\0": f"compressed by xz; {_UNPACK}",
    b"BZh": f"compressed by bzip2; {_UNPACK}",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file; write its array of tokens to a file of its own",
    b"SQLite format 3\0": "an SQLite database; write its text to a file of its own",
    b"%PDF-": "a PDF document; write its text to a file of its own",
}
LLM_C_DTYPES = {20240520: "uint16", 20240801: "uint32"}
"""First number of the files of tokens that llm.c writes -> type of their tokens."""
LLM_C_HEADER = 1024
"""Bytes of the header of llm.c: 256 numbers of 32 bits."""


@dataclass(frozen=True)
class LlmCHeader:
    """What the header of a file of tokens of llm.c says."""

    dtype: str
    tokens: int


def llm_c_header(head: bytes) -> LlmCHeader | None:
    """Return the header of llm.c that a file begins with (16 bytes), or None.

    Its first three numbers are a magic number, a version and the count of tokens.
    """
    if len(head) < 12:
        return None
    number, version, tokens = struct.unpack("<iii", head[:12])
    if number not in LLM_C_DTYPES or not 1 <= version <= 16:
        return None
    return LlmCHeader(LLM_C_DTYPES[number], tokens)


def file_format(head: bytes) -> str | None:
    """Return the format of a file that begins with `head` (16 bytes); None if it has no mark."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if _is_arrow_stream(head):
        return ARROW_STREAM
    return LLM_C if llm_c_header(head) is not None else None


def _is_arrow_stream(head: bytes) -> bool:
    """Whether a file begins with the first message of an Arrow stream.

    That is 0xFFFFFFFF and the length of the metadata, which is a multiple of 8.
    """
    if len(head) < 8 or head[:4] != b"\xff\xff\xff\xff":
        return False
    length = int(struct.unpack("<i", head[4:8])[0])
    return 0 < length < 1 << 24 and length % 8 == 0


def container(head: bytes) -> str | None:
    """Return what a file is that begins with `head` (16 bytes), and what to do; None if plain."""
    for magic, what in CONTAINERS.items():
        if head.startswith(magic):
            return what
    if llm_c_header(head) is not None:
        return f"an array of tokens of llm.c{_TOKENS}"
    return None
