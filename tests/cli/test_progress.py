"""What a run shows: a line for each trial that is over, or a board that a terminal redraws."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import moenas
from moenas.cli.progress import LiveProgress, duration, line, listener, print_progress
from moenas.records import Evaluation, Failure
from moenas.study.events import Event, Kind
from moenas.study.progress import Progress

UNITS = {"val_loss": "nats/token", "flops_per_token": "FLOPs"}


def event(kind: Kind, trial: int | None, text: str = "16d", **more: object) -> Event:
    best = {"val_loss": 2.25, "flops_per_token": 123456.0}
    progress = Progress(12, 1, 9, 7, 1, 1, 0, best, front=3, hypervolume=1.0, eta_s=75.0)
    if not more:
        return Event(kind, trial, text, None, progress)
    assert trial is not None
    evaluation = Evaluation("study", trial, 1, fingerprint="f", **more)  # type: ignore[arg-type]
    return Event(kind, trial, text, evaluation, progress)


COMPLETE = event(
    "finished", 8, status="complete", values={"flops_per_token": 123456.0, "val_loss": 2.25}
)
FAILED = event("finished", 9, status="failed", failure=Failure("diverged", "loss is nan"))
INFEASIBLE = event("infeasible", 3, status="infeasible", violations={"d_model < 9": 0.5})


def test_a_trial_is_one_line() -> None:
    assert line(COMPLETE) == (
        "[ 9/12] trial 8 val_loss 2.25  flops_per_token 123k  | 16d | front 3, 1 min 15 s left"
    )
    assert line(FAILED) == "[ 9/12] trial 9 failed: diverged: loss is nan | 16d | 1 min 15 s left"
    assert line(INFEASIBLE) == (
        "[ 9/12] trial 3 infeasible: breaks d_model < 9 | 16d | 1 min 15 s left"
    )
    assert line(event("retried", 4, "it died")) == "[ 9/12] trial 4 retried: it died"
    assert line(event("done", None, "all")) == "[ 9/12] done: all"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599.0, "59 min 59 s"), (7260.0, "2 h 01 min")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_go_to_stderr_and_starts_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with listener("study", UNITS) as listen:  # pytest's stderr is no terminal
        listen(event("started", 8))
        listen(COMPLETE)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [line(COMPLETE)]


def test_a_run_from_python_tells_its_trials_by_the_public_listener(
    capsys: pytest.CaptureFixture[str],
) -> None:
    moenas.print_progress(COMPLETE)
    assert capsys.readouterr().err == line(COMPLETE) + "\n"


def test_a_closed_stderr_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    print_progress(COMPLETE)


def shown(board: LiveProgress) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    with console.capture() as captured:
        console.print(board)
    return captured.get()


def test_the_board_shows_what_runs_and_what_came_of_it() -> None:
    board = LiveProgress("study", UNITS)
    assert "study: starting" in shown(board)
    board.on_event(event("started", 8, "the eighth"))
    board.on_event(event("started", 10, "the tenth"))
    assert "> trial 8" in shown(board)
    assert "> trial 10" in shown(board)
    board.on_event(COMPLETE)
    text = shown(board)
    assert "> trial 8" not in text
    assert "> trial 10" in text
    assert "9/12 trials, 7 complete, 1 failed, 1 infeasible" in text
    assert "front of 3; best val_loss 2.25 nats/token" in text
    for _ in range(20):
        board.on_event(FAILED)
    assert len(shown(board).splitlines()) < 12, "old lines make room"
