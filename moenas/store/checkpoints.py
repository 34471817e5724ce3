"""Where the checkpoint of a paused trial lies: beside its weights, one file for its latest rung.

A trial has at most two checkpoints, and two only while the later one is being stored. A trial that
is finished has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from moenas.errors import InputError
from moenas.records import Plain, WeightsFile
from moenas.resources import sha256
from moenas.store.files import matching, remove_file, write_whole
from moenas.store.object_path import StorePath
from moenas.store.weights import adopt_draft, stored_at, study_folder, weights_path

NAME = "checkpoint-"
"""How the name of a checkpoint begins; the number of its rung follows."""


def checkpoint_path(runs: StorePath, study: str, trial: int, rung: int) -> StorePath:
    """Return `runs/<study>/<trial>/checkpoint-<rung>.safetensors`."""
    return weights_path(runs, study, trial).with_name(f"{NAME}{rung}.safetensors")


def write_checkpoint(
    runs: StorePath, study: str, trial: int, rung: int, data: bytes | WeightsFile
) -> str:
    """Write the checkpoint of a trial, or name the file of a worker; return its SHA-256.

    Raises OSError if the disk refuses.
    """
    path = checkpoint_path(runs, study, trial, rung)
    if isinstance(data, WeightsFile):
        return adopt_draft(path, data)
    write_whole(path, data)
    return sha256(data)


def read_checkpoint(
    runs: StorePath, study: str, trial: int, rung: int, digest: str | None
) -> bytes:
    """Return the checkpoint of a trial, which must have this SHA-256.

    Raises:
        InputError: if it is not there, cannot be read, or is another one.
    """
    path = checkpoint_path(runs, study, trial, rung)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if (actual := sha256(data)) != digest:
        raise InputError(f"{path}: its SHA-256 is {actual[:12]}..., not {str(digest)[:12]}...")
    return data


def checkpoint_at(runs: StorePath, study: str, trial: int, rung: int, digest: str | None) -> Plain:
    """Return what a worker needs to read the checkpoint of a trial from a shared root by itself.

    Raises:
        InputError: if the checkpoint is not there.
    """
    path = checkpoint_path(runs, study, trial, rung)
    if not path.is_file():
        raise InputError(f"{path}: cannot be read: it is not there")
    return stored_at(path, str(digest))


def remove_checkpoints(runs: StorePath, study: str, trial: int, but: int | None = None) -> None:
    """Remove the checkpoints of a trial, except for one rung."""
    folder = weights_path(runs, study, trial).parent
    with contextlib.suppress(OSError):
        for path in [*folder.glob(f"{NAME}*"), *folder.glob(f".{NAME}*")]:
            if but is None or path.name != f"{NAME}{but}.safetensors":
                remove_file(path)


def unused_checkpoints(runs: StorePath, study: str, used: Mapping[int, int]) -> Iterator[StorePath]:
    """Yield the checkpoints that no trial continues from, and parts of them.

    `used` is trial -> the rung that it continues from.
    """
    folder = study_folder(runs, study)
    kept = {checkpoint_path(runs, study, trial, rung) for trial, rung in used.items()}
    for pattern in (f"*/{NAME}*", f"*/.{NAME}*"):
        for path in matching(folder, pattern):
            if path not in kept and path.is_file():
                yield path
