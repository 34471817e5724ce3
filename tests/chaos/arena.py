"""One folder with a study that a scenario runs, kills and resumes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Self

import sqlalchemy
from oracle import MARK, problems

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SPACE = """
name: {study}
architecture:
  vocab_size: 256
  d_model: {{choice: [16, 24, 32, 48, 64]}}
  blocks:
    - repeat: {{int: [1, 4]}}
      mixer: {{kind: attention, head_dim: 8}}
      ffn:
        choice:
          - {{kind: dense, d_ff: {{int: [16, 256], step: 8}}}}
          - {{kind: moe, n_experts: 4, d_expert: {{int: [8, 64], step: 8}}, router: {{top_k: 2}}}}
objectives: [{loss}, total_params]
data: {{files: [corpus.txt]}}
train: {{tokens: 256, context: 16, batch: 4, val_tokens: 64}}
search:
  {{trials: {trials}, seed: {seed}, sampler: random, time_limit: {limit}, early_stopping: {stopping}}}
"""
SLOW = '''"""Validation loss, after a pause."""
import time
direction = "minimize"
unit = "nats"
needs = "training"
def measure(subject):
    """Return it."""
    time.sleep({pause})
    return subject.training.val_loss
'''
WAIT_S = 240.0
"""A process that has not ended by then hangs."""
ENDS = {0, 3, 4, 6, 129, 130, 143}
"""Exit codes that the documents name for a run of a valid space."""


@dataclass
class Outcome:
    """The outcome of one kind of fault."""

    name: str
    tried: int = 0
    survived: int = 0
    problems: list[str] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    """Seconds from the start of a resuming process to its first word on a trial."""
    seconds: float = 0.0

    def take(self, faults: int, problems: list[str]) -> None:
        """Take in a study after some faults, and what is wrong with it."""
        self.tried += faults
        self.survived += faults if not problems else 0
        self.problems += problems


class Arena:
    """A study in a folder of its own."""

    def __init__(
        self,
        random: Random,
        *,
        url: str | None = None,
        trials: int = 10,
        pause: float | None = None,
        limit: float = 60.0,
        stopping: str = "none",
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="moenas-chaos-")).resolve()
        self.study = f"s{random.randrange(10**9)}"
        self.url = url or f"sqlite:///{self.folder}/moenas.db"
        self.trials = trials
        lines = "".join(f"line {i} of {i * i}\n" for i in range(600))
        (self.folder / "corpus.txt").write_text(lines)
        loss = "val_loss"
        if pause is not None:
            (self.folder / "slow.py").write_text(SLOW.format(pause=pause))
            loss = "./slow.py"
        text = SPACE.format(
            study=self.study,
            trials=trials,
            seed=random.randrange(1000),
            loss=loss,
            limit=limit,
            stopping=stopping,
        )
        (self.folder / "s.yaml").write_text(text)
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                wait(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, *words: str, fault: str = "", **more: Any) -> subprocess.Popen[str]:
        """Start `moenas run`, or another command, in the folder."""
        command = words or ("run", "s.yaml", "--workers", "inline", "--storage", self.url)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            MARK: str(self.folder),
            "CHAOS_FAULT": fault or "none::0:",
            **more.pop("environment", {}),
        }
        process = subprocess.Popen(
            [sys.executable, str(HERE / "failpoints.py"), *command],
            cwd=self.folder,
            env=environment,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )
        self._started.append(process)
        return process

    def resume(self, outcome: Outcome, *words: str) -> list[str]:
        """Run the study to its end, and return what is wrong with it."""
        began = time.monotonic()
        process = self.start(*words)
        assert process.stderr is not None
        lines: list[str] = []
        first = None
        for line in process.stderr:
            lines.append(line)
            if first is None and re.match(r"\[ *\d+/\d+\]", line):
                first = time.monotonic() - began
        if first is not None:
            outcome.recovery.append(first)
        code = wait(process)
        faults = [f"the last run ends with {code}: {''.join(lines)[-800:]}"] if code else []
        return faults + traceback_in("".join(lines)) + self.wrong()

    def wrong(self) -> list[str]:
        """Return what is wrong with the finished study."""
        deadline = time.monotonic() + 15
        while True:
            faults = problems(self.url, self.folder, self.study, self.trials)
            left = any(text.startswith("process") for text in faults)
            if not left or time.monotonic() > deadline:
                return [f"{self.study}: {text}" for text in faults]
            time.sleep(0.5)

    def finished(self) -> int:
        """Return how many trials have an evaluation."""
        engine = sqlalchemy.create_engine(self.url)
        try:
            with engine.connect() as connection:
                statement = sqlalchemy.text(
                    "SELECT count(*) FROM moenas_evaluation WHERE study = :study"
                )
                return int(connection.execute(statement, {"study": self.study}).scalar_one())
        except sqlalchemy.exc.DBAPIError:
            return 0
        finally:
            engine.dispose()

    def until(self, trials: int, process: subprocess.Popen[str]) -> bool:
        """Wait until so many trials are finished; False if the process ends before."""
        deadline = time.monotonic() + WAIT_S
        while process.poll() is None and time.monotonic() < deadline:
            if self.finished() >= trials:
                return True
            time.sleep(0.05)
        return False


def wait(process: subprocess.Popen[str]) -> int:
    """Return the exit code of a process; one that hangs is killed and gives -1000."""
    try:
        return process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -1000
    finally:
        for stream in (process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                stream.close()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a process that comes to its end by itself."""
    try:
        out, err = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return -1000, out or "", err or ""
    return process.returncode, out or "", err or ""


def traceback_in(text: str) -> list[str]:
    """Return a problem if a text holds a traceback or an internal error."""
    for word in ("Traceback (most recent call last)", "internal error"):
        if word in text:
            return [f"{word}: {text[-1200:]}"]
    return []


def died_early(code: int) -> bool:
    """Whether a signal ended the process before Python could heed it."""
    return code in {-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}
