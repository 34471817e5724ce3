"""Folders of this user alone, outside of the user's projects: of Ray's sockets and of locks."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from moenas.errors import MachineError
from moenas.processes import machine, process_start

OWNER = "owner.json"
"""Says which process made a folder."""
FORGOTTEN_S = 86400.0
"""Seconds without a sign of use after which a folder of an earlier boot is removed."""


def roots() -> list[Path]:
    """Return where such folders may lie, best first: the run-time, cache and temporary folder."""
    given = [os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("XDG_CACHE_HOME")]
    folders = [Path(path) for path in given if path]
    if len(folders) < 2 or not given[1]:
        with suppress(RuntimeError):
            folders.append(Path.home() / ".cache")
    with suppress(OSError):
        folders.append(Path(tempfile.gettempdir()))
    return [path for path in dict.fromkeys(folders) if path.is_absolute()]


def is_private(path: Path) -> bool:
    """Whether a path is a folder, no link, of this user, which nobody else may enter."""
    folder_stat = path.lstat()
    return (
        stat.S_ISDIR(folder_stat.st_mode)
        and folder_stat.st_uid == os.getuid()
        and not folder_stat.st_mode & 0o077
    )


def make(prefix: str, longest: int) -> Path:
    """Make a folder with a random name whose path has at most `longest` bytes.

    Raises:
        MachineError: if there is no place for it.
    """
    reasons = []
    for root in roots():
        if len(os.fsencode(root / prefix)) + 8 > longest:
            reasons.append(f"{root}: its path is too long for Ray's sockets")
            continue
        try:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
            owner = {
                "machine": machine(),
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "process_start": process_start(os.getpid()),
            }
            (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
        else:
            return folder
    raise MachineError(
        "no place for a private folder: " + "; ".join(reasons) + "; set XDG_RUNTIME_DIR or TMPDIR"
    )


def sweep(prefix: str) -> None:
    """Remove the folders of `make` whose process is dead; leave what is not surely such a one."""
    for root in roots():
        with suppress(OSError):
            for folder in list(root.glob(f"{prefix}*")):
                with suppress(OSError, ValueError, TypeError, KeyError):
                    named = re.fullmatch(re.escape(prefix) + r"[a-z0-9_]{8}", folder.name)
                    if named and is_private(folder) and _is_left(folder):
                        shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether the process that made a folder is dead."""
    file = folder / OWNER
    if not stat.S_ISREG(file.lstat().st_mode):
        return False
    owner = json.loads(file.read_text(encoding="utf-8")[:4096])
    here = machine()
    if here and owner["machine"] == here:
        return bool(process_start(int(owner["pid"])) != owner["process_start"])
    # Another process namespace of this boot cannot be judged from here; an earlier boot can.
    boot = here.partition("/")[0]
    earlier = bool(boot) and not str(owner["machine"]).startswith(boot)
    same_host = owner["host"] == os.uname().nodename
    return earlier and same_host and time.time() - folder.stat().st_mtime > FORGOTTEN_S
