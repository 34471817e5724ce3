"""The long form: tries every kind of fault many times, and writes docs/reliability.md.

`python tests/chaos/report.py [SEED]` takes about an hour on two cores, and adds to the figures of
earlier runs that are on file; `--reset` forgets those. Names of scenarios after the seed limit it to
them, and replace their figures.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import scenarios as faults  # noqa: E402
from arena import Outcome  # noqa: E402
from postgres import Server, server_programs  # noqa: E402
from scipy.stats import beta  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"

HEAD = """# Reliability

`make chaos` wrote this page: it runs real studies (SQLite, PostgreSQL, Ray, training), breaks them
on purpose by a seeded script, resumes them, and compares the outcome with an oracle that does not
use moenas. After each fault:

- exactly the asked number of candidates is evaluated, none twice;
- our rows equal Optuna's: numbers, states and values;
- the front and its hypervolume equal brute force over the stored values;
- each file of weights has its stored SHA-256;
- no process, no temporary file and no driver's row is left;
- no traceback was printed, and each exit code is one that
  [getting_started.md](getting_started.md#exit-codes) names.

A fault survived if all of that holds. The bound is the share of faults that fails at most, with
95 % confidence (Clopper-Pearson), given what was tried.
"""


def bound(tried: int, failed: int) -> float:
    """Return the upper end of the one-sided 95 % interval of a share."""
    return 1.0 if failed >= tried else float(beta.ppf(0.95, failed + 1, tried - failed))


PLAN: list[tuple[str, dict[str, Any], int]] = [
    ("double_launches", {"count": 10}, 4),
    ("driver_kills", {"kills": 20}, 8),
    ("database_restarts", {"restarts": 10}, 3),
    ("worker_kills", {"kills": 20}, 5),
    ("mutated_spaces", {"count": 5_000}, 4),
    ("driver_kills", {"kills": 20, "url": "postgres"}, 2),
    ("driver_kills", {"kills": 20, "stopping": "successive_halving"}, 2),
    ("double_launches", {"count": 12, "url": "postgres"}, 1),
    ("signals", {"count": 20}, 2),
    ("other_programs", {"count": 20}, 2),
    ("full_disk", {"count": 10}, 1),
    ("moved_database", {"count": 6}, 1),
    ("changed_data", {"count": 6}, 1),
    ("closed_streams", {"count": 8}, 1),
    ("worker_kills", {"kills": 3, "stop": 1}, 1),
    ("locked_database", {"seconds": [8.0, 30.0, 90.0]}, 1),
]
"""Scenario, how often it tries its fault, and in how many parts; two parts run at a time."""


def attempt(name: str, options: dict[str, Any], seed: int) -> Outcome:
    """Try one kind of fault, in a process of its own."""
    began, scenario = time.monotonic(), getattr(faults, name)
    if options.get("url") == "postgres":
        programs = server_programs()
        assert programs is not None
        with Server(programs) as server:
            outcome: Outcome = scenario(Random(seed), **{**options, "url": server.url})
    else:
        outcome = scenario(Random(seed), **options)
    outcome.seconds = time.monotonic() - began
    return outcome


def joined(outcomes: list[Outcome]) -> list[Outcome]:
    """Add up the outcomes of one kind of fault."""
    by_name: dict[str, Outcome] = {}
    for outcome in outcomes:
        total = by_name.setdefault(outcome.name, Outcome(outcome.name))
        total.tried += outcome.tried
        total.survived += outcome.survived
        total.problems += outcome.problems
        total.recovery += outcome.recovery
        total.seconds += outcome.seconds
    return list(by_name.values())


def row(outcome: Outcome) -> str:
    """Return one line of the table."""
    times = sorted(outcome.recovery)
    p50 = p95 = "-"
    if len(times) > 1:
        cuts = quantiles(times, n=20, method="inclusive")
        p50, p95 = f"{cuts[9]:.1f}", f"{cuts[18]:.1f}"
    failed = outcome.tried - outcome.survived
    share = 100 * bound(outcome.tried, failed)
    return (
        f"| {outcome.name} | {outcome.tried:,} | {outcome.survived:,} | {p50} | {p95} |"
        f" {share:.2g} % |"
    )


def page(outcomes: list[Outcome], optuna: dict[str, int], runs: list[dict[str, float]]) -> str:
    """Return the text of docs/reliability.md."""
    seeds = ", ".join(f"{run['seed']:.0f}" for run in runs)
    minutes = sum(run["minutes"] for run in runs)
    lines = [HEAD]
    lines.append("| fault | tried | survived | recovery p50, s | p95, s | bound |")
    lines.append("| --- | --: | --: | --: | --: | --: |")
    lines += [row(outcome) for outcome in outcomes]
    lines += [
        "",
        "Recovery is the time from the start of the resuming process to its first word on a trial;",
        "the import of PyTorch is a part of it. Beside it, `study.optimize` of Optuna alone under",
        f"kills of the same kind: {optuna['kills']} kills, {optuna['lost']} of the asked trials"
        " never evaluated,",
        f"{optuna['stuck']} trials left in the state RUNNING.",
        "",
        f"Seeds {seeds}, {minutes:.0f} minutes, {platform.machine()}, Python"
        f" {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}.",
        "",
    ]
    wrong = [text for outcome in outcomes for text in outcome.problems]
    if wrong:
        lines += ["## What failed", "", *(f"- {' '.join(t.split())[:300]}" for t in wrong), ""]
    return "\n".join(lines)


def earlier() -> tuple[list[dict[str, float]], dict[str, int], list[Outcome]]:
    """Return the runs whose figures are on file, what Optuna lost in them, and their outcomes."""
    if not RESULTS.exists():
        return [], {}, []
    plain = json.loads(RESULTS.read_text(encoding="utf-8"))
    return plain["runs"], plain["optuna"], [Outcome(**fault) for fault in plain["faults"]]


def write(outcomes: list[Outcome], optuna: dict[str, int], runs: list[dict[str, float]]) -> None:
    """Write the page and the figures of what is done; a later part writes both again."""
    by_name = joined(outcomes)
    PAGE.write_text(page(by_name, optuna, runs), encoding="utf-8")
    faults = [vars(outcome) for outcome in by_name]
    figures = {"runs": runs, "optuna": optuna, "faults": faults}
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Try everything; the page is written after each part, so that a stopped run leaves one."""
    words = sys.argv[1:]
    seed = next((int(word) for word in words if word.isdigit()), int(time.time()))
    named = [word for word in words if hasattr(faults, word)]
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    runs, lost, before = ([], {}, []) if "--reset" in words else earlier()
    # The parts of one fault are spread, so that a run that is stopped has tried most of them.
    parts = [(n, o) for n, o, times in PLAN if n in (named or n) for _ in range(times)]
    Random(seed).shuffle(parts)
    done: list[Outcome] = []
    with ProcessPoolExecutor(2) as pool:
        beside = None if named else pool.submit(faults.plain_optuna, Random(seed), 100)
        running = [
            pool.submit(attempt, name, options, seed + i) for i, (name, options) in enumerate(parts)
        ]
        numbers = beside.result() if beside else {}
        optuna = {name: numbers.get(name, 0) + lost.get(name, 0) for name in {**numbers, **lost}}
        for part in as_completed(running):
            outcome = part.result()
            done.append(outcome)
            print(row(outcome), f"{outcome.seconds:.0f} s", flush=True)
            for text in outcome.problems:
                print(f"    {text}", flush=True)
            again = {o.name for o in done} if named else set()
            minutes = (time.monotonic() - began) / 60
            kept = [o for o in before if o.name not in again]
            write([*kept, *done], optuna, [*runs, {"seed": seed, "minutes": minutes}])
    sys.exit(any(outcome.problems for outcome in done))


if __name__ == "__main__":
    main()
