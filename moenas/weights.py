"""Where the trained weights of a trial lie; they are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path, PosixPath

from moenas.errors import InputError, NotFoundError
from moenas.refs import sha256

FILE = "model.safetensors"
SLUG = 40
"""Characters of a study's name that its folder keeps; a digest tells equal beginnings apart."""


class Root(PosixPath):
    """The folder of a database's weights, and those in which it may have put them before."""

    older: tuple[Path, ...] = ()


def weights_path(runs: Path, study: str, trial: int) -> Path:
    """Return `runs/<study>/<trial>/model.safetensors`, always inside `runs`.

    The study's folder is its name in lower-case letters, digits and hyphens, and ten digits of
    the name's digest: no name can leave `runs`, and no two names share a folder.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")[:SLUG].strip("-") or "study"
    digest = sha256(study.encode("utf-8", "surrogatepass"))
    return runs / f"{slug}-{digest[:10]}" / str(int(trial)) / FILE


def write_weights(runs: Path, study: str, trial: int, data: bytes) -> str:
    """Write the weights of a trial and return their SHA-256.

    A reader finds the old file, or the new one, or none; never a part of one. The bytes are on
    the disk before the name is. Raises OSError if the disk refuses.
    """
    write_whole(weights_path(runs, study, trial), data)
    return sha256(data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file by a draft beside it, whose name begins with a dot and that of the file."""
    _make(path.parent)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
    _sync(path.parent)


def copy_weights(runs: Path, study: str, source: int, trial: int, digest: str) -> None:
    """Give a trial the weights of another one, which must have this SHA-256.

    They are one file under two names, or two files where the file system has no hard links. A
    reader finds what it finds while `write_weights` is at work; that replaces one name alone.
    Raises OSError if the disk refuses.

    Raises:
        InputError: as `read_weights` does.
    """
    there, data = _found(runs, study, source, digest)
    path = weights_path(runs, study, trial)
    _make(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{FILE}.") as draft:
        part = Path(draft, FILE)
        try:
            os.link(there, part)
        except OSError:
            write_weights(runs, study, trial, data)
            return
        # rename(2) leaves `part` if both names are one file already; it goes with the draft.
        os.replace(part, path)
    _sync(path.parent)


def sweep(runs: Path, study: str) -> None:
    """Remove what a killed process of this study left half written; no other one may run it."""
    for draft in weights_path(runs, study, 0).parents[1].glob(f"*/.{FILE}.*"):
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                draft.unlink()


def _make(folder: Path) -> None:
    """Make a folder and those above it, and bring their names to the disk."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _sync(each.parent)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_weights(runs: Path, study: str, trial: int, digest: str) -> bytes:
    """Return the weights of a trial, which must have this SHA-256.

    Raises:
        NotFoundError: if there are none.
        InputError: if they are not the ones that were stored, or cannot be read.
    """
    return _found(runs, study, trial, digest)[1]


def has_weights(runs: Path, study: str, trial: int) -> bool:
    """Say whether there is a file of weights of a trial; its digest is not compared."""
    roots = [runs, *getattr(runs, "older", ())]
    return any(weights_path(root, study, trial).is_file() for root in roots)


def _found(runs: Path, study: str, trial: int, digest: str) -> tuple[Path, bytes]:
    """Return the weights of a trial and where they lie: in `runs`, or where they lay before."""
    path = weights_path(runs, study, trial)
    others = [weights_path(root, study, trial) for root in getattr(runs, "older", ())]
    wrong: InputError | None = None
    for place in [path, *others]:
        try:
            data = place.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            wrong = wrong or InputError(f"{place}: cannot be read: {error.strerror}")
            continue
        found = sha256(data)
        if found == digest:
            return place, data
        wrong = wrong or InputError(
            f"{place}: not the weights that trial {trial} ended with: SHA-256 {found[:12]}...,"
            f" stored was {digest[:12]}...; restore the file"
        )
    if wrong is not None:
        raise wrong
    raise NotFoundError(
        f"{path}: the weights of trial {trial} are not there; set MOENAS_RUNS to the folder"
        " that holds them"
    )
