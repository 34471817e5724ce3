"""Files in a wrapping are told by their first bytes."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest

from moenas.formats import container


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(9))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PAR1" + bytes(12), "Parquet"),
        (b"MMIDIDX\0\0" + bytes(9), "Megatron"),
        (np.array([20240520, 1, 99], dtype="<i4").tobytes() + bytes(9), "llm.c"),
        (np.array([20240801, 7, 99], dtype="<i4").tobytes() + bytes(9), "llm.c"),
        (gzip.compress(b"text", mtime=0), "gzip"),
        (npy(), "npy"),
        (zipped(), "zip"),
    ],
)
def test_a_wrapping_is_named(head: bytes, what: str) -> None:
    kind = container(head[:16])
    assert kind is not None
    assert what in kind


def test_text_and_tokens_are_plain() -> None:
    assert container(b"import os\n") is None
    assert container(bytes([0xC3, 0xBC]) + b"ber uns") is None
    assert container(np.arange(8, dtype="<u2").tobytes()) is None
    assert container(b"P") is None
