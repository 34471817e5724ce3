"""The page docs/gpu.md: what is measured on a GPU, how, and the results of each card."""

from __future__ import annotations

from collections.abc import Iterator

from gpu.figures import FIGURES, GROUPS, SOURCES
from gpu.report import Value, shown
from gpu.results import Results

HEAD = """\
# On a GPU

{status}

`make gpu` measures all of this on a machine with an NVIDIA GPU, in eight minutes, and writes this
page. For a machine without a network, `make gpu-prepare` elsewhere puts wheels into `.gpu/`, and
`bash benchmarks/gpu/run.sh` there installs them and runs the same. Each group is a process of its
own with a time limit; what a group has found until then is kept. `python benchmarks/gpu/run.py`
takes `--only NAMES` for some groups and `--budget SECONDS` for another limit in all. Results lie in
`benchmarks/results/gpu-<card>.json`, and in `$OUT` too if that is set. A file brought from another
machine goes into that folder. `make docs` draws this page from all of them. Without a GPU the
command runs dry: on tiny sizes, whose figures mean nothing.
"""
NO_CARD = "No GPU was available yet. This page has no measured numbers."
DRY = "This was a dry run on a CPU without a GPU. Its numbers only show that the benchmark runs."
TEXT_WIDTH = 90


def page(all_results: list[Results]) -> str:
    """Return the page for the cards that were measured, for a dry run, or for none."""
    cards = [results for results in all_results if results.card]
    status = DRY if all_results and not cards else NO_CARD
    if cards:
        status = f"Measured on {', '.join(str(results.card) for results in cards)}."
    parts = [HEAD.format(status=status), "## What is measured\n", *groups(), ""]
    if not cards:
        parts += ["## What is expected\n", *expectations(), ""]
    for results in all_results:
        parts += section(results)
    parts += ["## Where expectations come from\n"]
    parts += [f"- {name}: {text}." for name, text in SOURCES.items()]
    return "\n".join(parts) + "\n"


def groups() -> Iterator[str]:
    """Write the table of groups."""
    yield "| group | what | seconds | limit |"
    yield "| --- | --- | --: | --: |"
    for group in GROUPS:
        turns = f"{group.turns} x " if group.turns > 1 else ""
        yield f"| {group.name} | {group.about} | {turns}{group.seconds} | {turns}{group.limit} |"


def expectations() -> Iterator[str]:
    """Write the table of what is expected, before there is anything to set against it."""
    yield "| figure | expected | goal | unit | source |"
    yield "| --- | --- | --- | --- | --- |"
    for f in FIGURES:
        cells = [f.name, f.expectation(), f.wish(), f.unit, f.source]
        yield f"| {' | '.join(cells)} |"


def section(results: Results) -> list[str]:
    """Write the results of one card: goals, then groups that did not end well, then all figures."""
    machine = results.machine
    name = results.card or "No GPU"
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("card", "date"))
    parts = [f"## {name}\n", f"{machine.get('date', 'no date')}: {versions}.\n"]
    judged = [met for _, _, met in results.judged() if met is not None]
    if judged:
        parts.append(f"{sum(judged)} of {len(judged)} goals are met.\n")
    parts += [*goals(results), ""]
    bad = [
        line
        for group, group_results in results.groups.items()
        for line in trouble(group, group_results.status, group_results.failures)
    ]
    if bad:
        parts += ["### What did not end well\n", *bad, ""]
    return [*parts, "### All figures\n", *figures(results), ""]


def goals(results: Results) -> Iterator[str]:
    """Write the table of figures with something to compare them to."""
    yield "| figure | measured | expected | goal | unit | met | source |"
    yield "| --- | --: | --- | --- | --- | --- | --- |"
    for figure, value, met in results.judged():
        measured = "not measured" if value is None else shown(value)
        cells = [figure.name, measured, figure.expectation(), figure.wish(), figure.unit]
        yield f"| {' | '.join([*cells, word(met), figure.source])} |"


def word(met: bool | None) -> str:
    """Write whether a goal is met."""
    return "" if met is None else shown(met)


def trouble(group: str, status: str, failures: list[str]) -> Iterator[str]:
    """Write a line for each thing that went wrong in a group."""
    if status != "done":
        yield f"- {group}: {status}."
    for failure in failures:
        yield f"- {group}: {one_line(failure)}"


def figures(results: Results) -> Iterator[str]:
    """Write the table of all figures."""
    yield "| figure | measured | unit | |"
    yield "| --- | --: | --- | --- |"
    for group_results in results.groups.values():
        for name, row in group_results.figures.items():
            cells = [name, all_values(row["values"]), row["unit"], one_line(row["text"])]
            yield f"| {' | '.join(cells)} |"


def all_values(values: list[Value]) -> str:
    """Write one value, or the values of several processes."""
    return ", ".join(shown(value) for value in values)


def one_line(text: str) -> str:
    """Write a text so that it fits a cell of a table."""
    flat = " ".join(text.split()).replace("|", "/")
    return flat.encode("ascii", "replace").decode()[:TEXT_WIDTH]


def summary(results: Results) -> Iterator[str]:
    """Write the table that a run ends with, as plain text."""
    rows = [("figure", "measured", "expected", "goal", "met")]
    for figure, value, met in results.judged():
        measured = "-" if value is None else f"{shown(value)} {figure.unit}".rstrip()
        rows.append((figure.name, measured, figure.expectation(), figure.wish(), word(met) or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    judged = [met for _, _, met in results.judged() if met is not None]
    yield f"{sum(judged)} of {len(judged)} goals met"
