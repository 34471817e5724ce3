"""The state of a study that a command ran, and its front as plain data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import made_up_views
import stored_studies

from moenas.report.front_report import front_report, front_rows
from moenas.report.summary import command_state, listed_studies
from moenas.service import study_views
from moenas.store.submissions import StudyFilter


def test_a_study_without_a_stored_end_has_one_state_everywhere(tmp_path: Path) -> None:
    view = made_up_views.view(6, 2)
    done = replace(view, study=replace(view.study, trials=1))
    store = stored_studies.shelve(tmp_path, done)
    assert store.ended("made_up") is None
    assert command_state(store, "made_up") == "finished"
    assert [row["state"] for row in listed_studies(store)] == ["finished"]
    page = study_views.study_page(store, StudyFilter(), after=None, limit=5, with_summary=True)
    assert [(row.state, row.summary and row.summary.state) for row in page.studies] == [
        ("finished", "finished")
    ]


def test_the_rows_of_a_front_follow_from_its_report(tmp_path: Path) -> None:
    view = made_up_views.view(6, 2)
    store = stored_studies.shelve(tmp_path, view)
    report = front_report(store, "made_up")
    assert [row["trial"] for row in front_rows(report)] == view.front
    assert all(
        row["architecture"] == view.architectures[row["trial"]] for row in front_rows(report)
    )
