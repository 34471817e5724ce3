"""Random draws of a space at constant active parameters, with a `fit` and without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moenas import Space

FILE = Path(__file__).parents[2] / "spaces" / "granularity.yaml"
FIT = "{fit: {active_params: 2e6, within: 0.02}}"
"""The fit in FILE."""
HOLE, BOUNDS = "{int: [16, 2048]}", "active_params >= 1.96e6, active_params <= 2.04e6"
"""What takes its place: a hole, and requirements that accept the same architectures."""
DENSE = "          - {kind: dense, d_ff: 1112}\n"
"""The dense control in FILE, which has no width of experts."""
N_DRAWS = 2000


def replaced(text: str, before: str, after: str) -> str:
    """Return a text with its one `before` replaced.

    Raises:
        ValueError: if it is not there exactly once.
    """
    first, last = text.split(before)
    return first + after + last


def share_feasible(text: str) -> float:
    """Return the share of random draws of a space file that are feasible."""
    drawn = list(Space.parse(text, FILE.name).feasible(N_DRAWS))
    return sum(not isinstance(architecture, str) for architecture in drawn) / len(drawn)


def lines() -> Iterator[str]:
    """Yield the lines of the page on draws with a fit and without it."""
    text = replaced(FILE.read_text(encoding="utf-8"), DENSE, "")
    free = replaced(replaced(text, FIT, HOLE), "require: [", f"require: [{BOUNDS}, ")
    yield "## Draws at constant active parameters"
    yield ""
    yield f"Feasible ones of {N_DRAWS:,} random draws of `spaces/{FILE.name}` without its dense"
    yield "control. Its mixtures have 2 million active parameters within 2 %. Infeasible draws are"
    yield "not trained."
    yield ""
    yield "| width of the experts | feasible |"
    yield "| --- | --- |"
    yield f"| `{FIT}` | {share_feasible(text):.1%} |"
    yield f"| `{HOLE}`, `require: [{BOUNDS}]` | {share_feasible(free):.1%} |"
    yield ""
