"""Figures as they are found: printed, and written line by line, so that a crash loses none."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Value = float | int | bool | str

LONGEST = 300
"""Characters of an error that are kept."""


def shown(value: Value) -> str:
    """Write a value with 4 digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Report:
    """What one group finds; a figure of the group `g` is named `g/name`."""

    def __init__(self, group: str, path: Path | None = None) -> None:
        self.group = group
        self.path = path
        self.figures: dict[str, Value] = {}
        self.failures: list[str] = []

    def _write(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")

    def machine(self, facts: dict[str, Any]) -> None:
        """Write down what is measured on."""
        self._write({"machine": facts})

    def figure(self, name: str, value: Value, unit: str = "", text: str = "") -> None:
        """Write down a figure; `text` is what else should be known of it."""
        whole = f"{self.group}/{name}"
        self.figures[whole] = value
        self._write({"figure": whole, "value": value, "unit": unit, "text": text})
        print(
            f"{whole}: {shown(value)} {unit}".rstrip() + (f"; {text}" if text else ""), flush=True
        )

    def note(self, text: str) -> None:
        """Print what goes into the log alone."""
        print(f"  {text}", flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Work on a part of a group; an exception is written down, and the next part begins."""
        try:
            yield
        except Exception as error:
            text = f"{name}: {type(error).__name__}: {error}"[:LONGEST]
            self.failures.append(text)
            self._write({"failure": text})
            traceback.print_exc()
            print(f"FAILED {self.group}/{text}", flush=True)
