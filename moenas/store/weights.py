"""Where the trained weights of a trial lie; they are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path, PosixPath

from moenas.errors import InputError, NotFoundError
from moenas.processes import machine
from moenas.records import Plain, WeightsFile
from moenas.resources import sha256

FILE = "model.safetensors"
_DRAFT = f".{FILE}."
"""How the name of a file begins that is not whole yet, or has not its name yet."""
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
    make_folder(path.parent)
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
    sync_folder(path.parent)


# --- written by a worker -------------------------------------------------------------------------


def place(runs: Path, study: str, trial: int) -> Plain | None:
    """Return what a worker needs to write the weights of a trial itself, for `Job.weights_to`.

    It can if it runs on this machine, as this user, and sees this folder. None if the folder cannot
    be made: the weights then come with the result.
    """
    path = Path(os.path.abspath(weights_path(runs, study, trial)))
    folder = path.parents[1]
    try:
        make_folder(folder)
        folder_stat = folder.stat()
    except OSError:
        return None
    if not machine():
        return None
    inode = [folder_stat.st_dev, folder_stat.st_ino]
    return {"path": str(path), "machine": machine(), "user": os.getuid(), "inode": inode}


def write_draft(to: Plain, write: Callable[[str], object]) -> WeightsFile | None:
    """Let `write` fill a file beside that of a trial's weights; return it once it is on the disk.

    None if this process does not share the driver's file system, or cannot write there.
    """
    target = Path(to["path"])
    part = None
    try:
        folder_stat = target.parents[1].stat()
        here = [machine(), os.getuid(), [folder_stat.st_dev, folder_stat.st_ino]]
        if here != [to["machine"], to["user"], to["inode"]]:
            return None
        target.parent.mkdir(exist_ok=True)
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=_DRAFT)
        os.close(handle)
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
            digest = file_digest(file, "sha256").hexdigest()
            return WeightsFile(part, file.tell(), digest)
    except Exception:  # safetensors has errors of its own for a full disk
        if part is not None:
            remove_draft(part)
        return None


def is_draft(file: WeightsFile, to: Plain | None) -> bool:
    """Say whether a file is one that `write_draft` makes for a job with this `weights_to`."""
    path = Path(file.path)
    return (
        to is not None
        and path.parent == Path(to["path"]).parent
        and path.name.startswith(_DRAFT)
        and os.path.normpath(path) == file.path
    )


def adopt_draft(path: Path, file: WeightsFile) -> str:
    """Give a draft its name in the folder of its trial, and return its SHA-256.

    Raises OSError if it is not there as the worker described it, or the disk refuses.
    """
    file_stat = os.lstat(file.path)
    if not stat.S_ISREG(file_stat.st_mode) or file_stat.st_size != file.size:
        raise OSError(errno.EIO, f"not the {file.size} bytes that were written", file.path)
    os.replace(file.path, path)
    for folder in path.parents[:2]:  # the worker may have made the trial's
        sync_folder(folder)
    return file.sha256


def remove_draft(path: str | os.PathLike[str]) -> None:
    """Remove a draft, and the folder of its trial if nothing else is there."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(Path(path).parent)


def remove_drafts(runs: Path, study: str, trial: int, but: WeightsFile | None = None) -> None:
    """Remove what workers have left of a trial that none of them works on, but for one file."""
    for draft in weights_path(runs, study, trial).parent.glob(f"{_DRAFT}*"):
        if but is None or draft.name != Path(but.path).name:
            remove_draft(draft)


# --- copied, found, read -------------------------------------------------------------------------


def copy_weights(
    runs: Path, study: str, source: int, trial: int, digest: str, *, of: str | None = None
) -> None:
    """Give a trial the weights of another one, which must have this SHA-256.

    The other trial is one of the study `of`, or of the same study.

    They are one file under two names, or two files where the file system has no hard links. A
    reader finds what it finds while `write_weights` is at work; that replaces one name alone.
    Raises OSError if the disk refuses.

    Raises:
        InputError: as `read_weights` does.
    """
    there, data = _found(runs, of or study, source, digest)
    path = weights_path(runs, study, trial)
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_DRAFT) as draft:
        part = Path(draft, FILE)
        try:
            os.link(there, part)
        except OSError:
            write_weights(runs, study, trial, data)
            return
        # rename(2) leaves `part` if both names are one file already; it goes with the draft.
        os.replace(part, path)
    sync_folder(path.parent)


def sweep(runs: Path, study: str) -> None:
    """Remove what a killed process of this study left half written; no other one may run it."""
    for draft in weights_path(runs, study, 0).parents[1].glob(f"*/{_DRAFT}*"):
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            remove_draft(draft)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and bring their names to the disk."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
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


def find_weights(runs: Path, study: str, trial: int, digest: str) -> Path:
    """Return where the weights of a trial lie, which must have this SHA-256.

    Raises:
        NotFoundError: if there are none.
        InputError: if they are not the ones that were stored, or cannot be read.
    """
    return _found(runs, study, trial, digest)[0]


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
        actual = sha256(data)
        if actual == digest:
            return place, data
        wrong = wrong or InputError(
            f"{place}: not the weights that trial {trial} ended with: SHA-256 {actual[:12]}...,"
            f" stored was {digest[:12]}...; restore the file"
        )
    if wrong is not None:
        raise wrong
    raise NotFoundError(
        f"{path}: the weights of trial {trial} are not there; set MOENAS_RUNS to the folder"
        " that holds them"
    )
