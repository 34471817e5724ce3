"""Runs the command line of moenas with a fault at a chosen step of its writes.

`python failpoints.py ARGUMENTS...` is `moenas ARGUMENTS...`. The environment says what happens:

CHAOS_FAULT=kill:commit:7:after   the process kills itself after its 7th commit
CHAOS_FAULT=enospc:replace:2      the 2nd os.replace raises "No space left on device"
CHAOS_COUNT=FILE                  how often each point was passed is written there at the end
CHAOS_PAGES=N                     SQLite's files may have at most N pages: the disk is full
"""

from __future__ import annotations

import atexit
import errno
import functools
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moenas.__main__ import main

POINTS = ("commit", "fsync", "replace", "link", "unlink")
passed: Counter[str] = Counter()


def act(kind: str) -> None:
    """Let the fault happen."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def watched(point: str, function: Callable[..., Any], fault: list[str]) -> Callable[..., Any]:
    """Count the calls of a function, and let the fault happen at the chosen one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        passed[point] += 1
        kind, where, number, when = fault
        due = where == point and passed[point] == int(number)
        if due and when == "before":
            act(kind)
        returned = function(*args, **kwargs)
        if due and when == "after":
            act(kind)
        return returned

    return call


def install() -> None:
    """Watch the steps that bring data to the disk."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    from sqlalchemy.engine.default import DefaultDialect

    fault = [*os.environ.get("CHAOS_FAULT", "none::0:").split(":"), "before"][:4]
    for point in POINTS[1:]:
        setattr(os, point, watched(point, getattr(os, point), fault))
    DefaultDialect.do_commit = watched("commit", DefaultDialect.do_commit, fault)  # type: ignore[method-assign]
    if pages := os.environ.get("CHAOS_PAGES"):

        @event.listens_for(Engine, "connect")
        def limit(connection: Any, _: Any) -> None:
            connection.execute(f"PRAGMA max_page_count = {int(pages)}")

    if count := os.environ.get("CHAOS_COUNT"):
        atexit.register(lambda: Path(count).write_text(json.dumps(passed)))


if __name__ == "__main__":
    sys.argv[0] = "moenas"
    main(install)
