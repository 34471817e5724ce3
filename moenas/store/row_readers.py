"""Queries of a reader of a study: counts, the front, one trial."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    and_,
    case,
    exists,
    func,
    not_,
    or_,
    select,
)

from moenas.records import Evaluation, FrontPoint, Plain, RungResult, StudyRecord, View
from moenas.store import front_rows, mapping, statements, tables
from moenas.store.counting import NOT_EVALUATED, is_evaluated

Rest = Callable[[str, int], list[Plain]]
"""Reads the `curve` or the `routing` of a trial."""


@dataclass(frozen=True)
class Summary:
    """How far a study is and how it does."""

    study: StudyRecord
    counts: dict[str, int]
    """Status -> finished trials."""
    failures: dict[str, int]
    """Kind of failure -> failed trials."""
    best: dict[str, float | None]
    """Objective -> the best value of all complete trials."""
    front: int
    """Members of the front."""
    hypervolume: float | None
    devices: list[str]
    """Names of the devices of the complete trials."""
    trained: bool
    """Whether a trial has a validation loss."""

    evaluated: int
    """Candidates that count towards `trials`; see `counting.is_evaluated`."""
    repeated: int
    """Trials that are copies of an earlier trial of the same model."""

    @property
    def finished(self) -> int:
        """Trials that are over."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class FrontView:
    """The front of a study, and how its numbers were measured."""

    summary: Summary
    members: list[Evaluation]
    """In order of the first objective, best first."""
    architectures: dict[int, Plain]

    @property
    def study(self) -> StudyRecord:
        """The study."""
        return self.summary.study


def as_front(view: View | FrontView) -> FrontView:
    """Return the front of a whole view."""
    if isinstance(view, FrontView):
        return view
    complete = [e for e in view.evaluations if e.status == "complete"]
    by_trial = {e.trial: e for e in complete}
    summary = Summary(
        study=view.study,
        counts=dict(Counter(e.status for e in view.evaluations)),
        failures={},
        best={},
        front=len(view.front),
        hypervolume=view.history[-1].hypervolume if view.history else None,
        trained=any("val_loss" in e.metrics for e in view.evaluations),
        evaluated=sum(
            is_evaluated(e.status, e.metrics, e.failure, bool(e.values)) for e in view.evaluations
        ),
        repeated=sum("copied_from" in e.metrics for e in view.evaluations),
        devices=sorted({str(e.device["name"]) for e in complete if "name" in e.device}),
    )
    return FrontView(summary, [by_trial[trial] for trial in view.front], view.architectures)


class StoredView(View):
    """A view that reads evaluations and architectures when they are asked for."""

    @classmethod
    def of(
        cls,
        study: StudyRecord,
        front: list[int],
        history: list[FrontPoint],
        later: dict[str, Callable[[], Any]],
    ) -> StoredView:
        """Build a view whose other parts are read by `later`."""
        view = cls(study, [], {}, front, history)
        for name in later:
            del view.__dict__[name]
        view.__dict__["_later"] = later
        return view

    def __getattr__(self, name: str) -> Any:
        later = self.__dict__.get("_later", {})
        if name not in later:
            raise AttributeError(name)
        self.__dict__[name] = later[name]()
        return self.__dict__[name]


def replicates(connection: Connection, study: str) -> list[Evaluation]:
    """Return the replicates of a study in order of trials and seeds."""
    table = tables.replicate
    if not statements.exists(connection, table):
        return []  # a reader does not change a database of an older schema
    wanted = select(table.c.evaluation).where(table.c.study == study)
    rows = connection.scalars(wanted.order_by(table.c.trial, table.c.seed))
    return [Evaluation.parse(plain) for plain in rows]


def replicates_version(connection: Connection, study: str) -> tuple[int, str | None]:
    """Return the number of replicates of a study and when the newest was recorded.

    A replicate that replaces another one changes the time.
    """
    table = tables.replicate
    if not statements.exists(connection, table):
        return 0, None
    version = select(func.count(), func.max(table.c.recorded_at)).where(table.c.study == study)
    count, newest = connection.execute(version).one()
    return count, newest


def studies(connection: Connection, name: str | None = None) -> list[StudyRecord]:
    """Return the study of a name, or all studies, oldest first."""
    wanted = select(tables.study).order_by(tables.study.c.created_at, tables.study.c.name)
    infos = select(tables.objective).order_by(tables.objective.c.position)
    if name is not None:
        wanted = wanted.where(tables.study.c.name == name)
        infos = infos.where(tables.objective.c.study == name)
    objectives: dict[str, list[Row[Any]]] = {}
    for info in connection.execute(infos):
        objectives.setdefault(info.study, []).append(info)
    return [
        mapping.study_record(row, objectives.get(row.name, []))
        for row in connection.execute(wanted)
    ]


def evaluations_after(
    connection: Connection, name: str, after: int, limit: int
) -> list[Evaluation]:
    """Return at most `limit` evaluations with larger trial numbers, without curve and routing."""
    trial = tables.evaluation.c.trial
    wanted = select(trial).where(tables.evaluation.c.study == name, trial > after)
    numbers = connection.scalars(wanted.order_by(trial).limit(limit)).all()
    if not numbers:
        return []
    first, last = numbers[0], numbers[-1]
    return evaluations(
        connection, name, lambda part, trial: [], lambda t: t.c.trial.between(first, last)
    )


def evaluations(
    connection: Connection, name: str, rest: Rest, which: Callable[[Table], Any] | None = None
) -> list[Evaluation]:
    """Return evaluations in order of their trials; `rest` reads their curves when asked for.

    `which` limits the rows of a table that has the column `trial`.
    """

    def read(table: Table) -> list[Row[Any]]:
        wanted = select(table).where(table.c.study == name).order_by(table.c.trial)
        if which is not None:
            wanted = wanted.where(which(table))
        return list(connection.execute(wanted).all())

    reused = read(tables.reuse) if statements.exists(connection, tables.reuse) else []
    plains = mapping.evaluations(read(tables.evaluation), read(tables.value), reused)
    return [mapping.Stored.of(plain, rest) for plain in plains]


def evaluation(connection: Connection, name: str, trial: int) -> Evaluation | None:
    """Return the whole evaluation of one trial."""
    stored = evaluations(
        connection,
        name,
        lambda part, number: rest_of(connection, name, part, number),
        lambda table: table.c.trial == trial,
    )
    return Evaluation.parse(stored[0].plain()) if stored else None


def rest_of(connection: Connection, name: str, part: str, trial: int) -> list[Plain]:
    """Return the `curve` or the `routing` of a trial."""
    table, order = (tables.curve, "position") if part == "curve" else (tables.routing, "layer")
    wanted = select(table).where(table.c.study == name, table.c.trial == trial)
    return mapping.part(part, connection.execute(wanted.order_by(table.c[order])))


def routing_of_front(connection: Connection, name: str) -> dict[int, list[Plain]]:
    """Return trial -> routing of the members of the front, which several figures show."""
    table = tables.routing
    wanted = select(table).where(table.c.study == name, on_front(name)(table))
    rows_by_trial: dict[int, list[Row[Any]]] = {}
    for row in connection.execute(wanted.order_by(table.c.trial, table.c.layer)):
        rows_by_trial.setdefault(row.trial, []).append(row)
    return {trial: mapping.part("routing", entries) for trial, entries in rows_by_trial.items()}


def architectures(
    connection: Connection, name: str, *which: ColumnElement[bool]
) -> dict[int, Plain]:
    """Return trial -> canonical architecture, in order of the trials."""
    candidate = tables.candidate.c
    wanted = select(candidate.trial, candidate.architecture).where(candidate.study == name, *which)
    rows = connection.execute(wanted.order_by(candidate.trial))
    return {row.trial: row.architecture for row in rows}


def on_front(name: str) -> Callable[[Table], ColumnElement[bool]]:
    """Return the condition that a row belongs to a member of the front."""
    front = tables.front.c
    trials = select(front.trial).where(front.study == name, front.left_seq.is_(None))
    return lambda table: table.c.trial.in_(trials)


def front_view(connection: Connection, name: str, rest: Rest) -> FrontView:
    """Return the front of a study."""
    front_summary = summary(connection, name)
    which = on_front(name)
    members = {e.trial: e for e in evaluations(connection, name, rest, which)}
    order = front_rows.members(connection, front_summary.study)
    plain = architectures(connection, name, which(tables.candidate))
    return FrontView(front_summary, [members[trial] for trial in order], plain)


def summary(connection: Connection, name: str) -> Summary:
    """Return how far a study is and how it does."""
    record, evaluation = studies(connection, name)[0], tables.evaluation.c
    # One pass over the rows, which hold much JSON.
    groups = (
        evaluation.status.label("status"),
        evaluation.failure.is_not(None).label("failed"),
        evaluation.failure["kind"].as_string().label("kind"),
        evaluation.device["name"].as_string().label("device"),
    )
    passed = select(
        *groups,
        func.count().label("all"),
        _how_many(_is_copied()).label("copies"),
        _how_many(and_(_was_evaluated(), not_(_is_copied()))).label("evaluated"),
        _how_many(evaluation.metrics["val_loss"].as_float().is_not(None)).label("trained"),
    ).where(evaluation.study == name)
    rows = connection.execute(passed.group_by(*groups)).all()
    counts, failures = Counter[str](), Counter[str]()
    for row in rows:
        counts[row.status] += row.all
        if row.failed:
            failures[row.kind or "error"] += row.all
    info = tables.objective.c
    ends = select(info.name, info.direction, info.lowest, info.highest).where(info.study == name)
    last = front_rows.last(connection, name)
    return Summary(
        study=record,
        counts=dict(counts),
        failures=dict(failures.most_common()),
        best={
            row.name: row.lowest if row.direction == "minimize" else row.highest
            for row in connection.execute(ends.order_by(info.position))
        },
        front=last.size if last else 0,
        hypervolume=last.hypervolume if last else None,
        trained=any(row.trained for row in rows),
        evaluated=sum(row.evaluated for row in rows),
        repeated=sum(row.copies for row in rows),
        devices=sorted({str(r.device) for r in rows if r.status == "complete" and r.device}),
    )


def evaluated(connection: Connection, name: str) -> int:
    """Return how many candidates of a study were evaluated."""
    this = tables.evaluation.c.study == name
    counted = select(func.count()).where(this, _was_evaluated(), not_(_is_copied()))
    return int(connection.execute(counted).scalar_one())


def _was_evaluated() -> ColumnElement[bool]:
    """Return `counting.is_evaluated` of a trial that is no copy, in SQL.

    A complete trial has a value of each objective, so its values are not looked for.
    """
    row, value = tables.evaluation.c, tables.value.c
    kind = row.failure["kind"].as_string()
    has_value = exists().where(
        value.study == row.study, value.trial == row.trial, value.value.is_not(None)
    )
    return or_(
        and_(row.status == "failed", or_(kind.is_(None), kind.not_in(NOT_EVALUATED))),
        row.status.in_(("complete", "stopped")),
        and_(row.status.not_in(("complete", "stopped", "failed")), has_value),
    )


def _is_copied() -> ColumnElement[bool]:
    """Whether a trial is a copy of an earlier one of the same model, in SQL."""
    copied: ColumnElement[bool] = tables.evaluation.c.metrics["copied_from"].as_float().is_not(None)
    return copied


def _how_many(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Return how many rows of a group meet a condition."""
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def trials_with_values(connection: Connection, name: str) -> set[int]:
    """Return the trials that have a value of an objective."""
    value = tables.value.c
    valued = select(value.trial).where(value.study == name, value.value.is_not(None))
    return set(connection.scalars(valued))


def rung_results(connection: Connection, name: str) -> list[RungResult]:
    """Return the results of a study at all rungs, in order of rungs and trials."""
    if not statements.exists(connection, tables.rung):
        return []  # a reader does not change a database of an older schema
    rung = tables.rung.c
    wanted = select(
        *(rung.trial, rung.rung, rung.tokens, rung.val_loss, rung.known),
        rung.promoted_at.is_not(None).label("promoted"),
    ).where(rung.study == name)
    rows = connection.execute(wanted.order_by(rung.rung, rung.trial))
    return [RungResult.parse(dict(row._mapping) | {"promoted": bool(row.promoted)}) for row in rows]
