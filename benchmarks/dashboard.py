"""Seconds of a poll of the dashboard, as it comes and as moenas serves it, on one made-up study.

    python benchmarks/dashboard.py [TRIALS]

A page asks for the whole study once and then, every ten seconds, for what is new. Each line is
one such request, answered in this process, with the storage read as after ten seconds.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard

from moenas.dashboard.server import CachedStorage, patch_dashboard

Polls = list[tuple[float, dict[str, Any]]]


def fill(url: str, n_trials: int) -> None:
    """Store a study of three objectives and twelve parameters; one trial in ten is infeasible."""
    rng = random.Random(0)
    study = optuna.create_study(storage=url, directions=["minimize"] * 3, study_name="made_up")
    unit = optuna.distributions.FloatDistribution(0, 1)
    space: dict[str, optuna.distributions.BaseDistribution] = {f"p{i}": unit for i in range(12)}
    study.add_trials(
        optuna.trial.create_trial(
            values=[rng.random() ** 0.5 for _ in range(3)],
            params={name: rng.random() for name in space},
            distributions=space,
            constraints={"active_params": rng.random() - 0.9},
        )
        for _ in range(n_trials)
    )


def ask(app: Any, after: int) -> tuple[float, dict[str, Any]]:
    """Return the seconds of one request and its answer."""
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ |= {"PATH_INFO": "/api/studies/1", "QUERY_STRING": f"after={after}"}
    start = time.perf_counter()
    body = b"".join(app(environ, lambda status, headers, *rest: None))
    return time.perf_counter() - start, json.loads(body)


def polls(storage: Any, n_trials: int) -> Polls:
    """Ask for the whole study twice, then for the trials after its last trial."""
    app: Any = optuna_dashboard.wsgi(storage)
    pages = []
    for after in (0, 0, n_trials):
        app._inmemory_cache._trials_last_fetched_at.clear()
        pages.append(ask(app, after))
    return pages


def main() -> None:
    """Print the comparison."""
    n_trials = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    memory = Path("/dev/shm")  # making the study is 20,000 commits, which a disk takes minutes for
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        url = f"sqlite:///{folder}/study.db"
        fill(url, n_trials)
        stock = polls(url, n_trials)
        assert patch_dashboard(), "this version of optuna-dashboard is not cured"
        cured = polls(CachedStorage(optuna.storages.RDBStorage(url)), n_trials)
        best = {t.number for t in optuna.load_study(study_name="made_up", storage=url).best_trials}
    print(f"{n_trials} trials; seconds a request   as it comes   as served")
    rows = zip(
        ("whole study, first", "whole study, again", "what is new"), stock, cured, strict=True
    )
    for name, (before, _), (after, _) in rows:
        print(f"{name:<32} {before:>12.2f} {after:>11.2f}")
    for name, (_, answer) in (("as it comes", stock[1]), ("as served", cured[1])):
        shown = sum(bool(trial["constraints"]) for trial in answer["trials"])
        same = {trial["number"] for trial in answer["best_trials"]} == best
        print(f"{name}: constraints of {shown} trials shown, best trials as Optuna's: {same}")


if __name__ == "__main__":
    main()
