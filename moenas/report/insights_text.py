"""The report on a study as text, for `moenas report`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moenas.grammar.summary import compact
from moenas.predict.level_effects import MIN_CANDIDATES
from moenas.records import Plain
from moenas.report.seed_report import seed_lines
from moenas.report.summary import table


def insights_text(report: Plain) -> str:
    """Lay out the insights of a study for a terminal."""
    return "\n".join(_lines(report))


def _lines(report: Plain) -> Iterator[str]:
    counts = ", ".join(f"{count} {status}" for status, count in report["evaluations"].items())
    yield f"{report['study']}: {counts or 'no candidate is finished'}"
    yield from _space_lines(report["space"], report["requirements"])
    if report["front"]:
        yield from ("", "How the front grew", table(report["front"]))
    if report["rungs"]:
        yield from ("", "Agreement of the losses at each rung with the final ones")
        yield "correlation: Spearman's, over the pairs of candidates that have both losses"
        yield table(report["rungs"])
    if report["seeds"] is not None:
        yield from ("", "Noise between seeds", *seed_lines(report["seeds"]))
    for name, objective in report["objectives"].items():
        yield from ("", f"Importance of each hole for {name}")
        yield "ped_anova: Optuna's, as shares; surrogate: deviation while the hole alone varies"
        yield table(objective["importance"])
        if objective["effects"]:
            yield from ("", f"Effects on {name} between models of equal active parameters")
            yield "effect: adjusted mean minus the mean of all, with its 95 % confidence interval"
            yield table([_effect_row(effect) for effect in objective["effects"]])
    if not report["objectives"]:
        yield from ("", f"Importances and effects need {MIN_CANDIDATES} complete candidates.")


def _space_lines(space: Plain, requirements: list[Plain]) -> Iterator[str]:
    if space["points"]:
        share = space["share"]
        yield f"drawn: {space['drawn']:,} of {space['points']:,} points, {share:.2%} of the space"
    else:
        yield f"drawn: {space['drawn']:,} different points"
    for row in requirements:
        yield f"broken {row['broken']:,} times: {row['requirement']}"


def _effect_row(effect: Plain) -> dict[str, Any]:
    width = effect["half_width"]
    interval = "" if width is None else f"+- {compact(width)}"
    clear = width is not None and abs(effect["effect"]) > width
    return {
        "hole": effect["hole"],
        "level": effect["level"],
        "n": effect["n"],
        "effect": effect["effect"],
        "interval": interval,
        "clear": "yes" if clear else "",
    }
