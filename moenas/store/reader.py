"""Reads of the studies of one database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, inspect, select

from moenas.records import EndReason, Evaluation, FrontPoint, Plain, RungResult, StudyRecord, View
from moenas.store import front_rows, leases, optuna_rows, row_readers, statements, tables
from moenas.store.database import Database
from moenas.store.front_rows import FrontSummary
from moenas.store.row_readers import FrontView, Summary

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="StoreReader")


def again(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Let a method, which is one transaction, be tried again when it fails for a passing reason.

    It may be repeated after it was done, as the answer of a commit can be lost: then it changes
    nothing, and returns the same.
    """

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._database.again(lambda: method(self, *args, **kwargs))

    return call


class StoreReader:
    """The studies of one database, for reading.

    Every method is one transaction, which is tried again for a limited time when it fails for a
    reason that passes. One that names a study raises NotFoundError if there is none of that name.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @again
    def study(self, name: str) -> StudyRecord:
        """Return a study."""
        with self._reading(name) as connection:
            return row_readers.studies(connection, name)[0]

    @again
    def studies(self) -> list[StudyRecord]:
        """Return all studies, oldest first."""
        with self._database.reading() as connection:
            return row_readers.studies(connection)

    @again
    def driver(self, name: str) -> str | None:
        """Say who runs a study now, or return None."""
        with self._reading(name) as connection:
            return leases.holder(connection, name)

    @again
    def attempts(self, name: str, trial: int) -> int:
        """Return how many times a trial was started."""
        with self._reading(name) as connection:
            return statements.newest_attempt(connection, name, trial)

    @again
    def read(self, name: str, wanted: Callable[[Connection], T]) -> T:
        """Read a study's rows in one state."""
        with self._reading(name) as connection:
            return wanted(connection)

    @again
    def query(self, wanted: Callable[[Connection], T]) -> T:
        """Read rows of any studies in one state."""
        with self._database.reading() as connection:
            return wanted(connection)

    @again
    def architecture(self, name: str, trial: int) -> Plain:
        """Return the canonical architecture of a trial.

        Raises:
            NotFoundError: if the study has no such trial.
        """
        with self._reading(name) as connection:
            architecture: Plain = statements.known_trial(connection, name, trial).architecture
            return architecture

    @again
    def evaluation(self, name: str, trial: int) -> Evaluation | None:
        """Return the evaluation of a trial, or None if there is none yet."""
        with self._reading(name) as connection:
            return row_readers.evaluation(connection, name, trial)

    @again
    def evaluations(self, name: str) -> list[Evaluation]:
        """Return all evaluations of a study in order of their trials.

        The curve and the routing of each are read when they are asked for.
        """
        with self._reading(name) as connection:
            return row_readers.evaluations(connection, name, self._rest(name))

    @again
    def knows(self, name: str) -> bool:
        """Say whether there is a study of ours of this name."""
        with self._database.reading() as connection:
            return bool(row_readers.studies(connection, name))

    @again
    def holds_optuna_study(self, name: str) -> bool:
        """Say whether Optuna's tables hold a study of this name."""
        with self._database.reading() as connection:
            if not inspect(connection).has_table("studies"):
                return False
            return optuna_rows.has_study(connection, name)

    @again
    def ended(self, name: str) -> EndReason | None:
        """Return why a study is over; None if it is not, or ended before that was stored."""
        with self._reading(name) as connection:
            if not statements.exists(connection, tables.ended):
                return None  # a reader does not change a database of an older schema
            wanted = select(tables.ended.c.reason).where(tables.ended.c.study == name)
            return connection.scalar(wanted)

    @again
    def finished(self, name: str) -> list[int]:
        """Return the trials that have an evaluation."""
        trial = tables.evaluation.c.trial
        with self._reading(name) as connection:
            known = select(trial).where(tables.evaluation.c.study == name).order_by(trial)
            return list(connection.scalars(known))

    def count(self, name: str) -> int:
        """Return how many trials of a study have an evaluation."""
        return len(self.finished(name))

    @again
    def front(self, name: str) -> list[int]:
        """Return the trials on the front in order of the first objective, best first."""
        with self._reading(name) as connection:
            return front_rows.members(connection, row_readers.studies(connection, name)[0])

    @again
    def front_summary(self, name: str) -> FrontSummary:
        """Return the size of the front and its hypervolume now."""
        with self._reading(name) as connection:
            return front_rows.summary(connection, name)

    @again
    def history(self, name: str) -> list[FrontPoint]:
        """Return the front after each complete trial, in order, by one reference point."""
        with self._reading(name) as connection:
            return front_rows.history(connection, name)

    @again
    def summary(self, name: str) -> Summary:
        """Return how far a study is and how it does, in counts and best values."""
        with self._reading(name) as connection:
            return row_readers.summary(connection, name)

    @again
    def front_view(self, name: str) -> FrontView:
        """Return the members of the front, their architectures, and how they were measured."""
        with self._reading(name) as connection:
            return row_readers.front_view(connection, name, self._rest(name))

    @again
    def view(self, name: str) -> View:
        """Return a study for figures: the study, the front and its history in one state.

        Evaluations, their curves and architectures are read when they are asked for.
        """
        with self._reading(name) as connection:
            record = row_readers.studies(connection, name)[0]
            front = front_rows.members(connection, record)
            history = front_rows.history(connection, name)
        later = {
            "evaluations": lambda: self.evaluations(name),
            "architectures": lambda: self.architectures(name),
            "params": lambda: self.params(name),
            "rungs": lambda: self.rung_results(name),
            "replicates": lambda: self.replicates(name),
        }
        return row_readers.StoredView.of(record, front, history, later)

    @again
    def replicates(self, name: str) -> list[Evaluation]:
        """Return the trials that were trained again, in order of trials and seeds."""
        with self._reading(name) as connection:
            return row_readers.replicates(connection, name)

    @again
    def replicates_version(self, name: str) -> tuple[int, str | None]:
        """Return the number of replicates and when the newest was recorded."""
        with self._reading(name) as connection:
            return row_readers.replicates_version(connection, name)

    @again
    def architectures(self, name: str) -> dict[int, Plain]:
        """Return trial -> canonical architecture of all trials."""
        with self._reading(name) as connection:
            return row_readers.architectures(connection, name)

    @again
    def params(self, name: str) -> dict[int, Plain]:
        """Return trial -> hole -> drawn value, of all trials that have drawn."""
        with self._reading(name) as connection:
            return optuna_rows.params(connection, name)

    @again
    def rung_results(self, name: str) -> list[RungResult]:
        """Return the results at all rungs, in order of rungs and trials."""
        with self._reading(name) as connection:
            return row_readers.rung_results(connection, name)

    def _rest(self, name: str) -> row_readers.Rest:
        """Return what reads the curve and the routing of a trial."""

        members: dict[int, list[Plain]] = {}

        def read(part: str, trial: int) -> list[Plain]:
            with self._database.reading() as connection:
                if part == "routing" and not members:
                    members.update(row_readers.routing_of_front(connection, name))
                    members.setdefault(-1, [])
                if part == "routing" and trial in members:
                    return members[trial]
                return row_readers.rest_of(connection, name, part, trial)

        return lambda part, trial: self._database.again(lambda: read(part, trial))

    @again
    def reference_ms(self, name: str) -> dict[str, float]:
        """Return device and workload -> time of the reference model there, in ms."""
        with self._reading(name) as connection:
            return statements.reference_ms(connection, name)

    @contextmanager
    def _reading(self, name: str) -> Iterator[Connection]:
        """Yield a connection that sees one state, with the study in it."""
        with self._database.reading() as connection:
            statements.known_study(connection, name)
            yield connection
