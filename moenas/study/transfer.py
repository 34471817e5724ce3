"""A study under another name, or in another database."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection, update

from moenas.errors import ConflictError, InputError, StudyBusyError
from moenas.records import Plain
from moenas.store import (
    audit,
    leases,
    reservations,
    statements,
    study_events,
    study_rows,
    submissions,
    tables,
)
from moenas.store.files import remove_tree
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store
from moenas.store.study_rows import STUDY, StudyRows
from moenas.store.weights import study_folder
from moenas.study.incoming import IncomingStudy, named_files
from moenas.study.uncommitted import UncommittedResults


@dataclass(frozen=True)
class Transferred:
    """A study that was copied, packed or unpacked."""

    study: str
    trials: int
    """Trials with an evaluation."""
    files: int
    """Files of weights and checkpoints."""

    @classmethod
    def of(cls, rows: StudyRows) -> Transferred:
        """Count what the rows of a study hold."""
        evaluations = rows[tables.evaluation.name]
        return cls(study_rows.name_of(rows), len(evaluations), len(named_files(rows)))

    def plain(self) -> Plain:
        """Return the record as a JSON object."""
        return {"study": self.study, "trials": self.trials, "files": self.files}


def idle_rows(store: Store, name: str) -> StudyRows:
    """Return the rows of a study that no process runs.

    Raises:
        NotFoundError: if there is no such study.
        StudyBusyError: if a process runs the study.
        ConflictError: if a result of it is not in the database yet.
    """

    def read(connection: Connection) -> StudyRows:
        holder = leases.holder(connection, name)
        if holder is not None:
            raise StudyBusyError(f"study '{name}' is being run by {holder}; wait for it or end it")
        return study_rows.read(connection, name)

    rows = store.read(name, read)
    if any(
        evaluation is not None for _, evaluation in UncommittedResults(store.runs, name).results()
    ):
        raise ConflictError(
            f"study '{name}' has results that are not in the database yet; `moenas doctor --repair`"
            " stores them"
        )
    return rows


def copy_study(source: Store, name: str, target: Store, new: str | None = None) -> Transferred:
    """Copy a study with its files to another database, or under another name to the same one.

    The study appears in the target whole or not at all; nothing is written to the source.

    Raises:
        StudyBusyError: if a process runs the study.
        ConflictError: if the target has a study of this name.
        InputError: if a file of weights is missing or damaged.
    """
    rows = idle_rows(source, name)
    new = statements.normal_study_name(new or name)
    renamed = study_rows.renamed(rows, new)
    with IncomingStudy(target, new) as incoming:
        for file in named_files(rows):
            with file.find(source, name).open("rb") as opened:
                incoming.add(file, opened)
        incoming.commit(lambda connection: study_rows.write(connection, renamed))
    return Transferred.of(renamed)


# --- another name --------------------------------------------------------------------------------


def rename_study(store: Store, name: str, new: str, user_name: str) -> Transferred:
    """Give a study another name, in Optuna's rows, ours, the queue, the events and the files.

    A rename that was killed is finished by the same call. The call with the names exchanged
    finishes it, too, and gives the study its former name back.

    Raises:
        NotFoundError: if there is no study of this name.
        StudyBusyError: if a process runs the study.
        ConflictError: if there is a study of the new name, or a server is to run this one.
    """
    new = statements.normal_study_name(new)
    if new == name:
        raise InputError(f"study '{name}' has this name already; give another one")
    if store.query(lambda connection: statements.renamed_to(connection, name)) == new:
        _finish(store, new)
        return Transferred.of(store.read(new, lambda c: study_rows.read(c, new)))
    if store.query(lambda connection: statements.renamed_to(connection, new)) == name:
        _finish(store, name)
    store.study(name)  # raises NotFoundError
    with StudyLease(store, name):
        UncommittedResults(store.runs, name).commit(store)
        stored = store.read(name, lambda connection: study_rows.read(connection, name))
        rows = study_rows.renamed(stored, new)

        def change(connection: Connection) -> None:
            _rename(connection, name, rows, user_name)
            store.claim_renamed(connection, new)

        with IncomingStudy(store, new) as incoming:
            for file in named_files(stored):
                incoming.link(file, file.find(store, name))
            incoming.commit(change)
        _finish(store, new)
    return Transferred.of(rows)


def _finish(store: Store, present: str) -> None:
    """Remove the files below the former names of a study, and free these names.

    The claim on the study keeps other processes from doing the same. A new study of a name that one
    of them has freed must not lose its files.

    Raises:
        StudyBusyError: if a process runs the study, or renames it.
    """
    with StudyLease(store, present):
        finish_renames(store, present)


def finish_renames(store: Store, present: str) -> None:
    """Do what `_finish` does for a process that holds the claim on the study."""
    for name in store.query(lambda connection: reservations.of_study(connection, present)):
        remove_tree(study_folder(store.runs, name))
        store.transact(partial(_free_name, name=name, present=present))


def _rename(connection: Connection, name: str, rows: StudyRows, user_name: str) -> None:
    """Replace the rows of the old name by rows of the new name; the old name stays reserved."""
    new = study_rows.name_of(rows)
    submitted = submissions.find(connection, name, lock=True)
    if submitted is not None:
        if submitted.driver_running or submitted.state not in (*submissions.OVER, "paused"):
            raise ConflictError(
                f"study '{name}' is {submitted.state} on a server; pause or cancel it there first"
            )
        submissions.require_study_name(new)
        # The driver of a study runs its space file, which says the former name.
        overrides = [*submitted.overrides, f"name={json.dumps(new)}"]
        submissions.rename(connection, name, new, overrides)
    study_rows.write_own(connection, rows)
    study_rows.forget(connection, name)
    # Files go while the name is reserved: a new study of this name must not lose its own.
    reservations.reserve(connection, name, new)
    connection.execute(update(STUDY).where(STUDY.c.study_name == name).values(study_name=new))
    source = tables.reuse.c.from_study
    connection.execute(update(tables.reuse).where(source == name).values(from_study=new))
    study_events.move(connection, name, new)
    study_events.append(connection, new, "renamed", {"from": name})
    audit.write(connection, user_name, "renamed", new, {"from": name})


def _free_name(connection: Connection, name: str, present: str) -> None:
    """Let a new study have a former name; the last event tells those who watch."""
    if not reservations.free(connection, name):
        return  # the transaction is repeated, as the answer of its commit was lost
    study_events.append(connection, name, "deleted", {"renamed_to": present})
