"""Files that hold text or tokens in a wrapping, told by their first bytes."""

from __future__ import annotations

import struct

_UNPACK = "unpack it, and name what was in it"
CONTAINERS: dict[bytes, str] = {
    b"PAR1": "a Parquet table; write its column of text, or of tokens, to a file of its own",
    b"ARROW1": "an Arrow table; write its column of text, or of tokens, to a file of its own",
    b"MMIDIDX\0\0": "the index of a Megatron data set; name the .bin beside it",
    b"\x93NUMPY": "a .npy array; give it that ending, under data.tokens",
    b"PK\x03\x04": f"a zip archive; {_UNPACK}",
    b"\x1f\x8b": f"compressed by gzip; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"compressed by zstd; {_UNPACK}",
    b"\xfd7zXZ\0": f"compressed by xz; {_UNPACK}",
    b"BZh": f"compressed by bzip2; {_UNPACK}",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file; write its array of tokens to a file of its own",
    b"SQLite format 3\0": "an SQLite database; write its text to a file of its own",
    b"%PDF-": "a PDF document; write its text to a file of its own",
}
LLM_C = (20240520, 20240801)
"""First number of the files of tokens that llm.c writes, of 16 and of 32 bits a token."""


def container(head: bytes) -> str | None:
    """Return what a file is that begins with `head` (16 bytes), and what to do; None if plain."""
    for magic, what in CONTAINERS.items():
        if head.startswith(magic):
            return what
    if len(head) >= 8:
        number, version = struct.unpack("<ii", head[:8])
        if number in LLM_C and 1 <= version <= 16:
            return "of llm.c, with a header of 1024 bytes; cut it off: tail -c +1025"
    return None
