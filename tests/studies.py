"""Small studies without training: a space, a stand-in for an evaluation, and a scripted pool."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from moenas.records import Evaluation, Failure, Job, Plain
from moenas.space.space import Space
from moenas.store import attempts
from moenas.study.launch import Study
from moenas.workers.pool import Result

ARCHITECTURE = """
architecture:
  vocab_size: 256
  d_model: {choice: [16, 24, 32]}
  blocks:
    - repeat: {int: [1, 4]}
      mixer: {kind: attention, head_dim: 8}
      ffn:
        choice:
          - {kind: dense, activation: swiglu, d_ff: {int: [16, 128], step: 16}}
          - kind: moe
            n_experts: {choice: [2, 4]}
            d_expert: {int: [16, 64], step: 16}
            activation: gelu
            router: {top_k: {choice: [1, 2]}}
"""
SETTINGS = """
objectives: [val_loss, flops_per_token]
train: {tokens: 512, context: 16, batch: 4, val_tokens: 64}
search: {trials: 6, seed: 3, sampler: tpe}
"""
SMALL = """
architecture:
  vocab_size: 256
  d_model: {choice: [16, 24, 32]}
  blocks:
    - repeat: {choice: [1, 2]}
      mixer: {kind: attention, head_dim: 8}
      ffn: {kind: dense, activation: swiglu, d_ff: 16}
"""
"""A space of 6 points."""


def space(architecture: str = ARCHITECTURE, more: str = "", name: str = "s") -> Space:
    data = f"data: {{files: [{os.getcwd()}/corpus.txt]}}\n"
    return Space.parse(f"name: {name}\n{architecture}{SETTINGS}{data}{more}", "s.yaml")


def value_of(architecture: Plain) -> float:
    """A made-up loss: wider is better, and more layers are better up to three."""
    layers: int = sum(group["repeat"] for group in architecture["blocks"])
    width: int = architecture["d_model"]
    return 4.0 - width / 32 - min(layers, 3) / 4


def fake(job: Job) -> tuple[Evaluation, bytes | None]:
    """A stand-in for an evaluation."""
    values = {"val_loss": value_of(job.architecture), "flops_per_token": float(len(str(job)))}
    evaluation = Evaluation(job.study, job.trial, job.attempt, "complete", "", values=values)
    return evaluation, f"weights of {job.trial}".encode()


Script = Callable[[Job], "Evaluation | Failure"]


class Scripted:
    """A pool of two whose results a test decides; the newest job is done first."""

    capacity = 2
    sharers = 1
    device = "cpu"

    def __init__(self, script: Script) -> None:
        self.script = script
        self.jobs: list[Job] = []
        self.most = 0

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))

    def wait(self, timeout: float) -> list[Result]:
        if timeout == 0.0 or not self.jobs:
            return []
        job = self.jobs.pop()
        return [Result(job, self.script(job), None)]

    def close(self) -> None:
        self.jobs.clear()


def scripted(script: Script) -> Scripted:
    """A pool of two whose results come from `script`."""
    return Scripted(script)


def press_ctrl_c() -> None:
    """Send this process what a terminal sends."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def counts(row: Evaluation) -> bool:
    """Whether a worker evaluated the model of a trial."""
    if "copied_from" in row.metrics:
        return False
    if row.failure:
        return row.failure.kind not in ("parameters", "foreign", "sampler")
    return bool(row.values) or row.status == "stopped"


def assert_sound(study: Study, total: int) -> None:
    """Our rows and Optuna's agree, and exactly `total` candidates were evaluated."""
    told = study.optuna.get_trials()
    rows = {e.trial: e for e in study.store.evaluations(study.name)}
    assert [t.number for t in told] == sorted(rows) == list(range(len(rows)))
    states = {"complete": "COMPLETE", "failed": "FAIL", "infeasible": "PRUNED"}
    states["stopped"] = "PRUNED"
    assert [t.state.name for t in told] == [states[rows[t.number].status] for t in told]
    names = list(study.record.directions)
    for trial in told:
        values = [rows[trial.number].values[n] for n in names] if trial.values else None
        assert trial.values == values
    assert sum(map(counts, rows.values())) == attempts.evaluated(study.store, study.name) == total
    assert study.record.trials == total


def params(study: Study) -> list[Any]:
    return [t.params for t in study.optuna.get_trials()]
