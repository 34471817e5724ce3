"""Progress of a run on stderr: a live table on a terminal, else one line for each trial."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moenas.grammar.summary import compact, duration
from moenas.study.events import Event, Listener
from moenas.study.progress import Progress
from moenas.terminal import plain, say

LAST = 6
"""Number of finished trials that the table shows."""


@contextmanager
def listener(name: str, units: Mapping[str, str]) -> Iterator[Listener]:
    """Yield the listener of a run: a live table on a terminal, else lines on stderr.

    `name` names the study. `units` gives the unit of each objective.
    """
    if sys.stderr is None:
        yield lambda _: None
    elif sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb":
        board = LiveProgress(name, units)
        live = Live(board, console=Console(stderr=True), refresh_per_second=4)
        # A closed terminal does not end the run.
        with contextlib.suppress(OSError):
            live.start()
        try:
            yield board.on_event
        finally:
            with contextlib.suppress(OSError):
                live.stop()
    else:
        yield print_progress


def print_progress(event: Event) -> None:
    """Write one line on stderr for each event except the start or the promotion of a trial.

    It is a listener for runs from Python: `moenas.run(space, listeners=[moenas.print_progress])`.
    """
    if event.kind in ("started", "promoted"):
        return
    say(line(event))


def line(event: Event) -> str:
    """Return an event in one line."""
    progress, evaluation = event.progress, event.evaluation
    place = f"[{progress.reached:>{len(str(progress.total))}}/{progress.total}]"
    head = place if event.trial is None else f"{place} trial {event.trial}"
    if evaluation is None:
        return f"{head} {event.kind}: {event.text}"
    if evaluation.status == "complete":
        values = "  ".join(f"{name} {compact(evaluation.values[name])}" for name in progress.best)
        return f"{head} {values}  | {event.text} | front {progress.front}, {left(progress)}"
    return f"{head} {evaluation.status}: {reason(event)} | {left(progress)}"


def reason(event: Event) -> str:
    """Return why a trial has no values."""
    evaluation = event.evaluation
    if evaluation is not None and evaluation.status == "stopped":
        metrics = evaluation.metrics
        at = f"at rung {metrics['rung']:.0f}, " if "rung" in metrics else ""
        return f"{at}validation loss {compact(metrics.get('rung_loss', math.nan))} | {event.text}"
    if evaluation is not None and evaluation.failure is not None:
        return f"{evaluation.failure} | {event.text}"
    broken = ", ".join(evaluation.violations) if evaluation is not None else ""
    return f"breaks {broken} | {event.text}" if broken else event.text


def left(progress: Progress) -> str:
    """Return the estimated time left in words."""
    if progress.evaluated >= progress.total:
        return "done"
    return "time left unknown" if progress.eta_s is None else f"{duration(progress.eta_s)} left"


class LiveProgress:
    """The live table of a run on a terminal."""

    def __init__(self, name: str, units: Mapping[str, str]) -> None:
        self.name, self.units = name, units
        self.progress: Progress | None = None
        self.running: dict[int, tuple[str, float]] = {}
        """Trial -> its architecture in one line, and its start in seconds of `time.monotonic`."""
        self.last: deque[tuple[str, str]] = deque(maxlen=LAST)
        """Lines of the latest events, each with its colour."""

    def on_event(self, event: Event) -> None:
        """Update the table by an event."""
        self.progress = event.progress
        if event.kind in ("started", "promoted") and event.trial is not None:
            self.running[event.trial] = (plain(event.text), time.monotonic())
            return
        if event.trial is not None and event.kind != "retried":
            self.running.pop(event.trial, None)
        evaluation = event.evaluation
        complete = evaluation is not None and evaluation.status == "complete"
        quiet = event.kind in ("infeasible", "paused", "stopped")
        colour = "" if complete else "dim" if quiet else "yellow"
        self.last.append((plain(line(event)), colour))

    def __rich__(self) -> RenderableType:
        progress = self.progress
        if progress is None:
            return Text(f"{self.name}: starting ...", style="dim")
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=progress.total, completed=progress.reached, width=30)
        counts = f"{progress.reached}/{progress.total} trials, {progress.complete} complete"
        if progress.failed:
            counts += f", {progress.failed} failed"
        for word in ("infeasible", "stopped", "paused"):
            if number := getattr(progress, word):
                counts += f", {number} {word}"
        head.add_row(Text(self.name, style="bold"), bar, Text(counts), Text(left(progress)))
        rows: list[RenderableType] = [head]
        if progress.best:
            best = ", ".join(
                f"{name} {compact(value)} {self.units.get(name, '')}".rstrip()
                for name, value in progress.best.items()
            )
            rows.append(Text(f"front of {progress.front}; best {best}", style="green"))
        now = time.monotonic()
        for trial, (text, began) in self.running.items():
            words = f"  > trial {trial}  {duration(now - began):>6}  {text}"
            rows.append(Text(words, style="cyan", overflow="ellipsis", no_wrap=True))
        for text, colour in self.last:
            rows.append(Text(f"  {text}", style=colour, overflow="ellipsis", no_wrap=True))
        return Group(*rows)
