"""Where the trained weights of a trial lie; they are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from hashlib import file_digest
from pathlib import Path

from moenas.errors import InputError, MachineError, NotFoundError
from moenas.failures import error_line
from moenas.processes import machine
from moenas.records import Plain, WeightsFile
from moenas.resources import sha256
from moenas.store.files import (
    Root,
    make_folder,
    matching,
    path_at,
    remove_file,
    sync_folder,
    write_whole,
)
from moenas.store.object_path import ObjectPath, StorePath

FILE = "model.safetensors"
_DRAFT = f".{FILE}."
"""How the name of a file begins that is not whole yet, or has not its name yet."""
SLUG = 40
"""Characters of a study's name that its folder keeps; a digest tells equal beginnings apart."""


def weights_path(runs: StorePath, study: str, trial: int) -> StorePath:
    """Return `runs/<study>/<trial>/model.safetensors`, always inside `runs`.

    The study's folder is its name in lower-case letters, digits and hyphens, and ten digits of the
    name's digest. So no name can leave `runs`, and no two names share a folder.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")[:SLUG].strip("-") or "study"
    digest = sha256(study.encode("utf-8", "surrogatepass"))
    return runs / f"{slug}-{digest[:10]}" / str(int(trial)) / FILE


def study_folder(runs: StorePath, study: str) -> StorePath:
    """Return the folder of a study's files."""
    return weights_path(runs, study, 0).parents[1]


def is_shared(runs: StorePath) -> bool:
    """Say whether every node reads and writes a root by itself, as a URL named it."""
    return isinstance(runs, ObjectPath) or (isinstance(runs, Root) and runs.shared)


def write_weights(runs: StorePath, study: str, trial: int, data: bytes) -> str:
    """Write the weights of a trial and return their SHA-256.

    A reader finds the old file, or the new one, or none; never a part of one. The bytes are on
    the disk before the name is. Raises OSError if the disk refuses.
    """
    write_whole(weights_path(runs, study, trial), data)
    return sha256(data)


# --- written by a worker -------------------------------------------------------------------------


def place(runs: StorePath, study: str, trial: int) -> Plain | None:
    """Return what a worker needs to write the weights of a trial itself, for `Job.weights_to`.

    Into a folder it can if it runs on this machine, as this user, and sees this folder. None if
    the folder cannot be made: the weights then come with the result. Below a URL every worker
    writes by itself.
    """
    target = weights_path(runs, study, trial)
    if isinstance(target, ObjectPath):
        return {"path": str(target), "shared": True}
    path = Path(os.path.abspath(target))
    folder = path.parents[1]
    try:
        make_folder(folder)
        folder_stat = folder.stat()
    except OSError:
        return None
    if is_shared(runs):
        return {"path": str(path), "shared": True}
    if not machine():
        return None
    inode = [folder_stat.st_dev, folder_stat.st_ino]
    return {"path": str(path), "machine": machine(), "user": os.getuid(), "inode": inode}


def write_draft(to: Plain, write: Callable[[str], object]) -> WeightsFile | None:
    """Let `write` fill a draft beside the weights of a trial; return it once it is on the disk.

    None if this process does not share the driver's file system, or cannot write there.

    Raises:
        MachineError: if the root is a URL, and this process cannot write there.
    """
    target = path_at(to["path"])
    shared = bool(to.get("shared"))
    try:
        if isinstance(target, ObjectPath):
            return _upload_draft(target, write)
        folder_stat = target.parents[1].stat()
        here = [machine(), os.getuid(), [folder_stat.st_dev, folder_stat.st_ino]]
        if not shared and here != [to["machine"], to["user"], to["inode"]]:
            return None
        return _write_draft(target, write)
    except Exception as error:  # safetensors has errors of its own for a full disk
        if shared:
            raise MachineError(
                f"node {os.uname().nodename}: {target}: the weights cannot be written:"
                f" {error_line(error)}; every node needs access to the root of the weights"
            ) from error
        return None


def _write_draft(target: Path, write: Callable[[str], object]) -> WeightsFile:
    """Let `write` fill a file beside `target`; nothing is left of it after an exception."""
    target.parent.mkdir(exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=_DRAFT)
    os.close(handle)
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
            digest = file_digest(file, "sha256").hexdigest()
            return WeightsFile(part, file.tell(), digest)
    except BaseException:
        remove_draft(part)
        raise


def _upload_draft(target: ObjectPath, write: Callable[[str], object]) -> WeightsFile:
    """Let `write` fill a local file, and write it as an object beside `target`."""
    with tempfile.TemporaryDirectory(prefix="moenas-") as folder:
        part = os.path.join(folder, FILE)
        write(part)
        with open(part, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            size = file.tell()
        draft = target.with_name(f"{_DRAFT}{secrets.token_hex(8)}")
        draft.upload(part)
    return WeightsFile(str(draft), size, digest)


def stored_at(path: StorePath, digest: str) -> Plain:
    """Return what a worker needs to read a file of a shared root by itself."""
    return {"path": str(path), "sha256": digest}


def read_stored(at: Plain) -> bytes:
    """Return the file that `stored_at` names; it must have the SHA-256 that is named.

    Raises:
        MachineError: if it cannot be read here, or is another file.
    """
    where = f"node {os.uname().nodename}: {at['path']}"
    try:
        data = path_at(at["path"]).read_bytes()
    except OSError as error:
        raise MachineError(
            f"{where}: cannot be read: {error.strerror}; every node needs access to the root of"
            " the weights"
        ) from error
    if (digest := sha256(data)) != at["sha256"]:
        raise MachineError(f"{where}: its SHA-256 is {digest[:12]}..., not {at['sha256'][:12]}...")
    return data


def for_job(runs: StorePath, study: str, trial: int, digest: str) -> Plain:
    """Return the fields of a job that measures the stored weights of a trial.

    Raises:
        InputError: as `read_weights` does.
    """
    if is_shared(runs):
        return {"weights_at": stored_at(find_weights(runs, study, trial, digest), digest)}
    return {"weights": read_weights(runs, study, trial, digest)}


def is_draft(file: WeightsFile, to: Plain | None) -> bool:
    """Say whether a file is one that `write_draft` makes for a job with this `weights_to`."""
    path = path_at(file.path)
    return (
        to is not None
        and path.parent == path_at(to["path"]).parent
        and path.name.startswith(_DRAFT)
        and (isinstance(path, ObjectPath) or os.path.normpath(path) == file.path)
    )


def adopt_draft(path: StorePath, file: WeightsFile) -> str:
    """Give a draft its name in the folder of its trial, and return its SHA-256.

    Raises OSError if it is not there as the worker described it, or the disk refuses.
    """
    draft = path_at(file.path)
    if isinstance(draft, ObjectPath):
        whole = draft.size() == file.size
    else:
        file_stat = os.lstat(draft)
        whole = stat.S_ISREG(file_stat.st_mode) and file_stat.st_size == file.size
    if not whole:
        raise OSError(errno.EIO, f"not the {file.size} bytes that were written", file.path)
    if isinstance(draft, ObjectPath):
        assert isinstance(path, ObjectPath)
        draft.replace(path)
        return file.sha256
    os.replace(draft, Path(str(path)))
    for folder in path.parents[:2]:  # the worker may have made the trial's
        sync_folder(folder)
    return file.sha256


def remove_draft(path: str) -> None:
    """Remove a draft, and the folder of its trial if nothing else is there."""
    remove_file(path_at(path))


def remove_drafts(runs: StorePath, study: str, trial: int, but: WeightsFile | None = None) -> None:
    """Remove what workers have left of a trial that none of them works on, but for one file."""
    with contextlib.suppress(OSError):
        for draft in weights_path(runs, study, trial).parent.glob(f"{_DRAFT}*"):
            if but is None or draft.name != path_at(but.path).name:
                remove_file(draft)


# --- copied, found, read -------------------------------------------------------------------------


def copy_weights(
    runs: StorePath, study: str, source: int, trial: int, digest: str, *, of: str | None = None
) -> None:
    """Give a trial the weights of another one, which must have this SHA-256.

    The other trial is one of the study `of`, or of the same study.

    They are one file under two names, or two files where the file system has no hard links. A
    reader may read while `write_weights` works: that replaces one name alone. Raises OSError if the
    disk refuses.

    Raises:
        InputError: as `read_weights` does.
    """
    there, data = _found(runs, of or study, source, digest)
    path = weights_path(runs, study, trial)
    if isinstance(path, ObjectPath):
        if isinstance(there, ObjectPath) and there.protocol == path.protocol:
            there.copy(path)
        else:
            path.write_bytes(data)
        return
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_DRAFT) as draft:
        part = Path(draft, FILE)
        try:
            if isinstance(there, ObjectPath):
                raise OSError(errno.EXDEV, "another file system")
            os.link(there, part)
        except OSError:
            write_weights(runs, study, trial, data)
            return
        # rename(2) leaves `part` if both names are one file already; it goes with the draft.
        os.replace(part, path)
    sync_folder(path.parent)


def sweep(runs: StorePath, study: str) -> None:
    """Remove what a killed process of this study left half written; no other one may run it.

    Raises:
        StorageLostError: if an object store cannot be reached.
    """
    for draft in matching(study_folder(runs, study), f"*/{_DRAFT}*"):
        if isinstance(draft, Path) and draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            remove_file(draft)


def read_weights(runs: StorePath, study: str, trial: int, digest: str) -> bytes:
    """Return the weights of a trial, which must have this SHA-256.

    Raises:
        NotFoundError: if there are none.
        InputError: if they are not the ones that were stored, or cannot be read.
    """
    return _found(runs, study, trial, digest)[1]


def find_weights(runs: StorePath, study: str, trial: int, digest: str) -> StorePath:
    """Return where the weights of a trial lie, which must have this SHA-256.

    Raises:
        NotFoundError: if there are none.
        InputError: if they are not the ones that were stored, or cannot be read.
    """
    return _found(runs, study, trial, digest)[0]


def missing_weights(runs: StorePath, study: str, trials: Iterable[int]) -> list[int]:
    """Return the trials without a file of weights; digests are not compared.

    An object store is asked for one listing, and not for each trial.
    """
    roots = [runs, *getattr(runs, "older", ())]
    missing = list(trials)
    for root in roots:
        if not missing:
            break
        if isinstance(root, ObjectPath):
            files = matching(study_folder(root, study), f"*/{FILE}")
            stored = {path.parent.name for path in files}
            missing = [trial for trial in missing if str(trial) not in stored]
        else:
            missing = [t for t in missing if not weights_path(root, study, t).is_file()]
    return missing


def _found(runs: StorePath, study: str, trial: int, digest: str) -> tuple[StorePath, bytes]:
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
        " or URL that holds them"
    )
