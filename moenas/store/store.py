"""The store of studies: transactions on the tables of moenas."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from moenas.errors import InputError, StudyBusyError
from moenas.records import EndReason, Evaluation, Plain, StudyRecord
from moenas.store import (
    front_rows,
    identity,
    leases,
    mapping,
    reservations,
    row_readers,
    statements,
    study_events,
    submissions,
    tables,
)
from moenas.store.database import Database
from moenas.store.files import Root
from moenas.store.front_rows import FrontSummary
from moenas.store.object_path import ObjectPath
from moenas.store.reader import StoreReader, again
from moenas.store.retry import RELEASE_S
from moenas.store.urls import is_uri
from moenas.store.weights import sweep

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def _now(precision: str = "milliseconds") -> str:
    return datetime.now(UTC).isoformat(timespec=precision)


class Store(StoreReader):
    """The studies of one database, and the folder of their weights.

    Every method is one transaction. It is tried again for a limited time if the reason of a failure
    passes: a lock, a restart of the server, a full disk. One that names a study raises
    NotFoundError if there is none of that name, and StorageLostError if the database cannot be
    reached any more.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._owner = uuid.uuid4().hex

    @classmethod
    def open(cls, url: str | None = None, create: bool = False) -> Store:
        """Open a database: the URL given, $MOENAS_STORAGE, $OPTUNA_STORAGE or ./moenas.db.

        With `create`, the file and our tables are made where they are missing.

        Raises:
            StorageError: naming the database and the way out.
        """
        return cls(Database.open(url, create=create))

    @classmethod
    def known(cls, url: str | None, name: str) -> StudyRecord | None:
        """Return a study that a run is to write to, or None; nothing is written or made.

        Raises:
            StorageError: if the database cannot be opened or made.
        """
        database = Database.peek(url)
        if database is None:
            return None
        with cls(database)._database.reading() as connection:
            studies = row_readers.studies(connection, name)
        database.engine.dispose()
        return studies[0] if studies else None

    @property
    def url(self) -> str:
        """The URL of the database, with its password: for programs, not for people."""
        url, path = self._database.url, self._database.path
        if path is not None and not is_uri(url):
            url = url.set(database=str(path))
        return url.render_as_string(hide_password=False)

    @property
    def place(self) -> str:
        """The URL of the database without its password: for people."""
        return self._database.place

    @property
    def path(self) -> Path | None:
        """The file, if the database is one of SQLite."""
        return self._database.path

    @property
    def engine(self) -> Engine:
        """The database, for reading the tables and the view `pareto_front` by SQL."""
        return self._database.engine

    @property
    def runs(self) -> Root | ObjectPath:
        """Where the weights of this database lie, and of no other one.

        It is in $MOENAS_RUNS, a folder or a URL, if that was set when the store was opened. Else it
        is in the root that the database names, or in moenas_runs/ beside the SQLite file.
        """
        database = self._database
        return identity.runs(
            database.identity, database.path, database.runs_wanted, database.folder
        )

    @property
    def patience(self) -> float:
        """Seconds for which this store waits for its database."""
        return self._database.again.seconds

    def optuna_storage(self, serving: bool = False) -> RDBStorage:
        """Return Optuna's storage on the same database; its tables are made if they are missing.

        With `serving`, for a process that shows studies, reading does not keep the driver
        waiting.

        Raises:
            StorageError: if another version of Optuna wrote the tables.
        """
        from moenas.store.optuna_storage import open_storage

        return open_storage(self._database, serving=serving)

    def verify(self) -> None:
        """Raise StorageLostError if the database was moved, replaced or damaged meanwhile."""
        self._database.again(self._database.verify)

    @again
    def ensure_identity(self) -> None:
        """Store where this database lies and where its weights go, as the start of a run does.

        Raises:
            InputError: if $MOENAS_RUNS would split the weights over two folders.
        """
        with self._database.writing() as connection:
            self._database.ensure_identity(connection)

    # --- studies -------------------------------------------------------------------------------

    def create_study(self, record: StudyRecord) -> None:
        """Store a new study.

        Raises:
            InputError: if its name is taken, reserved, or cannot be one.
        """
        name = record.name
        statements.check_study_name(name)
        created = record.created_at or _now()
        tries = 0

        def work() -> None:
            nonlocal tries
            tries += 1
            rows = mapping.study_rows(record)
            rows[tables.study][0]["created_at"] = created
            try:
                with self._database.writing() as connection:
                    statements.insert_rows(connection, rows)
                    reservations.require_free(connection, name)
                    study_events.forget_deleted(connection, name)
                    told = {"trials": record.trials, "objectives": list(record.directions)}
                    study_events.append(connection, name, "study_created", told)
            except IntegrityError:
                with self._database.reading() as connection:
                    if tries > 1 and statements.is_stored(connection, record, created):
                        return  # the answer of the first commit was lost
                raise InputError(f"study '{name}' already exists in {self.place}") from None

        self._database.again(work)

    @again
    def set_trials(self, name: str, trials: int) -> None:
        """Set how many trials the study is to have in total."""
        with self._changing(name) as connection:
            connection.execute(
                update(tables.study).where(tables.study.c.name == name).values(trials=trials)
            )

    @again
    def set_ended(self, name: str, reason: EndReason | None) -> None:
        """Store why a study is over; None if it is not."""
        ended = tables.ended
        with self._changing(name) as connection:
            known = connection.scalar(select(ended.c.reason).where(ended.c.study == name))
            connection.execute(delete(ended).where(ended.c.study == name))
            if reason is not None:
                row = {"study": name, "reason": reason, "ended_at": _now()}
                connection.execute(insert(ended), row)
            if reason is not None and reason != known:
                study_events.append(connection, name, "study_ended", {"reason": reason})

    # --- the driver ----------------------------------------------------------------------------

    @again
    def claim(self, name: str) -> None:
        """Become the driver of a study, until `release`; `renew` at least every 10 s.

        Raises:
            StudyBusyError: if another driver lives, in this process or in any other.
            StorageLostError: if the object store of the weights cannot be reached.
        """
        with self._changing(name) as connection:
            self._database.ensure_identity(connection)
            holder = leases.claim(connection, name, self._owner)
        if holder is not None:
            raise StudyBusyError(f"study '{name}' is being run by {holder}; wait for it or end it")
        sweep(self.runs, name)

    def claim_renamed(self, connection: Connection, name: str) -> None:
        """Become the driver of a study in the transaction that gives it this name."""
        leases.claim(connection, name, self._owner)

    def renew(self, name: str) -> submissions.State | None:
        """Say that this driver lives; one that fails is not tried again.

        Returns `paused` or `cancelled` if a user of a server has asked for the end of this driver.

        Raises:
            StorageLostError: if the database was moved or replaced.
            StudyBusyError: if another driver has taken over.
        """
        self._database.check_identity()
        with self._changing(name) as connection:
            self._database.check_identity(connection)
            leases.renew(connection, name, self._owner)
            return submissions.wanted_end(connection, name)

    def release(self, name: str) -> None:
        """Stop being the driver of a study; nothing happens if this store is not.

        It does not wait for long: this is done when a user ends a run.
        """

        def work() -> None:
            with self._changing(name) as connection:
                leases.release(connection, name, self._owner)

        self._database.again(work, seconds=RELEASE_S)

    # --- trials --------------------------------------------------------------------------------

    @again
    def add_candidate(
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
            known = statements.candidate(connection, name, trial)
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
        return self._start_attempt(name, trial, _now("microseconds"))

    @again
    def _start_attempt(self, name: str, trial: int, started: str) -> int:
        """Store an attempt that began at `started`; once more for the same moment is no other."""
        with self._changing(name) as connection:
            statements.known_trial(connection, name, trial)
            newest = statements.newest_attempt(connection, name, trial)
            if statements.started_at(connection, name, trial, newest) == started:
                return newest
            row = {"study": name, "trial": trial, "attempt": newest + 1, "started_at": started}
            connection.execute(insert(tables.attempt), row)
            told = {"trial": trial, "attempt": newest + 1}
            study_events.append(connection, name, "trial_started", told)
            return newest + 1

    @again
    def transact(self, change: Callable[[Connection], T]) -> T:
        """Run a change of rows that belong to no study, or to one that has not begun."""
        with self._database.writing() as connection:
            return change(connection)

    @again
    def apply(self, name: str, change: Callable[[Connection], T]) -> T:
        """Run a change of a study's rows in one transaction."""
        with self._changing(name) as connection:
            return change(connection)

    def apply_briefly(self, name: str, change: Callable[[Connection], T], seconds: float) -> T:
        """Run a change of a study's rows, tried again for some seconds at most."""

        def work() -> T:
            with self._changing(name) as connection:
                return change(connection)

        return self._database.again(work, seconds=seconds)

    # --- evaluations ---------------------------------------------------------------------------

    @again
    def record(self, evaluation: Evaluation) -> FrontSummary | None:
        """Store an evaluation, the front and its history together; return the front after it.

        The same attempt again changes nothing. The evaluation is refused, with a warning in the
        log and None, if a later attempt was started or the trial is complete already. Numbers that
        are not finite are stored as NULL.

        Raises:
            NotFoundError: if the trial was never asked for.
            InputError: if it is complete but lacks a finite value of an objective.
        """
        name, trial = evaluation.study, evaluation.trial
        with self._changing(name) as connection:
            statements.known_trial(connection, name, trial)
            known = connection.execute(
                select(tables.evaluation).where(statements.of_trial(tables.evaluation, name, trial))
            ).first()
            if known is not None and known.attempt == evaluation.attempt:
                return front_rows.summary(connection, name)
            newest = statements.newest_attempt(connection, name, trial)
            if evaluation.attempt < newest or (known is not None and known.status == "complete"):
                log.warning(
                    "study '%s', trial %d: the result of attempt %d came too late and is ignored",
                    *(name, trial, evaluation.attempt),
                )
                return None
            self._write(connection, evaluation, replaces=known is not None)
            front = front_rows.summary(connection, name)
            study_events.append_evaluation(connection, evaluation, front)
            return front

    def _write(self, connection: Connection, evaluation: Evaluation, *, replaces: bool) -> None:
        """Store an evaluation and its effect; it may replace the evaluation of an earlier
        attempt."""
        name, trial = evaluation.study, evaluation.trial
        record = row_readers.studies(connection, name)[0]
        now = _now()
        rows = mapping.evaluation_rows(evaluation, now)
        for table in rows if replaces else ():
            if table is not tables.reuse or statements.exists(connection, table):
                connection.execute(delete(table).where(statements.of_trial(table, name, trial)))
        statements.insert_rows(connection, rows)
        this = tables.attempt.c.attempt == evaluation.attempt
        if evaluation.status != "stopped":  # its attempt has ended when it paused
            connection.execute(
                update(tables.attempt)
                .where(statements.of_trial(tables.attempt, name, trial), this)
                .values(
                    finished_at=now,
                    status=evaluation.status,
                    failure=mapping.failure_json(evaluation.failure),
                )
            )
        # A finished trial continues from no checkpoint.
        connection.execute(
            update(tables.rung)
            .where(statements.of_trial(tables.rung, name, trial))
            .values(evaluation=None, checkpoint_sha256=None)
        )
        if evaluation.status == "complete":
            copied = "copied_from" in evaluation.metrics
            point = statements.point(record, evaluation)
            front_rows.advance(connection, record, trial, point, copied=copied)

    # --- the reference model -------------------------------------------------------------------

    @again
    def set_reference_ms(self, name: str, key: str, ms: float) -> float:
        """Fix the time of the reference model, if none is fixed; return the one that holds."""
        with self._changing(name) as connection:
            known = statements.reference_ms(connection, name)
            if key not in known:
                row = {"study": name, "key": key, "ms": ms, "set_at": _now()}
                connection.execute(insert(tables.reference), row)
            return known.get(key, ms)

    # --- transactions --------------------------------------------------------------------------

    @contextmanager
    def _changing(self, name: str) -> Iterator[Connection]:
        """Yield a connection of a transaction that no other one changes this study beside."""
        with self._database.writing() as connection:
            statements.known_study(connection, name, lock=True)
            yield connection
