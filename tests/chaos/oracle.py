"""What must hold of a study after any fault, computed without moenas from the rows and the files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, text

UNFINISHED = ("RUNNING", "WAITING")
STATES = {"complete": "COMPLETE", "failed": "FAIL", "infeasible": "PRUNED", "stopped": "PRUNED"}
NOT_EVALUATED = ("parameters", "foreign", "sampler")
MARK = "CHAOS_FOLDER"
"""Variable in the environment of every process of a scenario."""


def problems(url: str, folder: Path, study: str, trials: int) -> list[str]:
    """Return everything that is wrong with a finished study of two minimised objectives."""
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        faults = _rows(connection, study, trials)
        if engine.dialect.name == "sqlite":
            said = connection.execute(text("PRAGMA integrity_check")).scalar_one()
            faults += [] if said == "ok" else [f"integrity_check: {said}"]
        faults += _front(connection, study) + _files(connection, folder, study)
    engine.dispose()
    return faults + _processes(folder)


def _select(connection: Connection, statement: str, study: str) -> list[Any]:
    return list(connection.execute(text(statement), {"study": study}))


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _rows(connection: Connection, study: str, trials: int) -> list[str]:
    """Compare our evaluations with Optuna's trials."""
    faults = []
    ours = {
        row.trial: row
        for row in _select(
            connection, "SELECT * FROM moenas_evaluation WHERE study = :study", study
        )
    }
    theirs = _select(
        connection,
        "SELECT t.trial_id, t.number, t.state FROM trials t JOIN studies s"
        " ON s.study_id = t.study_id WHERE s.study_name = :study ORDER BY t.number",
        study,
    )
    values = _values(connection, study)
    told: dict[int, list[float]] = {}
    for row in _select(
        connection,
        "SELECT t.number, v.value FROM trial_values v JOIN trials t ON t.trial_id = v.trial_id"
        " JOIN studies s ON s.study_id = t.study_id WHERE s.study_name = :study"
        " ORDER BY t.number, v.objective",
        study,
    ):
        told.setdefault(row.number, []).append(row.value)
    numbers = [row.number for row in theirs]
    if numbers != list(range(len(numbers))):
        faults.append(f"Optuna's numbers are {numbers}")
    if sorted(ours) != numbers:
        faults.append(f"our trials are {sorted(ours)}, Optuna's {numbers}")
    counted = 0
    for row in theirs:
        number, mine = row.number, ours.get(row.number)
        if row.state in UNFINISHED:
            faults.append(f"trial {number} is {row.state}")
        if mine is None:
            continue
        kind = (_json(mine.failure) or {}).get("kind")
        copied = "copied_from" in _json(mine.metrics)
        has_values = bool(values.get(number))
        if mine.status == "failed":
            counted += not copied and kind not in NOT_EVALUATED
        elif mine.status == "stopped":
            counted += not copied
        else:
            counted += has_values and not copied
        if kind == "foreign":
            continue
        measured = has_values and mine.status not in ("failed", "stopped")
        wanted = "COMPLETE" if measured else STATES[mine.status]
        if row.state != wanted:
            faults.append(f"trial {number} is {row.state}, ours is {mine.status}")
        if mine.status not in ("failed", "stopped") and told.get(number, []) != values.get(
            number, []
        ):
            faults.append(f"trial {number}: {told.get(number)} is not {values.get(number)}")
    if counted != trials:
        faults.append(f"{counted} candidates were evaluated, {trials} were asked for")
    drivers = _select(connection, "SELECT * FROM moenas_driver WHERE study = :study", study)
    return faults + [f"a driver is left: {row}" for row in drivers]


def _values(connection: Connection, study: str) -> dict[int, list[float]]:
    """Trial -> the values of the study's objectives in order."""
    values: dict[int, list[float]] = {}
    for row in _select(
        connection,
        "SELECT v.trial, v.value FROM moenas_value v JOIN moenas_objective o"
        " ON o.study = v.study AND o.name = v.objective WHERE v.study = :study"
        " AND v.value IS NOT NULL ORDER BY v.trial, o.position",
        study,
    ):
        values.setdefault(row.trial, []).append(row.value)
    return values


def _front(connection: Connection, study: str) -> list[str]:
    """Compare the stored front and hypervolume with brute force over the stored values."""
    rows = _select(
        connection,
        "SELECT trial, metrics FROM moenas_evaluation WHERE study = :study AND status = 'complete'",
        study,
    )
    values = _values(connection, study)
    points = {r.trial: values[r.trial] for r in rows if "copied_from" not in _json(r.metrics)}
    best = {
        trial
        for trial, point in points.items()
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and other != point
            for other in points.values()
        )
    }
    stored = {
        row.trial
        for row in _select(
            connection,
            "SELECT trial FROM moenas_front WHERE study = :study AND left_seq IS NULL",
            study,
        )
    }
    faults = [] if stored == best else [f"the front is {sorted(stored)}, not {sorted(best)}"]
    corner = [
        row.reference
        for row in _select(
            connection,
            "SELECT reference FROM moenas_objective WHERE study = :study ORDER BY position",
            study,
        )
    ]
    last = _select(
        connection,
        "SELECT hypervolume, seq FROM moenas_hypervolume WHERE study = :study ORDER BY seq",
        study,
    )
    if [row.seq for row in last] != list(range(1, len(rows) + 1)):
        faults.append(f"{len(last)} hypervolumes for {len(rows)} complete trials")
    if last:
        area, floor = 0.0, corner[1]
        for x, y in sorted(points[trial] for trial in best):
            area += max(0.0, corner[0] - x) * max(0.0, floor - y)
            floor = min(floor, y)
        if abs(area - last[-1].hypervolume) > 1e-9 * max(1.0, area):
            faults.append(f"the hypervolume is {last[-1].hypervolume}, not {area}")
    return faults


def _files(connection: Connection, folder: Path, study: str) -> list[str]:
    """Compare the digests of the weights with the files; find what nobody needs."""
    wanted = {
        row.trial: row.weights_sha256
        for row in _select(
            connection,
            "SELECT trial, weights_sha256 FROM moenas_evaluation WHERE study = :study",
            study,
        )
        if row.weights_sha256
    }
    faults, seen = [], set()
    # On PostgreSQL the weights of all studies lie where the first one began.
    root = connection.execute(text("SELECT weights FROM moenas_database")).scalar()
    below = folder.rglob("*") if root is None else Path(root).rglob(f"{study}-*/**/*")
    for path in below:
        if path.is_dir():
            continue
        if path.name == "model.safetensors":
            trial = int(path.parent.name)
            seen.add(trial)
            if trial in wanted:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                if digest != wanted[trial]:
                    faults.append(f"{path}: not the weights of trial {trial}")
        elif "moenas_runs" in path.parts or path.name.startswith("."):
            faults.append(f"left over: {path}")
    lacking = sorted(set(wanted) - seen)
    return faults + ([f"weights of the trials {lacking} are missing"] if lacking else [])


def _processes(folder: Path) -> list[str]:
    """Name the processes that carry the mark of a scenario."""
    mark = f"{MARK}={folder}".encode()
    faults = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                faults.append(f"process {entry.name} is left: {command[:100]}")
        except OSError:
            continue
    return faults
