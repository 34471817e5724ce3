"""What a run shows on stderr: a live table on a terminal, one line a trial elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moenas.grammar.summary import compact
from moenas.space.space import Space
from moenas.study.events import Event, Listener
from moenas.study.progress import Progress
from moenas.terminal import plain, say

LAST = 6
"""Finished trials that stay in view."""


@contextmanager
def listener(space: Space) -> Iterator[Listener]:
    """Yield what takes the events of a run: a live table on a terminal, else lines on stderr."""
    if sys.stderr is None:
        yield lambda _: None
    elif sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb":
        board = LiveProgress(space)
        live = Live(board, console=Console(stderr=True), refresh_per_second=4)
        # A terminal that is gone is no reason to stop.
        with contextlib.suppress(OSError):
            live.start()
        try:
            yield board.take
        finally:
            with contextlib.suppress(OSError):
                live.stop()
    else:
        yield write_line


def write_line(event: Event) -> None:
    """Write one line for a trial that is over, and for what went wrong; nothing for a start."""
    if event.kind in ("started", "promoted"):
        return
    say(line(event))


def line(event: Event) -> str:
    """Return an event in one line."""
    progress, found = event.progress, event.evaluation
    place = f"[{progress.reached:>{len(str(progress.total))}}/{progress.total}]"
    head = place if event.trial is None else f"{place} trial {event.trial}"
    if found is None:
        return f"{head} {event.kind}: {event.text}"
    if found.status == "complete":
        values = "  ".join(f"{name} {compact(found.values[name])}" for name in progress.best)
        return f"{head} {values}  | {event.text} | front {progress.front}, {left(progress)}"
    return f"{head} {found.status}: {reason(event)} | {left(progress)}"


def reason(event: Event) -> str:
    """Say why a trial has no values."""
    found = event.evaluation
    if found is not None and found.status == "stopped":
        metrics = found.metrics
        at = f"at rung {metrics['rung']:.0f}, " if "rung" in metrics else ""
        return f"{at}validation loss {compact(metrics.get('rung_loss', math.nan))} | {event.text}"
    if found is not None and found.failure is not None:
        return f"{found.failure} | {event.text}"
    broken = ", ".join(found.violations) if found is not None else ""
    return f"breaks {broken} | {event.text}" if broken else event.text


def left(progress: Progress) -> str:
    """Say how long it will still take."""
    if progress.evaluated >= progress.total:
        return "done"
    return "time left unknown" if progress.eta_s is None else f"{duration(progress.eta_s)} left"


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class LiveProgress:
    """The state of a run as a terminal shows it."""

    def __init__(self, space: Space) -> None:
        self.name = space.name
        self.units = {o.name: o.unit for o in space.objectives}
        self.progress: Progress | None = None
        self.running: dict[int, tuple[str, float]] = {}
        """Trial -> the architecture in one line, and when it began."""
        self.last: deque[tuple[str, str]] = deque(maxlen=LAST)
        """Lines of what happened, each with its colour."""

    def take(self, event: Event) -> None:
        """Take in an event."""
        self.progress = event.progress
        if event.kind in ("started", "promoted") and event.trial is not None:
            self.running[event.trial] = (plain(event.text), time.monotonic())
            return
        if event.trial is not None and event.kind != "retried":
            self.running.pop(event.trial, None)
        found = event.evaluation
        complete = found is not None and found.status == "complete"
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
                f"{name} {compact(value)} {self.units[name]}".rstrip()
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
