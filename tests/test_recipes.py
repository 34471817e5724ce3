"""Every recipe of docs/recipes.md runs, and its commands print what the page shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
RECIPES = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))
TEXTS = RECIPES["recipes"](RECIPES["PAGE"].read_text(encoding="utf-8"))
UNSURE = re.compile(r"^( ?trials # and # differ|next:| moenas |\[#/#\]| # of # differences)")
"""Lines that depend on which candidates are better, which rounding decides, or on the time left."""

REFUSED = re.compile(
    r"trial # infeasible: breaks (.*) \| \1: \S+ is predicted to be # \S+ \(# to #\)"
)
"""A candidate that a prediction refuses, in a line without numbers."""
LATENCY = "A limit on the latency, checked before the training"


def refusals(lines: list[str]) -> set[str]:
    """Return what lines without numbers say of candidates that a prediction refuses."""
    return {match.group() for line in lines if (match := REFUSED.search(line))}


def without_numbers(line: str) -> str:
    """Return a line whose numbers, spaces, rules and device are one sign each."""
    line = re.sub(r"^(measured on) .*", r"\1 #", line)
    line = re.sub(
        r"^(decode_ms on|  by the calibration of \S+ on) .* \(decode,", r"\1 # (decode,", line
    )
    line = re.sub(r"[0-9][0-9.,e]*[kMGT]?(e[+-]?[0-9]+)?", "#", line)
    return re.sub(r" +", " ", re.sub(r"-{3,}", "---", line)).rstrip()


@pytest.mark.parametrize(
    "title",
    [
        title if title.startswith("Is this") else pytest.param(title, marks=pytest.mark.slow)
        for title in TEXTS
    ],
)
def test_a_recipe_prints_what_the_page_shows(title: str, tmp_path: Path) -> None:
    RECIPES["write_files"](TEXTS[title], tmp_path)
    shown = list(RECIPES["commands"](TEXTS[title]))
    assert shown
    for command, lines in shown:
        new = [without_numbers(line) for line in RECIPES["printed"](command, tmp_path)]
        wanted = [without_numbers(line) for line in lines]
        missing = [line for line in wanted if line not in new and not UNSURE.match(line)]
        assert missing == [], f"{command}: python benchmarks/recipes.py\n" + "\n".join(new)
        assert refusals(new) == refusals(wanted), command


def test_the_page_has_outputs() -> None:
    for title, recipe in TEXTS.items():
        outputs = [lines for command, lines in RECIPES["commands"](recipe) if "moenas" in command]
        assert all(outputs), f"{title}: python benchmarks/recipes.py"


def test_the_recipe_with_a_bound_on_a_latency_shows_refusals_by_prediction() -> None:
    shown = [lines for command, lines in RECIPES["commands"](TEXTS[LATENCY]) if " run " in command]
    assert refusals([without_numbers(line) for lines in shown for line in lines]) == {
        "trial # infeasible: breaks decode_ms < # | decode_ms < #: decode_ms is predicted to be #"
        " ms/step (# to #)"
    }
