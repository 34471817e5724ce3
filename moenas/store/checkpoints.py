"""Where the checkpoint of a paused trial lies: beside its weights, one file for its latest rung.

A trial has at most two checkpoints, and two only while the later one is being stored. A trial that
is finished has none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from moenas.errors import InputError
from moenas.records import WeightsFile
from moenas.resources import sha256
from moenas.store.weights import adopt_draft, weights_path, write_whole

NAME = "checkpoint-"
"""How the name of a checkpoint begins; the number of its rung follows."""


def checkpoint_path(runs: Path, study: str, trial: int, rung: int) -> Path:
    """Return `runs/<study>/<trial>/checkpoint-<rung>.safetensors`."""
    return weights_path(runs, study, trial).with_name(f"{NAME}{rung}.safetensors")


def write_checkpoint(
    runs: Path, study: str, trial: int, rung: int, data: bytes | WeightsFile
) -> str:
    """Write the checkpoint of a trial, or name the file that a worker wrote; return its SHA-256.

    Raises OSError if the disk refuses.
    """
    path = checkpoint_path(runs, study, trial, rung)
    if isinstance(data, WeightsFile):
        return adopt_draft(path, data)
    write_whole(path, data)
    return sha256(data)


def read_checkpoint(runs: Path, study: str, trial: int, rung: int, digest: str | None) -> bytes:
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


def remove_checkpoints(runs: Path, study: str, trial: int, but: int | None = None) -> None:
    """Remove the checkpoints of a trial, except for that of one rung."""
    folder = weights_path(runs, study, trial).parent
    for path in [*folder.glob(f"{NAME}*"), *folder.glob(f".{NAME}*")]:
        if but is None or path.name != f"{NAME}{but}.safetensors":
            remove(path)


def unused_checkpoints(runs: Path, study: str, used: Mapping[int, int]) -> Iterator[Path]:
    """Yield the checkpoints that no trial continues from, and parts of them.

    `used` is trial -> the rung that it continues from.
    """
    study_folder = weights_path(runs, study, 0).parents[1]
    kept = {checkpoint_path(runs, study, trial, rung) for trial, rung in used.items()}
    for pattern in (f"*/{NAME}*", f"*/.{NAME}*"):
        for path in sorted(study_folder.glob(pattern)):
            if path not in kept and path.is_file():
                yield path


def remove(path: Path) -> None:
    """Remove a file, and the folder of its trial if nothing else is there."""
    with contextlib.suppress(OSError):
        path.unlink()
    with contextlib.suppress(OSError):
        os.rmdir(path.parent)
