"""Changes of finished trials, each in one transaction with Optuna's rows and the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from optuna.trial import TrialState
from sqlalchemy import Connection, delete, func, insert, select, update

from moenas import pareto
from moenas.records import Calibration, Evaluation, ObjectiveInfo, Plain, StudyRecord
from moenas.store import (
    mapping,
    optuna_rows,
    row_readers,
    rungs,
    statements,
    study_events,
    tables,
)

OF_EVALUATION = (tables.routing, tables.curve, tables.value, tables.reuse, tables.evaluation)


def reopen(connection: Connection, study: str, trials: Sequence[int]) -> None:
    """Let trials be evaluated again under their numbers; `moenas_attempt` keeps why they failed."""
    for trial in trials:
        _forget(connection, study, trial)
        rungs.forget(connection, study, trial)
        optuna_rows.reopen(connection, study, trial)
    study_events.append(connection, study, "trials_reopened", {"trials": list(trials)})


@dataclass(frozen=True)
class Replacement:
    """An evaluation that takes the place of an earlier one, and Optuna's outcome of it."""

    evaluation: Evaluation
    state: TrialState
    values: list[float] | None
    constraints: dict[str, float]
    """Requirement of the trained model -> by how much it is broken, over 0, or met."""


def replace_evaluations(
    connection: Connection,
    record: StudyRecord,
    replacements: Sequence[Replacement],
) -> None:
    """Replace evaluations of the same attempts, and measure the front again."""
    for replacement in replacements:
        evaluation = replacement.evaluation
        evaluated = tables.evaluation.c
        when = connection.execute(
            select(evaluated.recorded_at).where(
                evaluated.study == record.name, evaluated.trial == evaluation.trial
            )
        ).scalar_one()
        _forget(connection, record.name, evaluation.trial)
        for table, entries in mapping.evaluation_rows(evaluation, when).items():
            if entries:
                connection.execute(insert(table), entries)
        optuna_rows.set_outcome(
            connection,
            record.name,
            evaluation.trial,
            replacement.state,
            replacement.values,
            replacement.constraints,
        )
    rebuild_front(connection, record)
    measured = [replacement.evaluation.trial for replacement in replacements]
    study_events.append(connection, record.name, "trials_remeasured", {"trials": measured})


def rebuild_front(connection: Connection, record: StudyRecord) -> None:
    """Compute the front, its history and the reference point again from the stored values."""
    name, names = record.name, list(record.directions)
    directions = list(record.directions.values())
    points = complete_points(connection, name, names)
    for table in (tables.front, tables.hypervolume):
        connection.execute(delete(table).where(table.c.study == name))
    columns = tables.objective.c
    corner: list[float] = []
    if points:
        values = [values for _, values, _ in points]
        corner = pareto.reference_point(values, directions)
    for i, objective in enumerate(names):
        ends = [point[i] for _, point, _ in points]
        changes = {
            "lowest": min(ends, default=None),
            "highest": max(ends, default=None),
            "reference": corner[i] if corner else None,
        }
        this = (columns.study == name) & (columns.name == objective)
        connection.execute(update(tables.objective).where(this).values(changes))
    own = {trial: values for trial, values, copied in points if not copied}
    front_steps = pareto.history(list(own.values()), directions, corner, list(own)) if own else []
    steps = {step.trial: step for step in front_steps}
    size, volume = 0, 0.0
    entered: dict[int, Plain] = {}
    history = []
    for seq, (trial, _, copied) in enumerate(points, start=1):
        if not copied:
            step = steps[trial]
            size, volume = step.size, step.hypervolume
            for gone in step.left:
                entered[gone]["left_seq"] = seq
            if step.entered:
                entered[trial] = {
                    "study": name, "trial": trial, "entered_seq": seq, "left_seq": None
                }  # fmt: skip
        history.append(
            {"study": name, "seq": seq, "trial": trial, "hypervolume": volume, "size": size}
        )
    for table, entries in ((tables.front, list(entered.values())), (tables.hypervolume, history)):
        if entries:
            connection.execute(insert(table), entries)


def complete_points(
    connection: Connection, name: str, names: Sequence[str]
) -> list[tuple[int, list[float], bool]]:
    """Return trial, values and whether it is a copy, of complete trials as they were recorded."""
    row, value = tables.evaluation.c, tables.value.c
    seq = tables.hypervolume.c
    same = (seq.study == row.study) & (seq.trial == row.trial)
    rows = connection.execute(
        select(row.trial, row.metrics)
        .outerjoin(tables.hypervolume, same)
        .where(row.study == name, row.status == "complete")
        .order_by(func.coalesce(seq.seq, 2**31 - 1), row.recorded_at, row.trial)
    ).all()
    values: dict[int, dict[str, float]] = {}
    for entry in connection.execute(
        select(value.trial, value.objective, value.value).where(value.study == name)
    ):
        values.setdefault(entry.trial, {})[entry.objective] = entry.value
    return [
        (r.trial, [values[r.trial][n] for n in names], "copied_from" in r.metrics) for r in rows
    ]


def accept(
    connection: Connection, name: str, space: Plain, sha256: str, infos: Sequence[ObjectiveInfo]
) -> None:
    """Store another form of the space, and objectives of another digest, with what changed."""
    record = row_readers.studies(connection, name)[0]
    before = {info["name"]: info["sha256"] for info in record.objectives}
    columns = tables.objective.c
    for info in infos:
        if before[info.name] != info.sha256:
            _log(connection, name, f"objective {info.name}", before[info.name], info.sha256)
            connection.execute(
                update(tables.objective)
                .where(columns.study == name, columns.name == info.name)
                .values(sha256=info.sha256, doc=info.doc, unit=info.unit)
            )
    if record.space_sha256 != sha256:
        _log(connection, name, "space", record.space_sha256, sha256)
    connection.execute(
        update(tables.study)
        .where(tables.study.c.name == name)
        .values(space=mapping.storable(space), space_sha256=sha256)
    )


def renew_calibration(
    connection: Connection, name: str, before: Calibration, after: Calibration
) -> None:
    """Let a study refuse candidates by another calibration of the same workload.

    What the earlier one has refused stays so.
    """
    table = tables.study_calibration
    own = (table.c.study == name) & (table.c.workload == before.workload)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    values = {"taken_at": now, "calibration": after.plain()}
    connection.execute(update(table).where(own).values(values))
    _log(connection, name, f"calibration {after.objective}", before.made_at, after.made_at)


def changes(connection: Connection, name: str) -> list[Plain]:
    """Return what a user accepted after the start: {changed_at, what, before, after}, in order."""
    wanted = select(tables.change).where(tables.change.c.study == name)
    rows = connection.execute(wanted.order_by(tables.change.c.position)).mappings()
    return [{key: row[key] for key in row if key not in ("study", "position")} for row in rows]


def _log(connection: Connection, name: str, what: str, before: str, after: str) -> None:
    """Store one change."""
    row: Plain = {"study": name, "position": len(changes(connection, name)) + 1}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    row |= {"changed_at": now, "what": what, "before": before, "after": after}
    connection.execute(insert(tables.change), row)


def _forget(connection: Connection, study: str, trial: int) -> None:
    for table in OF_EVALUATION:
        if table is tables.reuse and not statements.exists(connection, table):
            continue
        connection.execute(delete(table).where(table.c.study == study, table.c.trial == trial))
