"""What the groups of a run found, kept as one JSON file for each card."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu.figures import FIGURES, Figure
from gpu.report import Value

SPREAD = "spread of processes"
WITHOUT = "none"
"""Stands in the name of a file for the card, where there is none."""


@dataclass
class Found:
    """The results of one group."""

    status: str
    """done; failed, where a part raised an error; crashed; timed out; no time left."""
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> value, unit, text, and `values` of each process where there are several."""
    failures: list[str] = field(default_factory=list)


@dataclass
class Results:
    """What is known of one card."""

    groups: dict[str, Found] = field(default_factory=dict)

    @property
    def machine(self) -> dict[str, Any]:
        """Return what the groups ran on, as the last one that told it."""
        told = [
            group_results.machine for group_results in self.groups.values() if group_results.machine
        ]
        return told[-1] if told else {}

    @property
    def card(self) -> str | None:
        """The name of the card; None where there was none, or no group came so far."""
        return self.machine.get("card")

    def values(self) -> dict[str, Value]:
        """Return name -> value of all figures."""
        return {
            name: row["value"]
            for group_results in self.groups.values()
            for name, row in group_results.figures.items()
        }

    def judged(self) -> list[tuple[Figure, Value | None, bool | None]]:
        """Return the figures of the table that groups here have, with value and whether it is met.

        Without a card nothing is judged.
        """
        values, rows = self.values(), []
        for figure in FIGURES:
            if figure.name.partition("/")[0] not in self.groups:
                continue
            value = values.get(figure.name)
            met = None if value is None or self.card is None else figure.met(value)
            rows.append((figure, value, met))
        return rows

    def plain(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"card": self.card, "groups": {k: asdict(v) for k, v in self.groups.items()}}

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that `write` has written."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        return cls({name: Found(**row) for name, row in plain["groups"].items()})

    def file(self, folder: Path) -> Path:
        """Return where these results are kept."""
        name = re.sub(r"[^a-z0-9]+", "-", (self.card or WITHOUT).lower()).strip("-")
        return folder / f"gpu-{name}.json"

    def write(self, folder: Path) -> Path:
        """Write them whole or not at all, and return where."""
        path = self.file(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.plain(), indent=1) + "\n"
        unfinished = path.with_suffix(".part")
        unfinished.write_text(text, encoding="ascii")
        unfinished.replace(path)
        return path


def stored(folder: Path) -> list[Results]:
    """Return the results of all cards that were measured so far."""
    paths = sorted(folder.glob("gpu-*.json"))
    return [Results.read(path) for path in paths if path.stem != f"gpu-{WITHOUT}"]


def gathered(paths: list[Path], status: str, seconds: float) -> Found:
    """Return what the processes of a group have written, also one that was cut off in a line."""
    outcome = Found(status, round(seconds, 1))
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "machine" in row:
                outcome.machine = row["machine"]
            elif "failure" in row:
                outcome.failures.append(row["failure"])
            else:
                _add(outcome.figures, row)
    if len(paths) > 1:
        _add_spreads(outcome.figures)
    return outcome


def _add(figures: dict[str, dict[str, Any]], row: dict[str, Any]) -> None:
    """Add a figure; one that was there is the value of an earlier process."""
    before = figures.get(row["figure"], {})
    values = [*before.get("values", []), row["value"]]
    figures[row["figure"]] = {
        "value": row["value"], "unit": row["unit"], "text": row["text"], "values": values,
    }  # fmt: skip


def _add_spreads(figures: dict[str, dict[str, Any]]) -> None:
    """Add how much times differ from process to process, in percent of their mean."""
    for name, row in list(figures.items()):
        values = row["values"]
        if row["unit"] == "ms" and len(values) > 1:
            spread = 100 * statistics.stdev(values) / statistics.mean(values)
            text = f"standard deviation of {len(values)} processes over their mean"
            figures[f"{name}: {SPREAD}"] = {
                "value": spread, "unit": "%", "text": text, "values": [spread],
            }  # fmt: skip
        flags = [value for value in values if isinstance(value, bool)]
        if flags:
            row["value"] = all(flags)
