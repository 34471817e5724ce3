"""What a run tells others: loggers and the command at its end, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moenas.cli import watching
from moenas.cli.options import command_line
from moenas.report.summary import status_report
from moenas.store.store import Store

SPACE = """\
name: watched
architecture:
  vocab_size: 256
  d_model: {choice: [16, 24, 32, 40]}
  blocks:
    - mixer: {kind: attention, head_dim: 8}
      ffn: {kind: dense, d_ff: 32}
objectives: [val_loss, flops_per_token]
data: {files: [corpus.txt]}
train: {tokens: 1024, context: 16, batch: 4, val_tokens: 256}
search: {trials: 2, sampler: random}
"""
INLINE = ("--workers", "inline")
TELL = "env | grep ^MOENAS_ > told-$MOENAS_STATE; echo told"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "corpus.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(800)))
    (tmp_path / "watched.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    for name in ("MOENAS_STORAGE", "OPTUNA_STORAGE", "MOENAS_RUNS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def moenas(*words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "moenas", "run", "watched.yaml", *words]
    return subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)


def told(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def test_the_end_of_a_run_is_told_once_with_its_counts(folder: Path) -> None:
    done = moenas(*INLINE, "--on-end", TELL, "-o", "json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)  # the output of the command goes to stderr
    assert done.stderr.splitlines().count("told") == 1
    message = told(folder / "told-finished")
    assert message["MOENAS_STUDY"] == "watched"
    assert message["MOENAS_STATE"] == "finished"
    assert (message["MOENAS_TOTAL"], message["MOENAS_EVALUATED"]) == ("2", "2")
    stored = status_report(Store.open(None), "watched")  # copies are complete trials, too
    for name in ("complete", "failed", "stopped", "infeasible"):
        assert message[f"MOENAS_{name.upper()}"] == str(stored[name])
    assert int(message["MOENAS_FRONT"]) == len(json.loads(done.stdout))
    assert message["MOENAS_MESSAGE"] == "all 2 trials of study 'watched' are finished"


def test_a_failing_command_is_a_warning(folder: Path) -> None:
    done = moenas(*INLINE, "--on-end", "exit 3")
    assert done.returncode == 0
    assert "warning: the command of --on-end failed: exit code 3" in done.stderr


def test_an_interrupted_run_is_told_too(folder: Path) -> None:
    words = [sys.executable, "-m", "moenas", "run", "watched.yaml", "--workers", "inline"]
    process = subprocess.Popen(
        [*words, "--trials", "1000", "--on-end", TELL],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    while not lines[-1].startswith("[") and lines[-1]:
        lines.append(process.stderr.readline())
    os.kill(process.pid, signal.SIGINT)
    deadline = time.monotonic() + 60
    rest = process.communicate(timeout=deadline - time.monotonic())[1]

    assert process.returncode == 130, rest
    message = told(folder / "told-interrupted")
    assert message["MOENAS_TOTAL"] == "1000"
    assert rest.splitlines().count("told") == 1
    assert "--on-end 'env | grep" in rest  # the command that resumes tells of its end, too


def test_a_run_that_is_refused_tells_nobody_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = moenas("--on-end", TELL, "--log", "tensorbord")
    assert done.returncode == 2
    assert "no tool 'tensorbord'" in done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_run_logs_to_tensorboard(folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra moenas[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = moenas(*INLINE, "--log", "tensorboard:board", "-o", "json")

    assert done.returncode == 0, done.stderr
    member = json.loads(done.stdout)[0]
    read = EventAccumulator(str(folder / "board" / "watched" / f"trial-{member['trial']}"))
    read.Reload()
    (logged,) = read.Scalars("value/val_loss")
    assert logged.value == pytest.approx(member["val_loss"])


FRAGILE = """\
\"\"\"A number that cannot be had the first time.\"\"\"

from pathlib import Path

direction = "minimize"
unit = ""
needs = "cost"


def measure(subject):
    if not Path("tried").exists():
        Path("tried").touch()
        raise RuntimeError("the first time")
    return 1.0
"""


def test_a_retry_logs_the_trials_that_it_evaluates(folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra moenas[tensorboard] is not installed")
    (folder / "fragile.py").write_text(FRAGILE)
    text = SPACE.replace("flops_per_token]", "./fragile.py]")
    (folder / "watched.yaml").write_text(text.replace("random", "grid"))  # no model comes twice
    assert moenas(*INLINE).returncode == 0
    evaluations = Store.open(None).evaluations("watched")
    (failed,) = (e.trial for e in evaluations if e.failure and e.failure.kind == "error")
    words = ["retry", "watched", "--failed", "error", "--log", "tensorboard:board", *INLINE]
    command = [sys.executable, "-m", "moenas", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    logged = {path.name for path in (folder / "board" / "watched").iterdir()}
    assert logged == {f"trial-{failed}", "study"}, "the trial that had failed, and no other"


@pytest.mark.parametrize(("option", "value"), [("--log", "wandb"), ("--on-end", "true")])
def test_a_server_decides_what_is_told(option: str, value: str, folder: Path) -> None:
    done = moenas(option, value, "--server", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "a server decides this for its studies; leave it out" in done.stderr


def test_the_command_at_the_end_is_not_sent_to_a_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOENAS_SERVER", "http://127.0.0.1:9")
    done = moenas(*INLINE, "--storage", "sqlite:///own.db", "--on-end", TELL)
    assert done.returncode == 0, done.stderr
    variables = told(folder / "told-finished")
    assert "MOENAS_SERVER" not in variables
    assert variables["MOENAS_STORAGE"] == "sqlite:///own.db"


def test_a_command_that_takes_too_long_ends_with_what_it_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LIMIT_S", 0.5)
    with pytest.raises(subprocess.TimeoutExpired):
        watching._run_command("(sleep 3; touch survived); true", {})
    time.sleep(4)
    assert not (folder / "survived").exists()


def test_hints_hide_passwords() -> None:
    options = {
        "storage": "postgresql://u:one@h/d",
        "server": "https://u:two@h",
        "log": ["mlflow:https://u:three@h", "tensorboard:logs"],
    }
    hint = command_line(["run", "tiny"], options)
    assert not any(word in hint for word in ("one", "two", "three"))
    assert "--log tensorboard:logs" in hint
