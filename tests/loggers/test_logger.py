"""A logger harms no run: its failure is one warning, and its delay holds up no trial."""

from __future__ import annotations

import threading

import pytest
from small_studies import moe_study

from moenas.loggers import logger as logger_module
from moenas.loggers.logger import Logger
from moenas.loggers.trial_log import TrialLog
from moenas.study.launch import Event, run

pytestmark = pytest.mark.integration


class Recorder(Logger):
    tool = "a recorder"

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        self.written: list[TrialLog] = []
        self.finished = 0
        self.fails_at = fails_at

    def write(self, trial: TrialLog) -> None:
        if len(self.written) == self.fails_at:
            raise OSError("the disk of the tool is full")
        self.written.append(trial)

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.usefixtures("jobs", "study_folder")
def test_each_evaluated_trial_is_written_once_before_the_run_returns() -> None:
    recorder = Recorder()
    study = run(moe_study(), trials=4, workers="inline", listeners=[recorder])

    evaluated = [e.trial for e in study.view.evaluations if not e.is_copy and e.values]
    assert [log.facts["trial"] for log in recorder.written] == evaluated
    assert recorder.finished == 1
    assert recorder.close() is None
    assert recorder.finished == 1


@pytest.mark.usefixtures("jobs", "study_folder")
@pytest.mark.parametrize("at", [0, 3])
def test_a_failing_logger_is_one_warning(at: int) -> None:
    """Trial 3 is the last one, so that its failure is known at the end of the run alone."""
    events: list[Event] = []
    recorder = Recorder(fails_at=at)

    study = run(moe_study(), trials=4, workers="inline", listeners=[recorder, events.append])

    assert study.finished == "trials"
    texts = [event.text for event in events if event.kind == "warning"]
    assert texts == [
        "the logger of a recorder fails and gets no further events: OSError: the disk of the tool"
        " is full"
    ]
    assert recorder.close() is None


@pytest.mark.usefixtures("jobs", "study_folder")
def test_a_tool_that_hangs_delays_the_end_of_a_run_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logger_module, "WAIT_S", 0.2)
    answer = threading.Event()

    class Hanging(Recorder):
        def write(self, trial: TrialLog) -> None:
            answer.wait()

    hanging, events = Hanging(), list[Event]()
    study = run(moe_study(), trials=4, workers="inline", listeners=[hanging, events.append])
    answer.set()

    assert study.finished == "trials"
    (text,) = [event.text for event in events if event.kind == "warning"]
    assert "TimeoutError: not everything is written after 0 s" in text


def test_a_with_statement_warns_of_what_no_run_was_told() -> None:
    recorder = Recorder(fails_at=0)
    log = TrialLog("s", "trial-0", "complete", {}, {}, {}, [], [], 1, {})
    with pytest.warns(UserWarning, match="the logger of a recorder fails: OSError"), recorder:
        recorder._put(log)
