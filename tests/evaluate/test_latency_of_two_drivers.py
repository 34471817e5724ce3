"""Two drivers on one device: what each measures, and what the other does meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

OBJECTIVE = '''
"""Decoding latency, with a log of the moments at which this process uses the device."""

import json, os, time
from contextlib import nullcontext
from pathlib import Path

from moenas.evaluate import latency
from moenas.evaluate.device_lock import DeviceLock
from moenas.evaluate.latency import candidate_latency
from moenas.evaluate.optimizer import AdamW

direction = "minimize"
unit = "ms/step"
needs = "training"

FOLDER = Path(os.environ["MOMENTS"])


def log(kind, *moments):
    with (FOLDER / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps([os.environ["DRIVER"], kind, *moments]) + "\\n")


def logged_pairs(*arguments, time_pairs=latency.time_pairs):
    began = time.monotonic_ns()
    pairs = time_pairs(*arguments)
    log("measurement", began, time.monotonic_ns())
    return pairs


def logged_step(self, *arguments, step=AdamW.step):
    log("training", time.monotonic_ns(), time.monotonic_ns())
    return step(self, *arguments)


if not hasattr(latency, "is_logged"):
    latency.is_logged = True
    latency.time_pairs = logged_pairs
    AdamW.step = logged_step
    if os.environ["LOCK"] == "none":
        DeviceLock.shared = DeviceLock.exclusive = lambda self: nullcontext()


def wait_for_the_other_driver():
    """Let the first measurements of both drivers begin together."""
    (FOLDER / f"ready-{os.environ['DRIVER']}").touch()
    for _ in range(24_000):
        if len(list(FOLDER.glob("ready-*"))) == 2:
            return
        time.sleep(0.005)
    raise TimeoutError("the other driver has not come in 120 s")


def measure(subject):
    wait_for_the_other_driver()
    began = time.monotonic_ns()
    measured = candidate_latency(subject, "decode", 2, 16)
    log("call", began, time.monotonic_ns())
    return measured
'''
SPACE = """
name: {name}
architecture:
  vocab_size: 256
  d_model: {{choice: [16, 32]}}
  blocks:
    - repeat: {{int: [1, 2]}}
      mixer: {{kind: attention, head_dim: 8}}
      ffn: {{kind: dense, activation: swiglu, d_ff: 32}}
objectives: [val_loss, {folder}/logged_ms.py]
data: {{files: [{folder}/corpus.txt]}}
train: {{tokens: 8192, context: 16, batch: 4, val_tokens: 64}}
measure: {{precision: 0.0, max_seconds: 1.0, max_repeats: 1000}}
search: {{trials: 3, seed: 3, sampler: random}}
"""


@dataclass(frozen=True)
class Use:
    """One use of the device, from one moment to another (ns of the clock of this boot).

    A call lasts from the wish to measure to the result: the wait for the lock is a part of it.
    """

    driver: str
    kind: str
    began: int
    ended: int

    def overlaps(self, other: Use) -> bool:
        return self.driver != other.driver and (
            self.began <= other.ended and other.began <= self.ended
        )


def run_two_drivers(folder: Path, workers: str, lock: str) -> list[Use]:
    """Run two studies by `moenas run`, each with its own workers and database; return their uses."""
    moments = folder / "moments"
    moments.mkdir()
    (folder / "corpus.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(800)))
    (folder / "logged_ms.py").write_text(OBJECTIVE.lstrip())
    drivers = []
    for name in ("one", "two"):
        place = folder / name
        place.mkdir()
        (place / "space.yaml").write_text(SPACE.format(name=name, folder=folder))
        words = ["run", "space.yaml", "--workers", workers]
        environment = {**os.environ, "MOMENTS": str(moments), "DRIVER": name, "LOCK": lock}
        environment.pop("MOENAS_STORAGE", None)
        with (place / "said.txt").open("wb") as said:
            command = [sys.executable, "-m", "moenas", *words]
            drivers.append(
                subprocess.Popen(command, cwd=place, env=environment, stdout=said, stderr=said)
            )
    try:
        for driver, name in zip(drivers, ("one", "two"), strict=True):
            assert driver.wait(300) == 0, (folder / name / "said.txt").read_text()
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    lines = [line for file in moments.glob("*.jsonl") for line in file.read_text().splitlines()]
    return [Use(*json.loads(line)) for line in lines]


def of_kind(uses: list[Use], kind: str) -> list[Use]:
    return [use for use in uses if use.kind == kind]


def overlaps(uses: list[Use], kind: str) -> Iterator[tuple[Use, Use]]:
    """Yield the measurements during which the other driver made a use of a kind."""
    for measurement in of_kind(uses, "measurement"):
        yield from ((measurement, use) for use in of_kind(uses, kind) if measurement.overlaps(use))


@pytest.mark.parametrize("workers", ["inline", "1"])
def test_a_measurement_holds_its_device_against_another_study(tmp_path: Path, workers: str) -> None:
    uses = run_two_drivers(tmp_path, workers, "held")
    measurements = of_kind(uses, "measurement")
    assert sorted(use.driver for use in measurements) == ["one"] * 3 + ["two"] * 3
    assert {use.driver for use in of_kind(uses, "training")} == {"one", "two"}
    assert any(overlaps(uses, "call")), "no driver had to wait for the other"
    assert not list(overlaps(uses, "measurement"))
    assert not list(overlaps(uses, "training"))


def test_the_same_studies_without_the_lock_measure_at_once(tmp_path: Path) -> None:
    uses = run_two_drivers(tmp_path, "inline", "none")
    assert len(of_kind(uses, "measurement")) == 6
    assert any(overlaps(uses, "measurement"))
