"""The service under load: 50 submitted studies, 100 watchers, and an hour's worth of events.

`python benchmarks/service.py` starts `moenas serve` on a database with a study of 300 trials. It
submits 50 studies and lets 100 clients follow two streams of events for each. Drivers run as usual,
one at a time. A writer then stores the events of an hour in which every study finishes a trial each
30 s. It writes first at a steady pace, then as fast as the database takes them. Clients read
meanwhile. It prints a table and writes benchmarks/results/service.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import readers
from sqlalchemy import update

import moenas
from moenas.records import Plain
from moenas.space.space import Space
from moenas.store import access_tokens, study_events, submissions, tables
from moenas.store.store import Store

RESULTS = Path(__file__).parent / "results" / "service.json"
SPACE = """\
architecture:
  vocab_size: 256
  d_model: {choice: [16, 32]}
  blocks:
    - mixer: {kind: attention, head_dim: 16}
      ffn: {kind: dense, activation: swiglu, d_ff: {int: [32, 64], step: 32}}
objectives: [val_loss, flops_per_token]
data: pydoc
train: {tokens: 2048, context: 32, batch: 4, val_tokens: 1024}
search: {sampler: random, trials: 4}
"""
STORED_TRIALS, CURVE_ROWS = 300, 5
"""Size of the study that is read beside the submitted ones."""
EVENTS_PER_STUDY = 240
"""Of an hour with a trial each 30 s: its start and its end."""
PACE = 40.0
"""Events a second of the steady part, 12 times the pace of that hour."""
STEADY_S = 60.0
READS_PER_S = 10.0
READERS = 2
WATCHERS_PER_PROCESS = 25
LAST = "benchmark_ended"
"""Kind of the event that ends a watcher."""
GOAL_MS = 150.0


def study_name(number: int) -> str:
    """Return the name of a submitted study."""
    return f"study-{number:02}"


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `moenas serve` on the database of a folder; yield its process and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MOENAS_STORAGE", None)
    words = ["-m", "moenas", "serve", "--port", "0", "--workers", "inline", "--max-running", "1"]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, first.partition(" at ")[2].split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# --- watchers, in processes of their own ---------------------------------------------------------


def watch(url: str, studies: list[str]) -> None:
    """Follow each study from its first event to the last; print ids and delays as JSON."""
    seen: list[Plain] = [{"study": study, "ids": [], "delays": []} for study in studies]

    def follow(row: Plain) -> None:
        connected = moenas.connect(url)
        for event in connected.study(row["study"]).events():
            delay = datetime.now(UTC) - datetime.fromisoformat(event.at)
            row["ids"].append(event.id)
            row["delays"].append(delay.total_seconds())
            if event.kind == LAST:
                break
        connected.close()

    threads = [threading.Thread(target=follow, args=(row,)) for row in seen]
    for thread in threads:
        thread.start()
    print("connected", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps(seen))


def start_watchers(url: str, tokens: list[str], watched: list[str]) -> list[subprocess.Popen[str]]:
    """Start processes that follow studies, one study for each watcher."""
    processes = []
    for i, first in enumerate(range(0, len(watched), WATCHERS_PER_PROCESS)):
        part = watched[first : first + WATCHERS_PER_PROCESS]
        process = subprocess.Popen(
            [sys.executable, __file__, "--watch", url, *part],
            env={**os.environ, "MOENAS_TOKEN": tokens[i % len(tokens)]},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
    return processes


# --- readers and the writer ----------------------------------------------------------------------


class Reading:
    """Clients that read at a steady pace; `times` has the milliseconds of each part of the run."""

    def __init__(self, url: str, tokens: list[str], studies: list[str]) -> None:
        self.part, self.times = "", dict[str, list[float]]()
        self._studies, self._end = studies, threading.Event()
        self._threads = [
            threading.Thread(target=self._read, args=(moenas.connect(url, token), seed))
            for seed, token in enumerate(tokens[:READERS])
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the clients."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _read(self, connected: Any, seed: int) -> None:
        rng = random.Random(seed)
        while not self._end.wait(READERS / READS_PER_S):
            study = rng.choice([readers.NAME, *self._studies])
            below = rng.choice(["", "/front", "/history", "/trials?limit=50"])
            path = rng.choice(["/v1/studies", f"/v1/studies/{study}{below}"])
            began = time.perf_counter()
            connected.request("GET", path)
            self.times.setdefault(self.part, []).append(1000 * (time.perf_counter() - began))
        connected.close()


def write_events(store: Store, studies: list[str], count: int, per_s: float | None) -> float:
    """Store events of started and finished trials, in turn for each study; return the seconds."""
    began = time.monotonic()
    for number in range(count):
        study, turn = studies[number % len(studies)], number // len(studies)
        told: Plain = {"trial": turn // 2, "attempt": 1}
        if turn % 2:
            told |= {"status": "complete", "values": {"val_loss": 3.5, "flops_per_token": 1e6}}
            told |= {"failure": None, "front": 3, "hypervolume": 1.5}
        kind = "trial_finished" if turn % 2 else "trial_started"
        store.transact(lambda c, s=study, k=kind, t=told: study_events.append(c, s, k, t))
        if per_s is not None:
            time.sleep(max(0.0, began + (number + 1) / per_s - time.monotonic()))
    return time.monotonic() - began


def measured(folder: Path, *, studies: int, watchers: int, steady_s: float) -> Plain:
    """Run everything in a folder, and return the results."""
    store = Store.open(f"sqlite:///{folder}/moenas.db", create=True)
    readers.build(store.url, STORED_TRIALS, CURVE_ROWS)
    # Drivers read the settings of every study for evaluations that they may reuse.
    known: Plain = {"space": Space.parse(SPACE, f"{readers.NAME}.yaml").plain()}
    known |= {"data": {"name": "stdlib", "sha256": "0" * 64}}
    store.transact(lambda c: c.execute(update(tables.study).values(known)))
    tokens = [
        store.transact(lambda c, n=n: access_tokens.create(c, f"user-{n}", "admin", None))
        for n in range(8)
    ]
    names = [study_name(number) for number in range(studies)]
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    with server(folder) as (process, url):
        submitting = moenas.connect(url, tokens[0])
        submitted: list[float] = []
        for name in names:
            began = time.perf_counter()
            submitting.submit(folder / "space.yaml", [f"name={name}"])
            submitted.append(1000 * (time.perf_counter() - began))
        submitting.close()
        watching = start_watchers(url, tokens, [names[i % studies] for i in range(watchers)])
        reading = Reading(url, tokens, names)
        count = EVENTS_PER_STUDY * studies
        steady = min(count // 2, int(PACE * steady_s))
        reading.part = "steady"
        write_events(store, names, steady // 2, PACE)
        before = resident_mib(process.pid)
        write_events(store, names, steady - steady // 2, PACE)
        reading.part = "burst"
        burst_s = write_events(store, names, count - steady, None)
        reading.part = "after"
        for name in names:
            store.transact(lambda c, n=name: study_events.append(c, n, LAST, {}))
        seen = [row for w in watching for row in json.loads(w.communicate()[0])]
        after = resident_mib(process.pid)
        reading.stop()
    newest, states = store.query(study_events.newest), store.query(submissions.counts)
    store.engine.dispose()
    return {
        "studies": studies,
        "watchers": len(seen),
        "events": sum(newest[name] for name in names),
        "delivered": sum(len(row["ids"]) for row in seen),
        "lost": sum(len(set(range(1, row["ids"][-1] + 1)) - set(row["ids"])) for row in seen),
        "doubled": sum(len(row["ids"]) - len(set(row["ids"])) for row in seen),
        "states": {state: count for state, count in states.items() if count},
        "submit_ms": quantiles(submitted),
        "reads": {part: quantiles(times) for part, times in reading.times.items()},
        "delay_ms": quantiles([1000 * delay for row in seen for delay in row["delays"]]),
        "burst_per_s": (count - steady) / burst_s,
        "memory_mib": {"before": before, "after": after},
    }


def quantiles(times: list[float]) -> dict[str, float]:
    """Return how many times there are, their median and their 95th percentile."""
    cuts = statistics.quantiles(times, n=20) if len(times) > 1 else [times[0]] * 19
    return {"n": len(times), "p50": cuts[9], "p95": cuts[18]}


def text(plain: Plain) -> str:
    """Lay the results out as Markdown."""
    names = {"steady": "reads, events at a steady pace", "burst": "reads, events in a burst"}
    memory = plain["memory_mib"]
    lines = [
        f"{plain['studies']} studies, {plain['watchers']} watchers, {plain['events']:,} events,"
        f" {plain['delivered']:,} delivered: {plain['lost']} lost, {plain['doubled']} doubled.",
        f"Memory of the server: {memory['before']:.0f} MiB, then {memory['after']:.0f} MiB. The"
        f" database took {plain['burst_per_s']:.0f} events a second in the burst.",
        f"Load average of the machine: {plain['load_before']:.1f} before,"
        f" {plain['load_after']:.1f} after, on {plain['cores']} cores.",
        "",
        "| | n | median, ms | 95th percentile, ms |",
        "| --- | --: | --: | --: |",
    ]
    rows = {"submissions": plain["submit_ms"]}
    rows |= {names[part]: plain["reads"][part] for part in names if part in plain["reads"]}
    rows["from an event to its watcher"] = plain["delay_ms"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['n']:,} | {row['p50']:.0f} | {row['p95']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Read the flags, run the load, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 studies, 8 watchers; no results")
    parser.add_argument("--watch", nargs="+", metavar="URL", help="what a watcher process runs")
    given = parser.parse_args()
    if given.watch:
        return watch(given.watch[0], given.watch[1:])
    size: dict[str, Any] = {"studies": 50, "watchers": 100, "steady_s": STEADY_S}
    if given.quick:
        size = {"studies": 4, "watchers": 8, "steady_s": 10.0}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(Path(folder), **size)
    figures |= {"load_before": load, "load_after": os.getloadavg()[0], "cores": os.cpu_count()}
    if not given.quick:
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(text(figures))
    if figures["lost"] or figures["doubled"] or "failed" in figures["states"]:
        raise SystemExit(f"events were lost or doubled, or studies failed: {figures['states']}")


if __name__ == "__main__":
    main()
