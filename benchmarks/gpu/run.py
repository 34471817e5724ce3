"""Measure moenas on the GPU of this machine, the most valuable figures first, within 8 minutes.

    python benchmarks/gpu/run.py [--budget SECONDS] [--only NAMES] [--into FOLDER] [--page]

Each group of figures is a process of its own with a time limit. A process that crashes or hangs
costs only the figures that it had not reported. While a group measures, the process of the next one
imports its libraries and waits. After each group benchmarks/results/gpu-<card>.json and docs/gpu.md
are rewritten, and copied to $OUT if that is set. With --only the other groups keep the figures of
an earlier run. Without a GPU everything runs dry, on tiny sizes, and is written to build/gpu.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu.figures import GROUPS, Group
from gpu.page import page, summary
from gpu.results import Found, Results, gathered, stored
from moenas.processes import adopt_orphans, descendants, kill_descendants

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET = 480.0
GRACE = 8.0
"""Seconds from the signal that ends a group until it is killed; a study writes its figures then."""
LEAST = 8.0
"""With fewer seconds left no group is begun."""
WIDTH = 180
"""Characters of a line that are printed; the log has all."""

Tell = Callable[[str], None]
Command = Callable[[Group, Path], list[str]]


def command_of(group: Group, figures: Path) -> list[str]:
    """Return what starts the process of a group, which adds its figures to a file."""
    return [sys.executable, str(HERE / "group.py"), group.name, str(figures)]


class Process:
    """The process of one group: it imports its libraries, and waits for its turn."""

    def __init__(self, command: list[str], figures: Path, tell: Tell) -> None:
        self.figures = figures
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, args=(tell,), daemon=True)
        self._reader.start()

    def _read(self, tell: Tell) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            tell(line.rstrip("\n"))

    def run(self, limit: float) -> tuple[str, float]:
        """Give it its turn; return how it ended, and the seconds that it took."""
        began = time.monotonic()
        self._say(f"{limit:.1f}\n")
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGTERM)
            self.end(GRACE)
            return "timed out", time.monotonic() - began
        self.end(0.0)
        status = {0: "done", 1: "failed"}.get(code, f"crashed with {code}")
        return status, time.monotonic() - began

    def _say(self, text: str) -> None:
        assert self.process.stdin is not None
        if self.process.stdin.closed:
            return
        with suppress(OSError):  # it may have ended already; its exit code says how
            self.process.stdin.write(text)
        with suppress(OSError):
            self.process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def end(self, grace: float) -> None:
        """Wait a little for the process to end; then end it and its children."""
        if grace:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        kill_descendants(self.process.pid)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(2.0)
        self._say("")
        if self.process.stdout is not None and not self._reader.is_alive():
            self.process.stdout.close()


class Run:
    """One run of the command."""

    def __init__(
        self, groups: list[Group], budget: float, into: Path | None, *, keep: bool
    ) -> None:
        self.groups, self.into, self.keep = groups, into, keep
        self.end = time.monotonic() + budget
        self.work = Path(tempfile.mkdtemp(prefix="moenas-gpu-"))
        self.out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
        self.log = (self.out or self.work) / "gpu-log.txt"
        self.results = Results()
        self.command: Command = command_of
        self.adopts = False
        """Whether what groups leave behind becomes a child of this process, which then ends it."""
        self._lock = threading.Lock()

    def tell(self, line: str) -> None:
        """Print a line, cut, and add it whole to the log."""
        with self._lock:
            print(line[:WIDTH], flush=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def go(self) -> int:
        """Run the groups; return 1 if one of them did not end well."""
        turns = [(group, turn) for group in self.groups for turn in range(group.turns)]
        waiting: Process | None = None
        current: Process | None = None
        try:
            for i, (group, turn) in enumerate(turns):
                current = waiting or self._started(group, turn)
                waiting = self._started(*turns[i + 1]) if i + 1 < len(turns) else None
                self._one(group, turn, current, waiting)
                current = None
                self.write()
        finally:
            for process in (current, waiting):
                if process is not None:
                    process.end(0.0)
            if current is not None:
                self._take_in(group, turn, "interrupted", 0.0)
            self.write()
        for line in summary(self.results):
            self.tell(line)
        self.tell(f"log: {self.log}")
        return 0 if all(f.status == "done" for f in self.results.groups.values()) else 1

    def _figures(self, group: Group, turn: int) -> Path:
        return self.work / f"{group.name}-{turn}.jsonl"

    def _started(self, group: Group, turn: int) -> Process:
        figures = self._figures(group, turn)
        return Process(self.command(group, figures), figures, self.tell)

    def _one(self, group: Group, turn: int, process: Process, waiting: Process | None) -> None:
        """Give one process its turn, and take in its results."""
        limit = min(float(group.limit), self.left - GRACE)
        name = f"{group.name} {turn + 1} of {group.turns}" if group.turns > 1 else group.name
        if limit < max(LEAST, group.seconds / 2):
            process.end(0.0)
            self.tell(f"=== {name}: no time left")
            self.results.groups.setdefault(group.name, Found("")).status = "no time left"
            return
        clock = time.strftime("%H:%M:%S")
        self.tell(
            f"\n=== {clock} {name}: {group.about}; about {group.seconds} s, at most {limit:.0f},"
            f" {self.left:.0f} left in all"
        )
        status, took = process.run(limit)
        if self.adopts:
            spared = [waiting.process.pid, *descendants(waiting.process.pid)] if waiting else []
            kill_descendants(os.getpid(), spared)
        self.tell(f"=== {name}: {status} after {took:.1f} s")
        self._take_in(group, turn, status, took)

    def _take_in(self, group: Group, turn: int, status: str, took: float) -> None:
        """Read what the turns of a group have found so far; the worst status counts."""
        before = self.results.groups.get(group.name)
        if before is not None:
            took += before.seconds
            status = status if before.status == "done" else before.status
        paths = [self._figures(group, n) for n in range(turn + 1)]
        self.results.groups[group.name] = gathered(paths, status, took)

    def write(self) -> None:
        """Write the results and the page, and copy them to $OUT."""
        if not self.results.machine:
            return  # no group came so far as to name its device
        into = self.into or (ROOT if self.results.card else ROOT / "build" / "gpu")
        folder = into / "benchmarks" / "results"
        whole = self._with_earlier(folder)
        paths = [whole.write(folder), into / "docs" / "gpu.md"]
        paths[1].parent.mkdir(parents=True, exist_ok=True)
        shown = stored(folder) if self.results.card else [whole]
        paths[1].write_text(page(shown), encoding="ascii")
        if self.out is not None:
            for path in paths:
                shutil.copy(path, self.out / path.name)

    def _with_earlier(self, folder: Path) -> Results:
        """Return the results, with what an earlier run found of groups that this one omits."""
        path = self.results.file(folder)
        if not self.keep or not path.is_file():
            return self.results
        earlier = Results.read(path).groups
        named = {g.name: earlier.get(g.name) for g in GROUPS} | dict(self.results.groups)
        return Results(
            {
                name: group_results
                for name, group_results in named.items()
                if group_results is not None
            }
        )


def chosen(text: str) -> list[Group]:
    """Return the groups that a list of names means, in the order of their value."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [group.name for group in GROUPS]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no group '{name}'; there are {', '.join(known)}")
    return [group for group in GROUPS if group.name in names]


def seconds(text: str) -> float:
    """Return a number of seconds above 0."""
    try:
        wanted_seconds = float(text)
    except ValueError:
        wanted_seconds = 0.0
    if not 0 < wanted_seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return wanted_seconds


def card_state() -> str:
    """Return what nvidia-smi says of the card in one line; empty where there is none."""
    line = [
        "nvidia-smi",
        "--query-gpu=name,memory.used,clocks.sm,power.draw",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def interrupted(number: int, frame: object) -> None:
    """End the run as Ctrl-C does, so that what is known is written."""
    raise KeyboardInterrupt


def main(given: list[str] | None = None) -> int:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=seconds, default=BUDGET, help="seconds in all")
    parser.add_argument("--only", type=chosen, help="names of groups, with commas between them")
    parser.add_argument("--into", type=Path, help="folder for benchmarks/results and docs")
    parser.add_argument("--page", action="store_true", help="write docs/gpu.md from what is stored")
    flags = parser.parse_args(given)
    if flags.page:
        into = flags.into or ROOT
        (into / "docs").mkdir(parents=True, exist_ok=True)
        text = page(stored(into / "benchmarks" / "results"))
        (into / "docs" / "gpu.md").write_text(text, encoding="ascii")
        return 0
    signal.signal(signal.SIGTERM, interrupted)
    run = Run(flags.only or list(GROUPS), flags.budget, flags.into, keep=bool(flags.only))
    adopt_orphans()
    run.adopts = True
    run.tell(card_state() or "nvidia-smi finds no GPU")
    try:
        code = run.go()
    except KeyboardInterrupt:
        run.tell("interrupted; the results so far are written")
        return 130
    run.tell(card_state())
    return code


if __name__ == "__main__":
    sys.exit(main())
