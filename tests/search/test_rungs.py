"""What candidates at a rung are expected to have at the end."""

from __future__ import annotations

import pytest

from moenas.records import Evaluation, RungResult
from moenas.search.rungs import Rungs


def rungs(at_rungs: dict[int, list[float]], ends: dict[int, float]) -> Rungs:
    """Return the rungs of trials with these losses at them, and at the end."""
    known = Rungs()
    for trial, losses in at_rungs.items():
        for rung, loss in enumerate(losses, 1):
            result = RungResult(trial, rung, 100 * rung, loss, {"decode_ms": 1.0 + trial})
            known.add(result, {}, {})
    for trial, loss in ends.items():
        metrics = {"val_loss": loss}
        known.complete[trial] = Evaluation("s", trial, 1, "complete", "", metrics=metrics)
    return known


def test_the_loss_falls_as_in_candidates_that_were_trained_on() -> None:
    """By hand: from rung 1 to 2 by 0.1 and 0.3, from rung 2 to the end by 0.05."""
    known = rungs({1: [3.0, 2.9], 2: [3.2, 2.9], 3: [3.1], 4: [3.3]}, {1: 2.85})
    estimates = known.estimates()
    assert sorted(estimates) == [2, 3, 4]
    assert estimates[2].values == {"decode_ms": 3.0, "val_loss": pytest.approx(2.85)}
    assert estimates[2].variance == 0, "one candidate has no variance"
    assert estimates[3].values["val_loss"] == pytest.approx(3.1 - 0.2 - 0.05)
    assert estimates[3].variance == pytest.approx(0.02)
    assert estimates[4].values["val_loss"] == pytest.approx(3.3 - 0.2 - 0.05)


def test_losses_of_two_rungs_compare_before_a_candidate_is_complete() -> None:
    estimates = rungs({1: [3.0, 2.6], 2: [2.9]}, {}).estimates()
    assert estimates[1].values["val_loss"] == pytest.approx(2.6)
    assert estimates[2].values["val_loss"] == pytest.approx(2.5)


def test_without_a_candidate_that_was_trained_on_the_loss_stays() -> None:
    estimates = rungs({1: [3.0], 2: [2.9]}, {5: 2.0}).estimates()
    assert {t: e.values["val_loss"] for t, e in estimates.items()} == {1: 3.0, 2: 2.9}
    assert Rungs().estimates() == {}


def test_a_forgotten_trial_has_no_estimate() -> None:
    known = rungs({1: [3.0, 2.6], 2: [2.9]}, {})
    known.forget(1)
    assert sorted(known.estimates()) == [2]
