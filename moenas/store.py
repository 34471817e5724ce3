"""What is known of the studies: every statement of SQL that is ours."""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Table,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from moenas import claims, membership, optuna_rows, rows, tables
from moenas.database import Database, engine_arguments, tune_sqlite
from moenas.errors import InputError, NotFoundError, StorageError, suggestion
from moenas.records import Evaluation, FrontPoint, Plain, StudyRecord, View
from moenas.tally import is_evaluated

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

log = logging.getLogger(__name__)

T = TypeVar("T")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Store:
    """The studies of one database, and the folder of their weights.

    Every method is one transaction. One that names a study raises NotFoundError if there is none
    of that name, and StorageLostError if the database cannot be reached any more.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._owner = uuid.uuid4().hex

    @classmethod
    def open(cls, url: str | None = None, create: bool = False) -> Store:
        """Open a database: the URL given, $MOENAS_STORAGE, $OPTUNA_STORAGE or ./moenas.db.

        With `create`, the file and our tables are made where they are missing.

        Raises:
            StorageError: naming the database and the way out.
        """
        return cls(Database.open(url, create=create))

    @property
    def url(self) -> str:
        """The URL of the database, with its password: for programs, not for people."""
        return self._database.url.render_as_string(hide_password=False)

    @property
    def place(self) -> str:
        """The URL of the database without its password: for people."""
        return self._database.place

    @property
    def engine(self) -> Engine:
        """The database, for reading the tables and the view `pareto_front` by SQL."""
        return self._database.engine

    @property
    def runs(self) -> Path:
        """Where weights lie: $MOENAS_RUNS, or moenas_runs/ beside the SQLite file or here."""
        if given := os.environ.get("MOENAS_RUNS"):
            return Path(given)
        path = self._database.path
        return (path.parent if path else Path()) / "moenas_runs"

    def optuna_storage(self, serving: bool = False) -> RDBStorage:
        """Return Optuna's storage on the same database; its tables are made if they are missing.

        A transaction takes its lock at its beginning, so that no two processes tell one trial.
        With `serving`, for a process that shows studies, reading does not keep the driver
        waiting.

        Raises:
            StorageError: if the tables are those of another version of Optuna.
        """
        from optuna.storages import RDBStorage

        database = self._database
        # Optuna fills in the URL as a template of str.format.
        url = self.url.replace("{", "{{").replace("}", "}}")
        try:
            with database.setting_up():
                storage = RDBStorage(url, engine_kwargs=engine_arguments(database.url))
        except RuntimeError as error:
            raise StorageError(f"{self.place}: {error}") from None
        if database.path is not None and not serving:
            # A commit of ours after one of Optuna's makes both safe from a loss of power.
            tune_sqlite(storage.engine, "NORMAL")
            storage.engine.dispose()
        return storage

    # --- studies -------------------------------------------------------------------------------

    def create_study(self, record: StudyRecord) -> None:
        """Store a new study.

        Raises:
            InputError: if its name is taken or cannot be one.
        """
        name = record.name
        if not (name.strip() and name.isprintable() and len(name) <= tables.NAME_LENGTH):
            raise InputError(
                f"study name {name[:40]!r}: 1 to {tables.NAME_LENGTH} printable characters"
            )
        found = rows.study_rows(record)
        found[tables.study][0]["created_at"] = record.created_at or _now()
        try:
            with self._database.writing() as connection:
                _insert(connection, found)
        except IntegrityError:
            raise InputError(f"study '{name}' is there already in {self.place}") from None

    def set_trials(self, name: str, trials: int) -> None:
        """Set how many trials the study is to have in total."""
        with self._changing(name) as connection:
            connection.execute(
                update(tables.study).where(tables.study.c.name == name).values(trials=trials)
            )

    def study(self, name: str) -> StudyRecord:
        """Return a study."""
        with self._reading(name) as connection:
            return _studies(connection, name)[0]

    def studies(self) -> list[StudyRecord]:
        """Return all studies, oldest first."""
        with self._database.reading() as connection:
            return _studies(connection)

    # --- the driver ----------------------------------------------------------------------------

    def claim(self, name: str) -> None:
        """Become the driver of a study, until `release`; `beat` at least every 10 s.

        Raises:
            StudyBusyError: if another driver lives, in this process or in any other.
        """
        with self._changing(name) as connection:
            claims.claim(connection, name, self._owner)

    def beat(self, name: str) -> None:
        """Say that this driver lives.

        Raises:
            StudyBusyError: if another driver has taken over.
        """
        with self._changing(name) as connection:
            claims.beat(connection, name, self._owner)

    def release(self, name: str) -> None:
        """Stop being the driver of a study; nothing happens if this store is not."""
        with self._changing(name) as connection:
            claims.release(connection, name, self._owner)

    def driver(self, name: str) -> str | None:
        """Say who runs a study now, or return None."""
        with self._reading(name) as connection:
            return claims.holder(connection, name)

    # --- trials --------------------------------------------------------------------------------

    def asked(
        self, name: str, trial: int, fingerprint: str, architecture: Plain, cost: dict[str, int]
    ) -> None:
        """Store what a trial is to evaluate; once more for the same trial changes nothing.

        Raises:
            InputError: if the trial is another architecture already.
        """
        row = {
            "study": name,
            "trial": trial,
            "fingerprint": fingerprint,
            "architecture": architecture,
            "cost": cost,
            "asked_at": _now(),
        }
        with self._changing(name) as connection:
            known = _candidate(connection, name, trial)
            if known is None:
                connection.execute(insert(tables.candidate), row)
            elif known.fingerprint != fingerprint:
                raise InputError(
                    f"study '{name}': trial {trial} is architecture {known.fingerprint}, not"
                    f" {fingerprint}; our tables and Optuna's disagree"
                )

    def start_attempt(self, name: str, trial: int) -> int:
        """Store that a trial is started once more; return which attempt it is, from 1.

        From now on the results of earlier attempts are refused.
        """
        with self._changing(name) as connection:
            _known_trial(connection, name, trial)
            number = _newest_attempt(connection, name, trial) + 1
            row = {"study": name, "trial": trial, "attempt": number, "started_at": _now()}
            connection.execute(insert(tables.attempt), row)
            return number

    def attempts(self, name: str, trial: int) -> int:
        """Return how many times a trial was started."""
        with self._reading(name) as connection:
            return _newest_attempt(connection, name, trial)

    def end_attempt(self, name: str, trial: int, attempt: int, failure: Plain) -> None:
        """Store why an attempt gave no evaluation; the trial stays without one."""
        this = tables.attempt.c.attempt == attempt
        with self._changing(name) as connection:
            connection.execute(
                update(tables.attempt)
                .where(*_is(tables.attempt, name, trial), this)
                .values(finished_at=_now(), status="ended", failure=rows.storable(failure))
            )

    def failed_attempts(self, name: str, trial: int, kind: str) -> int:
        """Return how many attempts of a trial ended by a kind of failure, without an evaluation."""
        wanted = select(tables.attempt.c.failure).where(
            *_is(tables.attempt, name, trial), tables.attempt.c.status == "ended"
        )
        with self._reading(name) as connection:
            found = connection.scalars(wanted).all()
        return sum((failure or {}).get("kind") == kind for failure in found)

    def fingerprint(self, name: str, trial: int) -> str | None:
        """Return the fingerprint of a trial's architecture; None if it was never asked for."""
        with self._reading(name) as connection:
            found = _candidate(connection, name, trial)
            return None if found is None else str(found.fingerprint)

    def asked_trials(self, name: str) -> set[int]:
        """Return the trials that have an architecture of ours."""
        candidate = tables.candidate.c
        wanted = select(candidate.trial).where(candidate.study == name, candidate.fingerprint != "")
        with self._reading(name) as connection:
            return set(connection.scalars(wanted))

    def apply(self, name: str, change: Callable[[Connection], T]) -> T:
        """Run a change of a study's rows in one transaction."""
        with self._changing(name) as connection:
            return change(connection)

    def architecture(self, name: str, trial: int) -> Plain:
        """Return the canonical architecture of a trial.

        Raises:
            NotFoundError: if the study has no such trial.
        """
        with self._reading(name) as connection:
            found: Plain = _known_trial(connection, name, trial).architecture
            return found

    # --- evaluations ---------------------------------------------------------------------------

    def record(self, evaluation: Evaluation) -> bool:
        """Store an evaluation, the front and its history together; return whether it counts.

        It counts once: the same attempt again changes nothing. It is refused, with a warning in
        the log, if a later attempt was started or the trial is complete already. Numbers that are
        not finite are stored as NULL.

        Raises:
            NotFoundError: if the trial was never asked for.
            InputError: if it is complete but lacks a finite value of an objective.
        """
        name, trial = evaluation.study, evaluation.trial
        with self._changing(name) as connection:
            _known_trial(connection, name, trial)
            known = connection.execute(
                select(tables.evaluation).where(*_is(tables.evaluation, name, trial))
            ).first()
            if known is not None and known.attempt == evaluation.attempt:
                return True
            newest = _newest_attempt(connection, name, trial)
            if evaluation.attempt < newest or (known is not None and known.status == "complete"):
                log.warning(
                    "study '%s', trial %d: the result of attempt %d came too late and is ignored",
                    *(name, trial, evaluation.attempt),
                )
                return False
            self._write(connection, evaluation)
            return True

    def _write(self, connection: Connection, evaluation: Evaluation) -> None:
        """Store an evaluation in place of that of an earlier attempt, and its effect."""
        name, trial = evaluation.study, evaluation.trial
        record = _studies(connection, name)[0]
        now = _now()
        found = rows.evaluation_rows(evaluation, now)
        for table in found:
            connection.execute(delete(table).where(*_is(table, name, trial)))
        _insert(connection, found)
        this = tables.attempt.c.attempt == evaluation.attempt
        connection.execute(
            update(tables.attempt)
            .where(*_is(tables.attempt, name, trial), this)
            .values(
                finished_at=now,
                status=evaluation.status,
                failure=rows.storable(evaluation.failure),
            )
        )
        if evaluation.status == "complete":
            copied = "copied_from" in evaluation.metrics
            point = _values(record, evaluation)
            membership.advance(connection, record, trial, point, copied=copied)

    def evaluation(self, name: str, trial: int) -> Evaluation | None:
        """Return the evaluation of a trial, or None if there is none yet."""
        with self._reading(name) as connection:
            return next(iter(_evaluations(connection, name, trial)), None)

    def evaluations(self, name: str) -> list[Evaluation]:
        """Return all evaluations of a study in order of their trials."""
        with self._reading(name) as connection:
            return _evaluations(connection, name)

    def evaluated(self, name: str) -> int:
        """Return how many candidates of a study were evaluated; see `tally.is_evaluated`."""
        row = tables.evaluation.c
        wanted = select(row.trial, row.status, row.metrics, row.failure).where(row.study == name)
        valued = select(tables.value.c.trial).where(
            tables.value.c.study == name, tables.value.c.value.is_not(None)
        )
        with self._reading(name) as connection:
            found = connection.execute(wanted).all()
            with_values = set(connection.scalars(valued))
        return sum(
            is_evaluated(r.status, r.metrics, r.failure, r.trial in with_values) for r in found
        )

    def holds_optuna_study(self, name: str) -> bool:
        """Say whether Optuna's tables hold a study of this name."""
        with self._database.reading() as connection:
            if not inspect(connection).has_table("studies"):
                return False
            return optuna_rows.has_study(connection, name)

    def count(self, name: str) -> int:
        """Return how many trials of a study have an evaluation."""
        known = tables.evaluation.c.study == name
        with self._reading(name) as connection:
            count = select(func.count()).select_from(tables.evaluation).where(known)
            return connection.execute(count).scalar_one()

    # --- the front -----------------------------------------------------------------------------

    def front(self, name: str) -> list[int]:
        """Return the trials on the front in order of the first objective, best first."""
        with self._reading(name) as connection:
            return membership.members(connection, _studies(connection, name)[0])

    def standing(self, name: str) -> tuple[int, float | None]:
        """Return the size of the front and its hypervolume now; 0, None without complete trials."""
        with self._reading(name) as connection:
            row = membership.last(connection, name)
            return (row.size, row.hypervolume) if row else (0, None)

    def history(self, name: str) -> list[FrontPoint]:
        """Return the front after each complete trial, in the order in which they were recorded.

        All hypervolumes are measured from the study's reference point.
        """
        with self._reading(name) as connection:
            return membership.history(connection, name)

    def view(self, name: str) -> View:
        """Return all of a study in one state."""
        with self._reading(name) as connection:
            record = _studies(connection, name)[0]
            candidate = tables.candidate.c
            architectures = connection.execute(
                select(candidate.trial, candidate.architecture)
                .where(candidate.study == name)
                .order_by(candidate.trial)
            )
            return View(
                study=record,
                evaluations=_evaluations(connection, name),
                architectures={row.trial: row.architecture for row in architectures},
                front=membership.members(connection, record),
                history=membership.history(connection, name),
            )

    # --- the reference model -------------------------------------------------------------------

    def reference_ms(self, name: str) -> dict[str, float]:
        """Return device and workload -> time of the reference model there, in ms."""
        with self._reading(name) as connection:
            return _reference_ms(connection, name)

    def set_reference_ms(self, name: str, key: str, ms: float) -> float:
        """Fix the time of the reference model, if none is fixed; return the one that holds."""
        with self._changing(name) as connection:
            known = _reference_ms(connection, name)
            if key not in known:
                row = {"study": name, "key": key, "ms": ms, "set_at": _now()}
                connection.execute(insert(tables.reference), row)
            return known.get(key, ms)

    # --- transactions --------------------------------------------------------------------------

    @contextmanager
    def _reading(self, name: str) -> Iterator[Connection]:
        """Yield a connection that sees one state, with the study in it."""
        with self._database.reading() as connection:
            _known_study(connection, name)
            yield connection

    @contextmanager
    def _changing(self, name: str) -> Iterator[Connection]:
        """Yield a connection of a transaction that no other one changes this study beside."""
        with self._database.writing() as connection:
            _known_study(connection, name, lock=True)
            yield connection


def _insert(connection: Connection, found: dict[Table, list[Plain]]) -> None:
    for table, entries in found.items():
        if entries:
            connection.execute(insert(table), entries)


def _is(table: Table, name: str, trial: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions that a row belongs to a trial."""
    return table.c.study == name, table.c.trial == trial


def _known_study(connection: Connection, name: str, *, lock: bool = False) -> None:
    """Raise NotFoundError if there is no such study; with `lock`, let no other one change it."""
    wanted = select(tables.study.c.name).where(tables.study.c.name == name)
    if connection.execute(wanted.with_for_update() if lock else wanted).first() is None:
        names = connection.scalars(select(tables.study.c.name).order_by(tables.study.c.name)).all()
        there = f"There are: {', '.join(names)}." if names else "There is none yet."
        raise NotFoundError(f"no study '{name}'.{suggestion(name, names)} {there}")


def _studies(connection: Connection, name: str | None = None) -> list[StudyRecord]:
    """Return the study of a name, or all of them, oldest first."""
    studies = select(tables.study).order_by(tables.study.c.created_at, tables.study.c.name)
    infos = select(tables.objective).order_by(tables.objective.c.position)
    if name is not None:
        studies = studies.where(tables.study.c.name == name)
        infos = infos.where(tables.objective.c.study == name)
    objectives: dict[str, list[Row[Any]]] = {}
    for info in connection.execute(infos):
        objectives.setdefault(info.study, []).append(info)
    return [
        rows.study_record(row, objectives.get(row.name, [])) for row in connection.execute(studies)
    ]


def _candidate(connection: Connection, name: str, trial: int) -> Row[Any] | None:
    wanted = select(tables.candidate).where(*_is(tables.candidate, name, trial))
    return connection.execute(wanted).first()


def _known_trial(connection: Connection, name: str, trial: int) -> Row[Any]:
    """Return what a trial is to evaluate; raise NotFoundError if it was never asked for."""
    found = _candidate(connection, name, trial)
    if found is None:
        numbers = tables.candidate.c.trial
        count, last = connection.execute(
            select(func.count(), func.max(numbers)).where(tables.candidate.c.study == name)
        ).one()
        there = f"it has {count}, up to trial {last}" if count else "it has none yet"
        raise NotFoundError(f"study '{name}' has no trial {trial}; {there}")
    return found


def _newest_attempt(connection: Connection, name: str, trial: int) -> int:
    """Return how many times a trial was started."""
    newest = select(func.max(tables.attempt.c.attempt)).where(*_is(tables.attempt, name, trial))
    return connection.execute(newest).scalar() or 0


def _evaluations(connection: Connection, name: str, trial: int | None = None) -> list[Evaluation]:
    """Return the evaluations of a study, or that of one trial, in order of the trials."""

    def read(table: Table, *order: str) -> list[Row[Any]]:
        wanted = select(table).where(table.c.study == name)
        if trial is not None:
            wanted = wanted.where(table.c.trial == trial)
        wanted = wanted.order_by(table.c.trial, *(table.c[column] for column in order))
        return list(connection.execute(wanted).all())

    parts = {
        tables.value: read(tables.value),
        tables.curve: read(tables.curve, "position"),
        tables.routing: read(tables.routing, "layer"),
    }
    return rows.evaluations(read(tables.evaluation), parts)


def _values(record: StudyRecord, evaluation: Evaluation) -> list[float]:
    """Return the values of a complete evaluation in the order of the study's objectives."""
    values = [evaluation.values.get(name, math.nan) for name in record.directions]
    for name, number in zip(record.directions, values, strict=True):
        if not math.isfinite(number):
            raise InputError(
                f"study '{record.name}', trial {evaluation.trial}: complete, but {name} is"
                f" {evaluation.values.get(name)}; a complete trial has a finite value of each"
                " objective"
            )
    return [float(number) for number in values]


def _reference_ms(connection: Connection, name: str) -> dict[str, float]:
    reference = tables.reference.c
    wanted = select(reference.key, reference.ms).where(reference.study == name)
    return {row.key: row.ms for row in connection.execute(wanted)}
