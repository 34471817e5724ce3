"""Processes are found below another, told apart from later ones of their number, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moenas.processes import (
    children,
    descendants,
    is_gone,
    kernel_kills,
    kill_descendants,
    kill_marked,
    machine,
    memory_bytes,
    process_start,
    resident_bytes,
    state,
)

NEST = """
import os, subprocess, sys, time
from moenas.processes import adopt_orphans
adopt_orphans()
subprocess.Popen(["sh", "-c", "setsid sleep 600 & sleep 600"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
print("ready", flush=True)
time.sleep(600)
"""


def test_all_below_a_process_is_found_and_ended() -> None:
    top = subprocess.Popen([sys.executable, "-c", NEST], stdout=subprocess.PIPE, text=True)
    try:
        assert top.stdout is not None
        assert top.stdout.readline() == "ready\n"
        end = time.monotonic() + 10
        while len(below := descendants(top.pid)) < 4 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(below) == 4  # sh, its two, and the daemon whose parent has ended
        assert len(children(top.pid)) == 2
        assert resident_bytes(top.pid) > resident_bytes(below[0]) > 0
        kill_descendants(top.pid)
        assert not any(state(pid) for pid in below)
        assert state(top.pid)
    finally:
        top.kill()
        top.communicate()


def test_a_process_is_known_by_its_start() -> None:
    process = subprocess.Popen(["sleep", "600"])
    began = process_start(process.pid)
    assert began is not None
    assert not is_gone(process.pid, began, 0.0)
    assert is_gone(process.pid, "another start", 0.0)
    process.send_signal(signal.SIGSTOP)
    end = time.monotonic() + 10
    while state(process.pid) != "T":
        assert time.monotonic() < end
    process.kill()
    assert is_gone(process.pid, began, 10.0)
    assert process_start(process.pid) is None  # a zombie does not live
    process.wait()
    assert state(process.pid) == ""


def test_what_is_marked_is_ended(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    by_line = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", mark])
    by_environment = subprocess.Popen(["sleep", "600"], env={**os.environ, "MARK": mark})
    other = subprocess.Popen(["sleep", "600"])
    time.sleep(0.2)
    kill_marked(mark)
    assert by_line.wait(10) == by_environment.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


def test_the_machine_is_known() -> None:
    assert machine().count("/") == 1
    assert 2**28 < memory_bytes() < 2**50
    assert kernel_kills() >= 0
