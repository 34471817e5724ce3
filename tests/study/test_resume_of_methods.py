"""Each sampler with and without early stopping: a killed study goes on, with exact totals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies import assert_sound, fake, params
from studies import space as small_space
from test_paused_candidates import (
    HALVING,
    POINTS,
    PREDICTIVE,
    assert_no_leftovers,
    halving,
    killed_run,
    stand_in,
    trained,
)

from moenas.search.trials import OptunaTrials
from moenas.space.sections import SAMPLERS
from moenas.space.space import Space
from moenas.store import rungs as rung_rows
from moenas.store.study_store import StudyStore
from moenas.study import doctor
from moenas.study.launch import load_study, run
from moenas.study.result_processing import ResultProcessor
from moenas.workers.pool import Inline

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

OF_THE_USER = "mine.py:Mine"
"""A class of the user's, which keeps state in a run."""
PHASES = {
    "a trial has no parameters yet": (OptunaTrials, "ask"),
    "its parameters are drawn, and not stored": (OptunaTrials, "draw"),
    "they are stored, and no job is started": (OptunaTrials, "set_constraints"),
    "the job has run": (None, ""),
    "the weights are there, and the row is not": (ResultProcessor, "evaluation"),
    "the row is there, and Optuna is not told": (StudyStore, "record"),
    "Optuna is told": (OptunaTrials, "tell"),
}
STOPPING = {"successive_halving": HALVING, "predictive": PREDICTIVE}
KILLED_RUNS = 3
"""Runs that are killed before the one that may end."""


def space(sampler: str, stopping: str) -> Space:
    """A study of 14 trials whose candidates have rungs after 4 and 8 of 12 steps."""
    text = halving(STOPPING[stopping], objectives="[val_loss, flops_per_token]").text
    return Space.parse(text.replace("sampler: random", f"sampler: {sampler}"), "s.yaml")


@pytest.fixture
def user_sampler(study_folder: None) -> None:
    text = "from optuna.samplers import RandomSampler\nclass Mine(RandomSampler): pass\n"
    Path("mine.py").write_text(text)


@pytest.mark.usefixtures("user_sampler")
@pytest.mark.parametrize("sampler", [*SAMPLERS, OF_THE_USER])
def test_a_study_that_is_killed_in_every_phase_asks_what_a_whole_one_asks(sampler: str) -> None:
    of = small_space().with_search(sampler=sampler, trials=16)
    whole = run(of, pool=Inline(fake), storage="sqlite:///whole.db")
    for phase in PHASES.values():
        assert killed_run(of, *phase, 2, fake) == signal.SIGKILL
    study = run(of, pool=Inline(fake))
    assert_sound(study, 16)
    assert doctor.examine(study.store, "s") == []
    if sampler != OF_THE_USER:
        assert params(study) == params(whole)


@pytest.mark.usefixtures("user_sampler")
@pytest.mark.parametrize("stopping", STOPPING)
@pytest.mark.parametrize("sampler", [*SAMPLERS, OF_THE_USER])
def test_a_study_that_is_killed_in_the_middle_of_a_rung_has_exact_totals(
    sampler: str, stopping: str
) -> None:
    of = space(sampler, stopping)
    for point in ("the checkpoint is there, and its row is not", "a job runs"):
        assert killed_run(of, *POINTS[point], 5) == signal.SIGKILL
    study = run(of, pool=Inline(stand_in))
    assert_sound(study, 14)
    # Each kill costs the rung in hand once, and no other rung is trained again.
    assert sum(trained().values()) - len(trained()) <= 2
    assert_no_leftovers(study)
    assert not rung_rows.pauses(study.store, "s")
    assert doctor.examine(study.store, "s") == []


@pytest.mark.parametrize("stopping", ["successive_halving", "predictive"])
def test_a_study_on_ray_that_is_killed_at_rungs_has_exact_totals(stopping: str) -> None:
    of = space("random", stopping)
    Path("s.yaml").write_text(of.text)
    words = [sys.executable, "-m", "moenas", "run", "s.yaml", "--workers", "2"]
    for seen in range(1, KILLED_RUNS + 1):
        driver = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
        )
        # Kill it once more rungs are stored than at the kill before.
        while driver.poll() is None and stored_rungs() < 4 * seen:
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    subprocess.run(words, check=True, capture_output=True)
    study = load_study("s")
    assert_sound(study, 14)
    statuses = {e.status for e in study.view.evaluations}
    assert statuses == {"complete", "stopped"}
    assert_no_leftovers(study)
    assert not rung_rows.pauses(study.store, "s")
    assert doctor.examine(study.store, "s") == []


def stored_rungs() -> int:
    """Results at rungs that the database holds; 0 before there is a study."""
    try:
        study = load_study("s")
    except Exception:
        return 0
    return len(rung_rows.results(study.store, "s"))
