"""The long form: tries every kind of fault many times, and writes docs/reliability.md.

`python tests/chaos/report.py [SEED]` takes about an hour on two cores.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import quantiles

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


def plan(random: Random) -> list[Callable[[], Outcome]]:
    """Return the scenarios with how often each is tried."""

    def on_postgres(scenario: Callable[..., Outcome], count: int) -> Outcome:
        programs = server_programs()
        assert programs is not None
        with Server(programs) as server:
            return scenario(random, count, server.url)

    return [
        lambda: faults.driver_kills(random, 170),
        lambda: on_postgres(faults.driver_kills, 40),
        lambda: faults.worker_kills(random, 100),
        lambda: faults.worker_kills(random, 3, stop=1),
        lambda: faults.database_restarts(random, 30),
        lambda: faults.double_launches(random, 40),
        lambda: on_postgres(faults.double_launches, 12),
        lambda: faults.signals(random, 40),
        lambda: faults.locked_database(random, [8.0, 30.0, 90.0]),
        lambda: faults.moved_database(random, 6),
        lambda: faults.full_disk(random, 10),
        lambda: faults.other_programs(random, 40),
        lambda: faults.changed_data(random, 6),
        lambda: faults.closed_streams(random, 8),
        lambda: faults.mutated_spaces(random, 20_000),
    ]


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


def page(outcomes: list[Outcome], optuna: dict[str, int], seed: int, minutes: float) -> str:
    """Return the text of docs/reliability.md."""
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
        f"Seed {seed}, {minutes:.0f} minutes, {platform.machine()}, Python"
        f" {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}.",
        "",
    ]
    wrong = [text for outcome in outcomes for text in outcome.problems]
    if wrong:
        lines += ["## What failed", "", *(f"- {' '.join(t.split())[:300]}" for t in wrong), ""]
    return "\n".join(lines)


def main() -> None:
    """Try everything, and write the page and the figures."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int(time.time())
    random, began, outcomes = Random(seed), time.monotonic(), []
    print(f"seed {seed}", flush=True)
    for scenario in plan(random):
        start = time.monotonic()
        outcome = scenario()
        outcome.seconds = time.monotonic() - start
        outcomes.append(outcome)
        print(row(outcome), f"{outcome.seconds:.0f} s", flush=True)
        for text in outcome.problems:
            print(f"    {text}", flush=True)
    optuna = faults.plain_optuna(random, 100)
    print(optuna, flush=True)
    minutes = (time.monotonic() - began) / 60
    PAGE.write_text(page(outcomes, optuna, seed, minutes), encoding="utf-8")
    figures = {"seed": seed, "minutes": minutes, "optuna": optuna}
    figures["faults"] = [vars(outcome) for outcome in outcomes]
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()
