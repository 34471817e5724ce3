"""A whole study, inline or on Ray: candidates an hour, seconds by phase, and memory that stays."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gpu.card import GPU, MIB, sized
from gpu.report import Report
from moenas.records import Evaluation
from moenas.space.space import Space
from moenas.study.events import Event, Listener
from moenas.study.launch import Interrupted, load_study, run
from moenas.workers.pool import Workers

STORAGE = "sqlite:///gpu.db"
SPACE = Path(__file__).with_name("study.yaml")
TINY = (
    "architecture.d_model=128",
    "architecture.blocks.0.repeat=1",
    "train.tokens=512",
    "train.context=16",
    "train.batch=4",
    "train.val_tokens=64",
    "measure.decode_batch=1",
    "measure.decode_context=8",
    "measure.min_repeats=3",
    "measure.max_repeats=3",
    "measure.max_seconds=0.2",
    "search.trials=2",
)
"""The same study where there is no GPU."""


def measure(report: Report) -> None:
    """Run the study in this process."""
    one_study(report, "inline", [])


def measure_on_ray(report: Report) -> None:
    """Run the study with four candidates at a time on the GPU."""
    shares = ["search.gpus=0.25", "search.cpus=4"]
    one_study(report, sized(4, 2), sized(shares, []))


def one_study(report: Report, workers: Workers, overrides: list[str]) -> None:
    """Run it in an empty folder, which is left behind for what may still write there."""
    os.chdir(tempfile.mkdtemp(prefix="moenas-gpu-study-"))
    space = Space.load(str(SPACE), [*overrides, *([] if GPU else TINY)])
    kept: list[float] = []
    began = time.perf_counter()
    before = taken()
    ends: list[float] = []
    listen = listener(report, began, ends, kept if workers == "inline" else None)
    try:
        run(space, storage=STORAGE, workers=workers, listeners=[listen])
    except Interrupted:  # the limit of the group came; what is stored counts
        report.note("the study was interrupted")
    took = time.perf_counter() - began
    study = load_study(space.name, STORAGE)
    rows = study.store.evaluations(study.name)
    complete = [r for r in rows if r.status == "complete" and "copied_from" not in r.metrics]
    report.figure("candidates an hour", 3600 * len(complete) / took, "", f"{took:.0f} s in all")
    if len(ends) > 1:
        steady = 3600 * (len(ends) - 1) / (ends[-1] - ends[0])
        text = f"from the end of the first, after {ends[0]:.0f} s, to the end of the last"
        report.figure("candidates an hour after the first", steady, "", text)
    report.figure("complete", len(complete), "candidates", f"of {space.search.trials}")
    failed = sum(row.status == "failed" for row in rows)
    report.figure("failed", failed, "candidates", reasons(rows))
    tell_seconds(report, complete)
    if complete:
        best = min(row.values["val_loss"] for row in complete)
        report.figure("best loss", best, "nats/token")
    if kept:
        report.figure("left after a candidate", max(kept), "MiB", "the most, in torch")
    if GPU and workers != "inline":
        report.figure("left on the card", left_of(before) / MIB, "MiB", "once the workers ended")


def left_of(before: float) -> float:
    """Return how many more bytes of the card are taken than before, once none, or after 8 s."""
    end = time.monotonic() + 8
    while time.monotonic() < end and taken() > before:
        time.sleep(0.2)
    return taken() - before


def taken() -> float:
    """Return the bytes of the card that anybody holds."""
    if not GPU:
        return 0.0
    free, whole = torch.cuda.mem_get_info()
    return float(whole - free)


def listener(report: Report, began: float, ends: list[float], kept: list[float] | None) -> Listener:
    """Return what prints a line for each trial, and notes its end and the memory that it leaves."""

    def listen(event: Event) -> None:
        if event.kind not in ("finished", "warning"):
            return
        held = torch.cuda.memory_allocated() / MIB if GPU and kept is not None else 0.0
        if kept is not None and event.kind == "finished":
            kept.append(held)
        when = time.perf_counter() - began
        if event.kind == "finished":
            ends.append(when)
        report.note(f"{when:6.1f} s {event.kind} {event.trial} {held:.0f} MiB {event.text[:100]}")

    return listen


def reasons(rows: list[Evaluation]) -> str:
    """Return the kinds of the failures, with the first message."""
    failures = [row.failure for row in rows if row.status == "failed" and row.failure]
    if not failures:
        return ""
    kinds = sorted({failure.kind for failure in failures})
    return f"{', '.join(kinds)}: {str(failures[0]['message'])[:160]}"


def tell_seconds(report: Report, complete: list[Evaluation]) -> None:
    """Report the median seconds of each phase of a candidate."""
    phases = sorted({phase for row in complete for phase in row.seconds})
    for phase in phases:
        seconds_told = [row.seconds[phase] for row in complete if phase in row.seconds]
        name = "a candidate" if phase == "total" else phase
        report.figure(f"seconds of {name}", statistics.median(seconds_told), "s", "median")
