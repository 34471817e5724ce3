"""The process above a Ray cluster of one run: it starts Ray, and ends all of it with the run.

It is started by `ray_cluster.Head` in a session of its own. Whatever Ray and its workers start is
below it, orphans too. It ends everything once its standard input is closed, which the kernel does
when the run's process dies, by whatever signal.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from moenas.processes import adopt_orphans, children, kill, kill_descendants, reap

LOOK = 0.5
"""Seconds between looks for orphans of dead workers."""
VITAL = ("gcs_server", "raylet")
"""Programs without which a cluster is lost."""
TOUCH = 60.0
"""Seconds between signs of use of the folder."""


def main() -> NoReturn:
    """Start Ray as the first line of standard input says, and hold it until the input ends."""
    settings = json.loads(sys.stdin.readline())
    folder = Path(settings["folder"])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no part of the answer
    adopt_orphans()
    threading.Thread(target=_wait_for_the_end, args=(folder,), daemon=True).start()
    held = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_SH)  # systemd-tmpfiles leaves a folder that is locked
    answer = _start(settings)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _end(folder))
    own = set(children(os.getpid()))
    print(json.dumps(answer), file=out, flush=True)
    touched = 0.0
    while True:
        for pid in set(children(os.getpid())) - own:
            # Ray starts no more processes here: this one was a dead worker's.
            kill_descendants(pid)
            kill(pid)
            reap(pid)
        if time.monotonic() > touched + TOUCH:
            touched = time.monotonic()
            with suppress(OSError):
                os.utime(folder)
        time.sleep(LOOK)


def _start(settings: dict[str, Any]) -> dict[str, Any]:
    """Start Ray; return its address, its session's folder and its processes."""
    import ray

    try:
        context: Any = ray.init(
            address="local",
            num_cpus=settings["cpus"],
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(Path(settings["folder"]) / "ray"),  # Ray opens this one to everybody
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
    address_info = context.address_info
    return {
        "address": address_info["gcs_address"],
        "session": address_info["session_dir"],
        "pids": {n: pid for pid in children(os.getpid()) if (n := _program(pid)) in VITAL},
    }


def _program(pid: int) -> str:
    """Return the name of a process' program."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return str(pid)


def _wait_for_the_end(folder: Path) -> None:
    """End everything once the run's process closes its end of the pipe, or is dead."""
    with suppress(OSError, ValueError):
        while os.read(0, 1024):
            pass
    _end(folder)


def _end(folder: Path) -> NoReturn:
    """Kill what is below this process, remove the folder, and end."""
    kill_descendants(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
