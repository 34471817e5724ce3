"""Each sampler with each early stopping: a killed study goes on, with exact totals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies import assert_sound
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

from moenas.space.sections import SAMPLERS
from moenas.space.space import Space
from moenas.store import rungs as rung_rows
from moenas.study import doctor
from moenas.study.launch import load_study, run
from moenas.workers.pool import Inline

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

STOPPING = {"none": "none", "successive_halving": HALVING, "predictive": PREDICTIVE}
KILLED_RUNS = 3
"""Runs that are killed before the one that may end."""


def space(sampler: str, stopping: str) -> Space:
    """A study of 14 trials whose candidates have rungs after 4 and 8 of 12 steps."""
    text = halving(STOPPING[stopping], objectives="[val_loss, flops_per_token]").text
    return Space.parse(text.replace("sampler: random", f"sampler: {sampler}"), "s.yaml")


@pytest.mark.parametrize("stopping", ["successive_halving", "predictive"])
@pytest.mark.parametrize("sampler", SAMPLERS)
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
