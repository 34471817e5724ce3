"""Processes of this machine: which one lives, its children, and how all of them are ended."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
_PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphans among the descendants of a process become its children."""


def machine() -> str:
    """Name the boot and the process namespace of this host; empty where neither is known."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name: state, parent ...; [] if it is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def state(pid: int) -> str:
    """Return the letter of a process' state (man 5 proc): T is stopped; empty if it is dead."""
    fields = _fields(pid)
    return "" if not fields or fields[0] in "ZX" else fields[0]


def process_start(pid: int) -> str | None:
    """Return when a process of this machine began, in ticks since the boot; None if it is dead."""
    fields = _fields(pid)
    return None if not fields or fields[0] in "ZX" else fields[19]


def children(pid: int) -> list[int]:
    """Return the processes whose parent is a process of this machine."""
    tasks = PROC / str(pid) / "task"
    try:
        files = [task / "children" for task in tasks.iterdir()]
        return [int(one) for file in files for one in file.read_text().split()]
    except OSError:  # a thread has just ended, or the kernel has no such file
        pids = [int(path.name) for path in PROC.iterdir() if path.name.isdigit()]
        return [one for one in pids if (fields := _fields(one)) and int(fields[1]) == pid]


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, those that they started, and so on."""
    children: dict[int, list[int]] = {}
    for path in PROC.iterdir():
        if path.name.isdigit() and (fields := _fields(int(path.name))):
            children.setdefault(int(fields[1]), []).append(int(path.name))
    pids, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        pids += below
        waiting += below
    return pids


def adopt_orphans() -> None:
    """Make this process the parent of every orphan among its descendants; Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill(pid: int) -> None:
    """Send SIGKILL; a process that is gone or another user's is left."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def reap(pid: int) -> None:
    """Free the entry of a dead child of this process."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def kill_descendants(pid: int, spare: Collection[int] = (), timeout: float = 5.0) -> None:
    """Kill everything below a process, but for `spare`, until nothing is left."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        left = [p for p in descendants(pid) if p not in spare]
        for one in left:
            kill(one)
            reap(one)
        if not [p for p in left if state(p)]:
            return
        time.sleep(0.01)


def is_gone(pid: int, began: str | None, timeout: float) -> bool:
    """Wait until a process is dead; say whether it is."""
    end = time.monotonic() + timeout
    while process_start(pid) == began:
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def kill_marked(mark: str) -> None:
    """Kill this user's processes that have a text in their command line or first environment."""
    for path in PROC.iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        for file in ("cmdline", "environ"):
            with suppress(OSError):
                if mark.encode() in (path / file).read_bytes():
                    kill(int(path.name))
                    break


def resident_bytes(pid: int) -> int:
    """Return the memory that a process and its descendants hold, shared pages included."""
    pages = 0
    for one in [pid, *descendants(pid)]:
        with suppress(OSError, ValueError, IndexError):
            pages += int((PROC / str(one) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_bytes() -> int:
    """Return the memory of this machine or of its control group, whichever is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total


def kernel_kills() -> int:
    """Return how many processes the kernel has ended since the boot as memory ran out."""
    with suppress(OSError, ValueError, IndexError):
        for line in (PROC / "vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
