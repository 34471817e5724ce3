"""Sections `data` of space files, and files of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moenas.data.section import parse
from moenas.records import Plain
from moenas.resources import parse_yaml


def section(text: str) -> Plain:
    """A parsed section `data`."""
    return parse(parse_yaml(f"data:\n  {text}\n", "x.yaml").value["data"])  # type: ignore


def write_tokens(path: Path, tokens: Any, dtype: str = "uint16") -> Path:
    """Tokens as an array of numpy, or raw."""
    array = np.asarray(tokens, dtype=dtype)
    np.save(path, array) if path.suffix == ".npy" else array.tofile(path)
    return path
