"""Corpora that a driver writes below the root of the weights, for nodes that lack their files.

The file of a corpus is a line of manifest, padded to a multiple of 64 bytes, then the bytes of both
splits. Its name is the digest of the splits.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moenas.data import loading
from moenas.data.corpus import Corpus
from moenas.data.entropy import CHUNK
from moenas.errors import DataError
from moenas.records import Plain
from moenas.store.files import make_folder, path_at, sync_folder
from moenas.store.object_path import ObjectPath, StorePath

FOLDER = "corpora"
"""Folder beside the folders of the studies of a database."""
ALIGNMENT = 64
"""Bytes; the splits begin at a multiple, so that they can be mapped with any dtype."""


def publish(root: StorePath, corpus: Corpus) -> Plain:
    """Write a corpus below a root, if it is not there, and return its address for `Job.data_at`.

    Raises OSError if the root cannot be written.
    """
    path = root / FOLDER / f"{corpus.sha256}.corpus"
    address: Plain = {"path": str(path)}
    if path.is_file():
        return address
    beside = path.parent if isinstance(path, Path) else None
    if beside is not None:
        make_folder(beside)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".draft-") as folder:
        draft = Path(folder, path.name)
        with draft.open("wb") as file:
            _write(corpus, file)
            file.flush()
            os.fsync(file.fileno())
        if isinstance(path, ObjectPath):
            path.upload(str(draft))
        else:
            os.replace(draft, path)
            sync_folder(path.parent)
    return address


def remove(root: StorePath, digest: str) -> None:
    """Remove a corpus that no study needs; nothing happens if it was not published."""
    with suppress(OSError):  # its folder stays, for another process may publish there
        (root / FOLDER / f"{digest}.corpus").unlink()


def _write(corpus: Corpus, file: BinaryIO) -> None:
    """Write the header and both splits."""
    header = json.dumps({**corpus.manifest, "dtype": corpus.train.dtype.name}).encode()
    file.write(header + b" " * (-(len(header) + 1) % ALIGNMENT) + b"\n")
    for tokens in (corpus.train, corpus.val):
        for i in range(0, len(tokens), CHUNK):
            file.write(np.ascontiguousarray(tokens[i : i + CHUNK]).data)


def fetch(address: Plain, digest: str) -> Corpus:
    """Return a published corpus; an object is copied into the cache folder of this user once.

    Raises:
        DataError: if it is not there, cannot be read, or is another corpus.
    """
    path = path_at(address["path"])
    try:
        if isinstance(path, Path):
            return _opened(path, digest)
        kept = loading.cache_folder() / path.name
        if kept.is_file():
            try:
                return _opened(kept, digest)
            except DataError:  # a file that was changed is fetched again
                kept.unlink(missing_ok=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".draft-") as folder:
            draft = Path(folder, path.name)
            path.download(str(draft))
            corpus = _opened(draft, digest)
            os.replace(draft, kept)
        return corpus
    except OSError as error:
        raise DataError(f"{path}: cannot be fetched: {error.strerror}", path="data") from error


def _opened(path: Path, digest: str) -> Corpus:
    """Map the corpus of a file, which must have this digest."""
    with path.open("rb") as file:
        header = file.readline()
    try:
        manifest = json.loads(header)
        dtype, start = np.dtype(manifest["dtype"]), len(header)
        tokens = np.memmap(path, dtype=dtype, mode="r", offset=start)
        train, val, rest = np.split(
            tokens,
            [manifest["train_tokens"], manifest["train_tokens"] + manifest["val_tokens"]],
        )
        digest_read = loading.digest_of([train, val])
        if digest_read == digest and not len(rest):
            return loading.from_manifest(manifest, train, val)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a corpus of moenas: {error}", path="data") from None
    raise DataError(
        f"{path}: its digest is {digest_read[:12]}, not {digest[:12]}; remove the file, and the"
        " next run writes it again",
        path="data",
    )
