"""The tests that need a GPU, run where there is one; without, they are only collected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from gpu.card import GPU
from gpu.report import Report

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def files() -> list[str]:
    """Return the test files that hold a test marked `gpu`."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in found if "mark.gpu" in p.read_text(encoding="utf-8")]


def measure(report: Report) -> None:
    """Run them in a process of their own; each outcome counts as it comes."""
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--color=no"]
    options += ["-v"] if GPU else ["--collect-only", "-q"]
    line = [sys.executable, "-m", "pytest", *options, *files()]
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    collected = 0
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            report.note(text.rstrip())
            collected += text.startswith("tests/") and "::" in text
            if (found := LINE.match(text)) and found[2] in counts:
                counts[found[2]] += 1
                report.figure(found[1], found[2] == "PASSED")
    if GPU:
        report.figure("passed", counts["PASSED"], "tests")
        report.figure("failed", counts["FAILED"] + counts["ERROR"], "tests")
        report.figure("skipped", counts["SKIPPED"], "tests")
    else:
        report.figure("collected", collected, "tests")
    if process.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {process.returncode}")
