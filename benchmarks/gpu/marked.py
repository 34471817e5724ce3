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
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in paths if "mark.gpu" in p.read_text(encoding="utf-8")]


def measure(report: Report) -> None:
    """Run them in a process of their own; each outcome counts as it comes.

    Warnings are errors, as in every run of the tests. What fails runs again with warnings let
    through, which tells a warning of another torch from a wrong number.
    """
    if not GPU:
        code, lines = pytest_run(report, ["--collect-only", "-q", *files()[:1]])
        collected = sum(line.startswith("tests/") and "::" in line for line in lines)
        report.figure("collected", collected, "tests")
        require_run(code)
        return
    code, lines = pytest_run(report, ["-v", *files()])
    outcomes = {matched[1]: matched[2] for line in lines if (matched := LINE.match(line))}
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    report.figure("passed", sum(x == "PASSED" for x in outcomes.values()), "tests")
    report.figure("failed", len(failed), "tests", ", ".join(failed))
    report.figure("skipped", sum(x == "SKIPPED" for x in outcomes.values()), "tests")
    if failed:
        _, lines = pytest_run(report, ["-v", "-W", "default", *failed])
        again = [matched[2] for line in lines if (matched := LINE.match(line))]
        wrong = len(failed) - again.count("PASSED")
        report.figure("failed, warnings aside", wrong, "tests")
    require_run(code)


def pytest_run(report: Report, options: list[str]) -> tuple[int, list[str]]:
    """Run pytest in the root of the repository; return its exit code and output."""
    fixed = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--color=no"]
    line = [sys.executable, "-m", "pytest", *fixed, *options]
    lines = []
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            lines.append(text.rstrip())
            report.note(lines[-1])
            if (matched := LINE.match(text)) and GPU:
                report.figure(matched[1], matched[2] == "PASSED")
    return process.returncode, lines


def require_run(code: int) -> None:
    """Raise if pytest could not run the tests: 0 and 1 say that it did."""
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}")
