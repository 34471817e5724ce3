"""Calibrations in the database: each is read for its own parts and workload alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from concurrency import together

from moenas.records import Calibration, StudyRecord
from moenas.report.summary import status_report, status_text
from moenas.store import calibrations
from moenas.store.store import Store

MADE = Calibration(
    objective="decode_ms",
    unit="ms/step",
    workload="AMD EPYC, phase decode, batch 8",
    settings={"phase": "decode", "batch": 8, "context": 128, "dtype": "float32", "threads": 1},
    space="s",
    parts_sha256="a" * 64,
    device={"name": "AMD EPYC"},
    versions={"torch": "2"},
    reference_ms=4.0,
    coefficients={"model": 0.1, "layers": 0.05},
    highest={"model": 1.0, "layers": 4.0},
    log_error=0.1,
    coverage=0.9,
    fitted={"models": 17, "blocks": 17},
    held_out=[
        {"fingerprint": "f", "predicted": 1.0, "measured": 1.05, "spread": 0.01, "role": "test"},
        {"fingerprint": "g", "predicted": 1.0, "measured": 1.3, "spread": 0.02, "role": "test"},
        {"fingerprint": "h", "predicted": 1.0, "measured": 9.0, "spread": 0.1, "role": "interval"},
    ],
    made_at="2026-11-27T20:00:00+00:00",
    seconds=100.0,
)


def test_the_newest_one_of_the_same_parts_and_workload_is_kept(database_url: str) -> None:
    store = Store.open(database_url, create=True)
    calibrations.add(store, MADE)
    assert calibrations.of_workload(store, MADE.parts_sha256, MADE.workload) == MADE
    later = replace(MADE, reference_ms=5.0)
    calibrations.add(store, later)
    assert calibrations.of_workload(store, MADE.parts_sha256, MADE.workload) == later
    assert calibrations.workloads(store, MADE.parts_sha256, "decode_ms") == [MADE.workload]


def test_a_study_keeps_the_calibration_that_it_took_first(database_url: str) -> None:
    store = Store.open(database_url, create=True)
    for name in ("x", "y"):
        store.create_study(StudyRecord(name, "", [], {}, "", [], {}, {}, 1))
    parts, workload = MADE.parts_sha256, MADE.workload
    assert calibrations.of_study(store, "x", parts, workload) is None
    calibrations.add(store, MADE)
    assert calibrations.of_study(store, "x", parts, workload) == MADE
    later = replace(MADE, reference_ms=5.0)
    calibrations.add(store, later)
    assert calibrations.of_study(store, "x", parts, workload) == MADE
    assert calibrations.of_study(store, "y", parts, workload) == later
    assert calibrations.of_study(store, "y", parts, f"{workload}0") is None


def test_the_status_shows_the_calibration_of_a_study_and_that_there_is_a_newer_one(
    database_url: str,
) -> None:
    store = Store.open(database_url, create=True)
    store.create_study(StudyRecord("x", "", [], {}, "", [], {}, {}, 1))
    assert calibrations.kept(store, "x") == []
    calibrations.add(store, MADE)
    calibrations.of_study(store, "x", MADE.parts_sha256, MADE.workload)
    (row,) = calibrations.kept(store, "x")
    assert row["objective"] == "decode_ms"
    assert row["made_at"] == row["newest_made_at"] == MADE.made_at
    line = "decode_ms is predicted by the calibration of 2026-11-27T20:00:00+00:00 on AMD EPYC"
    report = status_report(store, "x")
    assert report["calibrations"] == [row]
    assert line in status_text(report)
    assert "newer" not in status_text(report)
    calibrations.add(store, replace(MADE, made_at="2026-11-28T20:00:00+00:00"))
    shown = status_text(status_report(store, "x"))
    assert line in shown
    assert "the one of 2026-11-28T20:00:00+00:00 is newer; --accept-changes takes it" in shown


def test_another_workload_or_other_parts_have_none(database_url: str) -> None:
    store = Store.open(database_url, create=True)
    calibrations.add(store, MADE)
    assert calibrations.of_workload(store, MADE.parts_sha256, f"{MADE.workload}0") is None
    assert calibrations.of_workload(store, "b" * 64, MADE.workload) is None
    assert calibrations.workloads(store, "b" * 64, "decode_ms") == []
    assert calibrations.workloads(store, MADE.parts_sha256, "prefill_ms") == []


def test_a_reader_of_an_older_schema_finds_none_and_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    store = Store.open(url, create=True)
    with store.engine.begin() as connection:
        for table in ("calibration", "study_calibration"):
            connection.exec_driver_sql(f"DROP TABLE moenas_{table}")
        connection.exec_driver_sql("UPDATE moenas_alembic_version SET version_num = '0009'")
    store.engine.dispose()
    old = Store.open(url)
    assert calibrations.of_workload(old, MADE.parts_sha256, MADE.workload) is None
    assert calibrations.workloads(old, MADE.parts_sha256, "decode_ms") == []
    assert calibrations.kept(old, "x") == []
    old.engine.dispose()
    migrated = Store.open(url, create=True)
    calibrations.add(migrated, MADE)
    assert calibrations.of_workload(migrated, MADE.parts_sha256, MADE.workload) == MADE


def test_the_quality_is_that_of_the_models_outside_fit_and_interval() -> None:
    assert [row["fingerprint"] for row in MADE.tested] == ["f", "g"]
    assert MADE.covered == 1
    assert MADE.median_error == ((1 - 1 / 1.05) + (1 - 1 / 1.3)) / 2


def add_often(url: str, barrier: Any, index: int) -> int:
    """Store the calibration of one key ten times."""
    store = Store.open(url)
    barrier.wait()
    for round_number in range(10):
        calibrations.add(store, replace(MADE, seconds=float(10 * index + round_number)))
    return index


def test_processes_that_store_the_same_calibration_do_not_fail(database_url: str) -> None:
    store = Store.open(database_url, create=True)
    assert together(add_often, database_url, 3) == [0, 1, 2]
    kept = calibrations.of_workload(store, MADE.parts_sha256, MADE.workload)
    assert kept is not None
    assert kept.seconds in {9.0, 19.0, 29.0}
