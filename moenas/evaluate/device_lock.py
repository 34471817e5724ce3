"""The lock of a device: while one process times something there, no other work of ours runs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moenas.errors import MachineError
from moenas.folders import is_private, roots
from moenas.processes import machine


def lock_folders() -> list[Path]:
    """Return where the lock files of this user and boot may lie, best first.

    All processes of a user agree on the first that can be used. The boot is part of the name, for
    a home folder may be shared between machines.
    """
    name = f"moenas-leases-{os.getuid()}-{machine()[:8] or os.uname().nodename}"
    return [root / name for root in roots()]


def _opened(name: str) -> list[int]:
    """Open the two lock files of a device in the first folder that is this user's alone.

    Raises:
        MachineError: saying of each folder why it cannot be used.
    """
    reasons = []
    for folder in lock_folders():
        handles: list[int] = []
        try:
            folder.mkdir(mode=0o700, parents=False, exist_ok=True)
            if not is_private(folder):
                reasons.append(f"{folder}: not a folder of this user alone")
                continue
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            for file in ("gate", "main"):
                handles.append(os.open(folder / f"{name}.{file}", flags, 0o600))
            _require_locks(handles[0])
        except OSError as error:
            for handle in handles:
                os.close(handle)
            reasons.append(f"{folder}: {error.strerror}")
        else:
            return handles
    raise MachineError(
        "no folder for the locks of devices: " + "; ".join(reasons) + "; remove what is there, or"
        " set XDG_RUNTIME_DIR or TMPDIR"
    )


def _require_locks(handle: int) -> None:
    """Raise OSError if the file system knows no flock(2); a lock of another process is none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    fcntl.flock(handle, fcntl.LOCK_UN)


class DeviceLock:
    """Keeps this user's other work off a device of this host while something is timed there.

    Two files are locked with flock(2). Work holds `main` shared for one step. Every step passes the
    `gate` before it takes `main`. A timer holds the `gate`: no new step begins, the running ones
    end, and the timer takes `main`. The kernel releases both when a process dies. The two locks do
    not nest, and one object serves one thread.

    `key` names the device on this host. `synchronize` waits until the device has done all
    that it was given; a step has not ended before.
    """

    def __init__(self, key: str, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._files = _opened(key.replace(":", "-"))

    def close(self) -> None:
        """Close the files, which releases the locks."""
        while self._files:
            os.close(self._files.pop())

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the device together with other work; for one step, not for a whole run."""
        gate, main = self._files
        fcntl.flock(gate, fcntl.LOCK_SH)
        try:
            fcntl.flock(main, fcntl.LOCK_SH)
        finally:
            fcntl.flock(gate, fcntl.LOCK_UN)
        with self._until_synchronized(main):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the current steps of others to end, and hold all others until this ends."""
        gate, main = self._files
        fcntl.flock(gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(main, fcntl.LOCK_EX)
            with self._until_synchronized(main):
                yield
        finally:
            fcntl.flock(gate, fcntl.LOCK_UN)

    @contextmanager
    def _until_synchronized(self, file: int) -> Iterator[None]:
        """Unlock a file at the end, once the device is done."""
        try:
            yield
            if self._synchronize is not None:
                self._synchronize()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
