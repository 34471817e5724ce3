"""Seconds and memory of the commands that read a large study: status, front, show, publishing.

`python benchmarks/readers.py` makes a database of 3,000 trained trials, each with 40 rows of curve
and 4 layers of experts. It prints a row for each command. A process of its own runs each command;
the row `imports` is one that only imports what the command needs.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import optuna

from moenas.records import Evaluation, Plain, StudyRecord
from moenas.store.store import Store

NAME = "large"
OBJECTIVES = {"val_loss": "minimize", "decode_ms": "minimize", "flops_per_token": "minimize"}
LAYERS, EXPERTS = 4, 8
ROUTER = {"score": "softmax", "top_k": 2, "balance": "aux_loss", "capacity_factor": None}
CLI = "import sys; sys.argv[1:] = {}; from moenas.cli.commands import main; main()"
LOAD = "from moenas import load_study; study = load_study('large')"
COMMANDS = {
    "status": (
        CLI.format(["status", NAME]),
        "import moenas.cli.commands, moenas.report.summary, moenas.store.store",
    ),
    "front": (
        CLI.format(["front", NAME]),
        "import moenas.cli.commands, moenas.report.summary, moenas.store.store",
    ),
    "show": (
        CLI.format(["show", NAME, "7"]),
        "import moenas.cli.commands, moenas.report.summary, moenas.store.store",
    ),
    "Study.front()": (f"{LOAD}; study.front()", "import moenas.study.launch"),
    "first publishing": (
        f"{LOAD}; from moenas.dashboard.server import publish; publish(study.store, 'large')",
        "import moenas.study.launch, moenas.dashboard.server, optuna.storages._rdb.storage",
    ),
    "publishing a change": (
        f"{LOAD}; from moenas.dashboard.server import publish; import time;"
        " study.store.set_trials('large', int(time.time()) % 10**6); publish(study.store, 'large')",
        "import moenas.study.launch, moenas.dashboard.server, optuna.storages._rdb.storage",
    ),
    "publishing again": (
        f"{LOAD}; from moenas.dashboard.server import publish; publish(study.store, 'large')",
        "import moenas.study.launch, moenas.dashboard.server, optuna.storages._rdb.storage",
    ),
}
"""Command -> what runs it, and what imports the same."""


def architecture(rng: random.Random) -> Plain:
    """Return a canonical architecture with four layers of experts."""
    ffn = {"kind": "moe", "n_experts": EXPERTS, "d_expert": 64, "activation": "swiglu"}
    mixer = {"kind": "attention", "head_dim": 32, "n_heads": 3, "n_kv_heads": 1}
    block = {"repeat": LAYERS, "vary": False, "mixer": mixer, "ffn": ffn | {"router": ROUTER}}
    plain = {"vocab_size": 256, "d_model": rng.choice([64, 96, 128]), "norm": "rmsnorm"}
    return plain | {"tie_embeddings": True, "blocks": [block]}


def layers(rng: random.Random) -> list[Plain]:
    """Return the routing of every layer."""
    rows = []
    for layer in range(LAYERS):
        load = [rng.random() for _ in range(EXPERTS)]
        rows.append({"layer": layer, "load": load, "max_vio": 0.3, "cv": 0.2, "entropy": 0.9})
    return rows


def evaluation(trial: int, rows: int, rng: random.Random) -> Evaluation:
    """Return a complete evaluation: cheap candidates lose more, with noise."""
    size = rng.lognormvariate(0, 0.7)
    loss = 1.5 + 0.5 / size + rng.random() * 0.2
    curve = [
        {
            "tokens": 2048 * (i + 1),
            "train_loss": loss + 3.5 / (i + 1),
            "lr": 0.001,
            "grad_norm": 1.0,
            "seconds": 0.1 * i,
            "routing": layers(rng),
        }
        for i in range(rows)
    ]
    speed = 0.5 * size**0.5 * (0.8 + 0.4 * rng.random())
    return Evaluation(
        study=NAME,
        trial=trial,
        attempt=1,
        status="complete",
        fingerprint=f"{trial:016x}",
        values={"val_loss": loss, "decode_ms": speed, "flops_per_token": 1e6 * size},
        measurements={"decode_ms": {"ratio": 1.1, "spread": 0.02, "n": 30}},
        metrics={"val_loss": loss, "lr": 0.001},
        curve=curve,
        routing=layers(rng),
        cost={"params": 1_234_567, "active_params": 345_678, "flops_per_token": 1_000_000},
        seconds={"train": 12.0, "total": 14.0},
        device={"key": "cpu:x", "kind": "cpu", "name": "Some CPU", "threads": 1},
        versions={"torch": "2.13.0"},
        data={"name": "stdlib", "sha256": "ab" * 32},
    )


def build(url: str, trials: int, rows: int) -> None:
    """Make the database, our tables and Optuna's."""
    rng, store = random.Random(0), Store.open(url, create=True)
    infos = [
        {"name": name, "direction": direction, "unit": "", "doc": "", "sha256": ""}
        for name, direction in OBJECTIVES.items()
    ]
    record = StudyRecord(NAME, "", [], {}, "", infos, {"name": "stdlib"}, {}, trials)
    store.create_study(record)
    storage = store.optuna_storage()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=NAME, storage=storage, directions=list(OBJECTIVES.values())
    )
    for trial in range(trials):
        made = evaluation(trial, rows, rng)
        store.add_candidate(NAME, trial, made.fingerprint, architecture(rng), made.cost)
        store.start_attempt(NAME, trial)
        store.record(made)
        study.add_trial(optuna.trial.create_trial(values=list(made.values.values())))


PEAK = """
import atexit, os
def note():
    with open("/proc/self/status") as file:
        peak = next(line for line in file if line.startswith("VmHWM"))
    open(os.environ["PEAK"], "w").write(peak.split()[1])
atexit.register(note)
"""


def measured(code: str) -> tuple[float, float, float]:
    """Return wall seconds, seconds of the processor and peak memory in MB of a Python process."""
    with tempfile.NamedTemporaryFile() as file:
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", PEAK + code]
        environment = {**os.environ, "PEAK": file.name}
        subprocess.run(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return wall, used, int(file.read()) / 1024


def main() -> None:
    """Build the database and print a row for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="300 trials")
    parser.add_argument("--database", type=Path, help="keep the database here, or take it up")
    given = parser.parse_args()
    given.trials = 300 if given.quick else given.trials
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = given.database or Path(folder, "moenas.db")
        url = f"sqlite:///{path.absolute()}"
        if not path.exists():
            build(url, given.trials, given.rows)
        os.environ["MOENAS_STORAGE"] = url
        print(
            f"{given.trials} trials, {given.rows} rows of curve, {path.stat().st_size / 1e6:.0f} MB"
        )
        print("\n| | s | CPU s | CPU s of imports | MB | MB of imports |")
        print("| --- | --: | --: | --: | --: | --: |", flush=True)
        for name, (code, imports) in COMMANDS.items():
            wall, used, memory = measured(code)
            _, bare_used, bare = measured(imports)
            numbers = f"{wall:.2f} | {used:.2f} | {bare_used:.2f} | {memory:.0f} | {bare:.0f}"
            print(f"| {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
