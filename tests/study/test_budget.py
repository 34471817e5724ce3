"""A study ends when a budget of `search.stop` is used up, and goes on with a larger one."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from studies import ARCHITECTURE, SMALL, assert_sound, counts, fake, params, scripted, space

from moenas.errors import NoCandidateError, SpaceError
from moenas.pareto import hypervolume
from moenas.records import Evaluation, Failure, Job
from moenas.report.summary import status_report, status_text
from moenas.space.space import Space
from moenas.store.spending import spending
from moenas.store.store import Store
from moenas.study.launch import Event, Study, load_study, run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

TOKENS = 512
"""Training tokens of a candidate of `studies`."""


def stopping(stop: str, architecture: str = ARCHITECTURE, name: str = "s") -> Space:
    parsed = space(architecture, name=name)
    text = parsed.text.replace("search: {", f"search: {{stop: {stop}, ").replace(
        "trials: 6", "trials: 40"
    )
    return Space.parse(text, "s.yaml")


def trained(job: Job, tokens: int = TOKENS) -> Evaluation:
    """A stand-in for an evaluation, with a learning curve of `tokens`."""
    curve = [{"tokens": tokens // 2, "train_loss": 3.0}, {"tokens": tokens, "train_loss": 2.0}]
    return dataclasses.replace(fake(job)[0], curve=curve)


def flops_of(study: Study) -> float:
    """Three times the forward operations of the tokens of each trained candidate, by hand."""
    return sum(
        3 * e.cost["flops_per_token"] * e.curve[-1]["tokens"]
        for e in study.view.evaluations
        if e.curve and not e.is_copy
    )


def ended(study: Study) -> tuple[str, str]:
    report = status_report(study.store, study.name)
    return report["ended"], status_text(report).splitlines()[0]


def test_training_tokens_end_a_study_and_more_of_them_take_it_on() -> None:
    pool = scripted(trained)
    events: list[Event] = []
    study = run(stopping("{train_tokens: 2_000}"), pool=pool, listeners=[events.append])
    # Two run at a time: the fourth reaches the budget, and the one that runs then is finished.
    assert len(study.view.evaluations) == 5
    assert study.finished == "train_tokens"
    assert spending(study.store, "s").train_tokens == 5 * TOKENS
    assert ended(study)[1] == (
        "s: done, the training tokens of search.stop are used up; 5 of 40 trials evaluated"
    )
    assert events[-1].kind == "done"
    assert events[-1].text == (
        "study 's' ends: it spent 2.56e+03 training tokens, search.stop.train_tokens is 2e+03"
    )
    assert all(t.state.name == "COMPLETE" for t in study.optuna.trials)
    again = run(stopping("{train_tokens: 2_000}"), pool=pool)
    assert len(again.view.evaluations) == 5
    more = run(stopping("{train_tokens: 4_000}"), pool=pool)
    assert len([e for e in more.view.evaluations if not e.is_copy]) == 9
    assert_sound_at(more, 9)
    whole = run(stopping("{train_tokens: 4_000}", name="whole"), pool=scripted(trained))
    assert params(whole)[:8] == params(more)[:8], "a stop changes no proposal"


def assert_sound_at(study: Study, evaluated: int) -> None:
    """The stores agree, though the study stopped before its total."""
    study.store.set_trials(study.name, evaluated)
    assert_sound(study, evaluated)


def test_operations_of_failed_candidates_count_and_those_of_copies_do_not() -> None:
    def script(job: Job) -> Evaluation:
        if job.trial % 2:
            failure = Failure("diverged", "the loss was not finite")
            return dataclasses.replace(
                trained(job, TOKENS // 2), status="failed", values={}, failure=failure
            )
        return trained(job)

    study = run(stopping("{train_flops: 2e8}", SMALL), pool=scripted(script))
    spent = spending(study.store, "s").train_flops
    assert spent == flops_of(study)
    assert any(e.failure for e in study.view.evaluations)
    if study.finished == "train_flops":
        assert spent >= 2e8
    else:
        assert study.finished == "exhausted"
    copies = sum(e.is_copy for e in study.view.evaluations)
    assert len([e for e in study.view.evaluations if e.curve]) >= copies


def test_the_wall_time_counts_over_all_runs() -> None:
    def slow(job: Job) -> Evaluation:
        time.sleep(0.4)
        return fake(job)[0]

    first = run(stopping("{wall_time: 1s}"), pool=scripted(slow))
    assert first.finished == "wall_time"
    before = spending(first.store, "s").wall_seconds
    assert 1.0 <= before < 10.0
    count = len(first.view.evaluations)
    same = run(stopping("{wall_time: 1s}"), pool=scripted(slow))
    assert len(same.view.evaluations) == count, "the time of the first run counts"
    more = run(stopping(f"{{wall_time: {before + 1.5:.2f}}}"), pool=scripted(slow))
    assert count < len(more.view.evaluations) <= count + 6
    assert spending(more.store, "s").wall_seconds >= before + 1.5
    assert_sound_at(more, sum(map(counts, more.view.evaluations)))
    assert_sound_at(more, len([e for e in more.view.evaluations if not e.is_copy]))


KILLED = """
import os, time
from budget_of_a_killed_run import space
from studies import fake, scripted
from moenas.study import budget
from moenas.study.launch import run
budget.REPORT_S = 0.2
def slow(job):
    time.sleep(0.3)
    if job.trial == 4:
        os.kill(os.getpid(), 9)
    return fake(job)[0]
run(space, pool=scripted(slow))
"""


def test_a_killed_run_has_spent_what_it_reported() -> None:
    Path("budget_of_a_killed_run.py").write_text(
        "from studies import space as make\nspace = make().with_search(trials=40)\n"
    )
    paths = os.pathsep.join([".", str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == -9
    seconds = spending(Store.open(), "s").wall_seconds
    assert 0.9 <= seconds < 30.0
    with sqlite3.connect("moenas.db") as database:
        assert database.execute("SELECT count(*) FROM moenas_run").fetchone() == (1,)


def constant_after(trial: int) -> Callable[[Job], Evaluation]:
    """A script under which no candidate from `trial` on is better than an earlier one."""

    def script(job: Job) -> Evaluation:
        loss = 3.0 - 0.1 * min(job.trial, trial - 1)
        values = {"val_loss": loss if job.trial < trial else 3.5, "flops_per_token": 1e6}
        if job.trial == 0:
            values = {"val_loss": 4.0, "flops_per_token": 2e6}
        return dataclasses.replace(fake(job)[0], values=values)

    return script


def test_a_front_that_stops_growing_ends_a_study() -> None:
    wanted = stopping("{plateau: {trials: 5, improvement: 0.01}}")
    study = run(wanted, pool=scripted(constant_after(6)))
    assert study.finished == "plateau"
    # Trials 6 to 10 bring nothing, and one more runs beside the last of them.
    assert len([e for e in study.view.evaluations if not e.is_copy and e.values]) in (11, 12)
    assert "the hypervolume has stopped growing" in ended(study)[1]
    values = [[e.values[n] for n in study.record.directions] for e in study.view.evaluations]
    corner = list(study.record.reference_point.values())
    volumes = [hypervolume(values[: i + 1], corner, ["minimize"] * 2) for i in range(len(values))]
    assert volumes[-1] - volumes[-6] < 0.01 * volumes[-6]
    assert volumes[-2] - volumes[-8] >= 0.01 * volumes[-8]
    count = len(study.view.evaluations)
    more = run(stopping("{plateau: {trials: 8, improvement: 0.01}}"), pool=scripted(fake_script))
    assert len(more.view.evaluations) > count


def fake_script(job: Job) -> Evaluation:
    return fake(job)[0]


def test_growth_keeps_a_study_going() -> None:
    def better(job: Job) -> Evaluation:
        values = {"val_loss": 4.0 * 0.9**job.trial, "flops_per_token": 1e6 * 0.99**job.trial}
        return dataclasses.replace(fake(job)[0], values=values)

    wanted = stopping("{plateau: {trials: 3}}").with_search(trials=15)
    assert run(wanted, pool=scripted(better)).finished == "trials"


def test_a_stop_before_a_first_candidate_is_said() -> None:
    with pytest.raises(NoCandidateError, match="before a first candidate: its runs took 0 s"):
        run(stopping("{wall_time: 0.0000001}"), pool=scripted(fake_script))
    assert load_study("s").view.evaluations == []


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("{wall_time: 2 weeks}", "stop.wall_time: '2 weeks' is not a duration; write seconds"),
        ("{wall_time: 0}", "stop.wall_time: 0.0 is not a duration"),
        ("{train_flops: 0}", "stop.train_flops: 0 is not a number of at least 1"),
        ("{plateau: {improvement: 0.1}}", "stop.plateau: 'trials' is missing"),
        ("{plateau: 50}", "stop.plateau: 50 is not a mapping"),
        ("{tokens: 1e9}", "no field of 'stop'"),
        ("5", "stop: 5 is not a mapping"),
    ],
)
def test_a_rule_that_cannot_be_read_is_located(stop: str, message: str) -> None:
    with pytest.raises(SpaceError) as refused:
        stopping(stop)
    assert str(refused.value).startswith("s.yaml:20:")
    assert message in str(refused.value)


def test_durations_have_units() -> None:
    texts = {"90": 90.0, "90s": 90.0, "1.5min": 90.0, "2h": 7200.0, "1d": 86400.0, "0.5 h": 1800.0}
    for text, seconds in texts.items():
        stop = stopping(f"{{wall_time: {text}}}").search.stop
        assert stop is not None
        assert stop.wall_seconds == seconds
    assert stopping("{train_tokens: 1e9}").sha256 == space().sha256, "a resume may change it"
