"""The trials that run and the pace of a run, as another reader of the database sees them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select
from studies import fake, press_ctrl_c, space

from moenas.records import Job, Plain
from moenas.report.summary import counted_studies, listed_studies, status_report, status_text
from moenas.store import tables
from moenas.store.store import Store
from moenas.study.launch import Interrupted, run
from moenas.workers.pool import Inline

pytestmark = pytest.mark.usefixtures("study_folder")


def test_the_trials_that_run_and_the_pace_are_read_meanwhile() -> None:
    seen: list[tuple[int, Plain, str]] = []

    def stand_in(job: Job) -> Any:
        store = Store.open(None)
        seen.append((job.trial, status_report(store, "s"), listed_studies(store)[0]["state"]))
        return fake(job)

    study = run(space(), trials=4, pool=Inline(stand_in))

    assert len(seen) == 4
    for trial, report, state in seen:
        assert state == report["state"] == "running"
        assert [row["trial"] for row in report["running"]] == [trial]
        assert report["running"][0]["started_at"].endswith("+00:00")
        assert f"running trials (UTC): {trial} since " in status_text(report)
    last = status_report(study.store, "s")
    assert last["running"] == []
    assert last["seconds_left"] is None
    per_hour = 3600 * 4 / last["spent"]["wall_seconds"]
    assert last["candidates_per_hour"] == pytest.approx(per_hour)
    assert "latest pace: " in status_text(last)
    assert counted_studies(listed_studies(study.store))[0]["state"] == "finished"


def test_the_time_left_follows_the_pace_of_this_run_alone() -> None:
    run(space(), trials=2, pool=Inline(fake))
    reports: list[Plain] = []

    def stand_in(job: Job) -> Any:
        reports.append(status_report(Store.open(None), "s"))
        return fake(job)

    run(space(), trials=4, pool=Inline(stand_in))

    assert reports[0]["candidates_per_hour"] is None, "nothing is evaluated in this run"
    assert reports[0]["seconds_left"] is None


def test_a_run_that_evaluates_nothing_keeps_the_pace() -> None:
    study = run(space(), trials=4, pool=Inline(fake))
    before = status_report(study.store, "s")["candidates_per_hour"]
    assert before > 0

    for _ in range(2):
        run(space(), trials=4, pool=Inline(fake))
        assert status_report(study.store, "s")["candidates_per_hour"] == before

    run(space(), trials=5, pool=Inline(fake))
    after = status_report(study.store, "s")["candidates_per_hour"]
    runs = study.store.query(
        lambda c: c.scalars(select(tables.run.c.seconds).order_by(tables.run.c.began_at)).all()
    )
    assert len(runs) == 4
    assert after == pytest.approx(3600 / runs[-1]), "one candidate, in the latest run"


def test_a_trial_of_an_interrupted_run_does_not_run() -> None:
    def stand_in(job: Job) -> Any:
        if job.trial:
            press_ctrl_c()
        return fake(job)

    with pytest.raises(Interrupted):
        run(space(), trials=4, pool=Inline(stand_in))
    report = status_report(Store.open(None), "s")
    assert report["state"] == "stopped"
    assert report["running"] == []
    assert report["seconds_left"] is None
    reports: list[Plain] = []

    def watched(job: Job) -> Any:
        reports.append(status_report(Store.open(None), "s"))
        return fake(job)

    run(space(), trials=4, pool=Inline(watched))
    assert all(len(one["running"]) == 1 for one in reports)
