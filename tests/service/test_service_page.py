"""The page of the service: its commands, run again, print what the page shows, but for numbers."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")


def masked(lines: list[str]) -> list[str]:
    """Lines without numbers and digests, which differ on another machine."""
    kept = []
    for line in lines:
        line = re.sub(r"\b[0-9a-f]{16}\b", "DIGEST", line)
        line = re.sub(r"-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?", "N", line)
        kept.append(re.sub(r"N(, N)+", "N", line))
    return kept


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_commands_of_the_page_print_what_it_shows(tmp_path: Path) -> None:
    page = runpy.run_path(str(ROOT / "benchmarks" / "service_page.py"))
    block = re.search(r"^```\n(\$ .*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert masked(page["transcript"](PAGE, tmp_path)) == masked(block[1].splitlines())


def test_the_readme_shows_lines_of_the_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## As a service\n\n```\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [line.partition("  #")[0].rstrip() for line in block[1].splitlines()]
    assert set(lines) - {"..."} <= set(PAGE.splitlines())
