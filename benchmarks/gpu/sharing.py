"""Several candidates on one GPU, each a process, as on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from gpu.card import release, sized
from gpu.report import Report

HERE = Path(__file__).resolve().parent
READY_S = 60.0
"""How long a process may take until it can begin."""


def measure(report: Report) -> None:
    """Compare four at a time with one, at 2k tokens a step and at 16k."""
    cases = (("graph", 128), ("eager", 128), ("graph", 1024))
    for how, context in sized(cases, cases[:1]):
        name = f"{how}, {16 * context // 1024}k tokens"
        with report.part(f"processes, {name}"):
            processes(report, name, how, context)
        release()


def processes(report: Report, name: str, how: str, context: int) -> None:
    """Let one of four processes train, then all; report the steps a second of all together."""
    line = [sys.executable, str(HERE / "sharing_worker.py"), how, str(context)]
    started = [
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(sized(4, 2))
    ]
    watch = threading.Timer(READY_S, end_all, [started])
    watch.start()
    try:
        for process in started:
            answer(process)  # ready
        one = rate(started[:1])
        report.figure(f"1 process, {name}", one, "steps/s")
        together = rate(started)
        report.figure(f"4 processes, {name}", together, "steps/s")
        report.figure(f"4 processes over 1, {name}", together / one)
    finally:
        watch.cancel()
        end_all(started)
        for process in started:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def rate(started: list[subprocess.Popen[str]]) -> float:
    """Let processes train at one time, and return the steps a second of all together."""
    for process in started:
        assert process.stdin is not None
        process.stdin.write(f"{sized(3.0, 0.3)}\n")
        process.stdin.flush()
    return sum(float(answer(process)["rate"]) for process in started)


def end_all(started: list[subprocess.Popen[str]]) -> None:
    """End processes, so that nobody waits for what they would say."""
    for process in started:
        process.kill()


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Read the next line that a process sends as JSON.

    Raises:
        RuntimeError: if it ends before.
    """
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            reply: dict[str, Any] = json.loads(line)
            return reply
    raise RuntimeError(f"a process ended with {process.wait()}, or was not ready in {READY_S:g} s")
