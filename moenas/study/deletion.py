"""The deletion of a study: Optuna's rows, ours, the weights, and a corpus that is left over."""

from __future__ import annotations

from contextlib import suppress

import optuna
from sqlalchemy import Connection, delete, select, text

from moenas.errors import ConflictError
from moenas.store import audit, study_events, submissions, tables
from moenas.store.files import remove_tree
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store
from moenas.store.submissions import Submission
from moenas.store.weights import study_folder
from moenas.study.transfer import finish_renames


def delete_study(store: Store, name: str, user_name: str) -> int:
    """Delete a study with its trials and weights; return how many trials it had.

    Its published corpus is removed, too, unless another study of the database has it.

    A deletion that was interrupted is finished by the next one.

    Raises:
        StudyBusyError: if a process runs the study.
        ConflictError: if a server has started a driver of it.
    """
    if not store.knows(name):
        store.transact(lambda connection: _forget(connection, name, user_name))
        return 0
    trials = store.count(name)
    with StudyLease(store, name):
        if store.holds_optuna_study(name):
            with suppress(KeyError):
                optuna.delete_study(study_name=name, storage=store.optuna_storage())
        # Files go while the name is taken: a new study of this name must not lose its own.
        store.transact(lambda connection: _undriven(connection, name))
        remove_tree(study_folder(store.runs, name))
        finish_renames(store, name)
        digest = store.study(name).data.get("sha256")

        def forget(connection: Connection) -> None:
            _lock_studies(connection)
            _forget(connection, name, user_name, trials)
            if digest is not None and not _is_used(connection, digest):
                _remove_corpus(store, digest)

        store.transact(forget)
    return trials


def _lock_studies(connection: Connection) -> None:
    """Let no study begin until the commit: it would take a corpus that is removed for published.

    A transaction of SQLite that writes is alone.
    """
    if connection.dialect.name == "postgresql":
        lock = f"LOCK TABLE {tables.study.name} IN SHARE ROW EXCLUSIVE MODE"
        connection.execute(text(lock))


def _is_used(connection: Connection, digest: str) -> bool:
    """Whether a study of the database has a corpus."""
    own = tables.study.c.data["sha256"].as_string()
    return connection.execute(select(tables.study.c.name).where(own == digest)).first() is not None


def _remove_corpus(store: Store, digest: str) -> None:
    """Remove the published copy of a corpus; one that cannot be removed only takes space."""
    from moenas.data import published

    with suppress(OSError):
        published.remove(store.runs, digest)


def _undriven(connection: Connection, name: str) -> Submission | None:
    """Return the submission of a study, if it has one; a driver of it raises ConflictError."""
    submission = submissions.find(connection, name, lock=True)
    if submission is not None and submission.driver_running:
        raise ConflictError(f"study '{name}' has a driver; cancel it, and wait for its end")
    return submission


def _forget(connection: Connection, name: str, user_name: str, trials: int = 0) -> None:
    """Delete our rows; the last event tells those who watch."""
    submission = _undriven(connection, name)
    known = connection.execute(select(tables.study.c.name).where(tables.study.c.name == name))
    if submission is None and known.first() is None:
        return  # the transaction is repeated, as the answer of its commit was lost
    connection.execute(delete(tables.study).where(tables.study.c.name == name))
    submissions.forget(connection, name)
    study_events.forget(connection, name)
    study_events.append(connection, name, "deleted", {})
    audit.write(connection, user_name, "deleted", name, {"trials": trials})
