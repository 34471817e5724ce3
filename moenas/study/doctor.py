"""Problems of a stored study, and their repair."""

from __future__ import annotations

import gzip
import json
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import optuna
from sqlalchemy import Connection, select, text

from moenas import pareto
from moenas.errors import InputError, StorageLostError, StudyBusyError
from moenas.records import Evaluation, Plain
from moenas.search.trials import outcome
from moenas.store import attempts, front_rows, row_readers, rungs, statements, tables
from moenas.store.checkpoints import read_checkpoint, unused_checkpoints
from moenas.store.files import matching, remove_file, write_whole
from moenas.store.heartbeat import StudyLease
from moenas.store.object_path import StorePath
from moenas.store.store import Store
from moenas.store.weights import FILE, missing_weights, read_weights, study_folder
from moenas.study import reconcile, repairs
from moenas.study.uncommitted import UncommittedResults

Area = Literal["database", "trials", "front", "weights", "files"]
TOLERANCE = 1e-9
"""Share by which a stored hypervolume may differ from one that is computed again."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    area: Area
    trial: int | None
    text: str
    repair: str | None
    """What `repair` would do; None if only the user can."""

    def plain(self) -> Plain:
        """Return the finding as a JSON object."""
        return asdict(self)


def examine(store: Store, name: str) -> list[Finding]:
    """Compare both stores, the front, the weights and the files of a study; change nothing.

    Raises:
        StudyBusyError: if a process runs the study: its unfinished writes would look like damage.
    """
    _require_rest(store, name)
    record = store.study(name)
    stored = {e.trial: e for e in store.evaluations(name)}
    findings = [*_database(store), *_trials(store, name, stored, list(record.directions))]
    findings += store.read(name, lambda connection: _front(connection, name))
    findings += [*_weights(store, name, stored), *_files(store, name, stored)]
    _require_rest(store, name)
    return findings


def _require_rest(store: Store, name: str) -> None:
    """Raise StudyBusyError if a process runs the study."""
    if (holder := store.driver(name)) is not None:
        raise StudyBusyError(f"study '{name}' is being run by {holder}; wait for it or end it")


def check_start(store: Store, name: str, stored: dict[int, Evaluation]) -> list[str]:
    """Examine what a run relies on, repair the front, and return what the user should know.

    Digests of weights are left to `examine`: they take as long as all the files are large.
    """
    said = []
    if findings := store.read(name, lambda connection: _front(connection, name)):
        record = store.study(name)
        store.apply(name, lambda connection: repairs.rebuild_front(connection, record))
        said.append(f"{findings[0].text}; it was computed again")
    with_weights = [trial for trial, evaluation in stored.items() if evaluation.weights_sha256]
    lost = missing_weights(store.runs, name, with_weights)
    if lost:
        said.append(
            f"the weights of {len(lost)} trials, such as {lost[0]}, are not there; `moenas doctor`"
            " says more"
        )
    return said


def repair(store: Store, name: str, findings: list[Finding]) -> StorePath | None:
    """Repair what can be repaired, after a backup; return the backup, or None if nothing was done.

    Raises:
        StudyBusyError: if a process runs the study.
    """
    areas = {finding.area for finding in findings if finding.repair}
    if not areas:
        return None
    record = store.study(name)
    with StudyLease(store, name):
        backup = back_up(store, name)
        # Results first: an uncommitted one needs its weights, and Optuna is told it.
        UncommittedResults(store.runs, name).commit(store)
        _repair_trials(store, name, list(record.directions))
        if "front" in areas:
            store.apply(name, lambda connection: repairs.rebuild_front(connection, record))
        if "files" in areas:
            for path in _leftovers(store, name, {e.trial for e in store.evaluations(name)}):
                remove_file(path)
    return backup


def back_up(store: Store, name: str) -> StorePath:
    """Copy an SQLite database beside itself; of another one, write the study's rows as JSON.

    Raises:
        InputError: if the backup cannot be written.
    """
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    path = store.path
    try:
        if path is not None:
            backup = path.with_name(f"{path.name}.backup-{now}")
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as to:
                source.backup(to)
            return backup
        rows = store.read(name, lambda connection: _all_rows(connection, name))
        written = study_folder(store.runs, name) / f"backup-{now}.json.gz"
        write_whole(written, gzip.compress(json.dumps(rows).encode()))
        return written
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"the backup cannot be written: {error}; nothing was repaired") from None


def _all_rows(connection: Connection, name: str) -> dict[str, list[Plain]]:
    """Return our rows of a study, and Optuna's, by table."""
    rows_by_table: dict[str, list[Plain]] = {}
    for table in tables.metadata.sorted_tables:
        key = table.c.get("study", table.c.get("name"))
        if key is None or not statements.exists(connection, table):
            continue
        rows = connection.execute(select(table).where(key == name)).mappings()
        rows_by_table[table.name] = [dict(row) for row in rows]
    trials = text(
        "SELECT t.number, CAST(t.state AS varchar) AS state, v.objective, v.value FROM trials t"
        " JOIN studies s ON s.study_id = t.study_id"
        " LEFT JOIN trial_values v ON v.trial_id = t.trial_id WHERE s.study_name = :name"
    )
    rows_by_table["optuna"] = [
        dict(row) for row in connection.execute(trials, {"name": name}).mappings()
    ]
    return rows_by_table


# --- what is examined ----------------------------------------------------------------------------


def _database(store: Store) -> list[Finding]:
    """Check the file or the server itself."""
    try:
        store.verify()
    except StorageLostError as error:
        return [Finding("database", None, str(error), None)]
    return []


def _trials(
    store: Store, name: str, stored: dict[int, Evaluation], names: list[str]
) -> list[Finding]:
    """Compare our evaluations with Optuna's trials."""
    texts = {
        "missing": "add it to Optuna's tables",
        "untold": "tell it to Optuna",
        "different": "give Optuna's trial our values",
        "taken": "open it again, so that the next run evaluates it",
        "foreign": "record that it is not ours",
    }
    trials = _optuna_trials(store, name)
    differing = reconcile.differences(stored, attempts.candidates(store, name), trials, names)
    return [Finding("trials", d.trial, d.text, texts[d.kind]) for d in differing]


def _optuna_trials(store: Store, name: str) -> list[optuna.trial.FrozenTrial]:
    storage = store.optuna_storage()
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return []
    return study.get_trials(deepcopy=False)


def _front(connection: Connection, name: str) -> list[Finding]:
    """Compare the stored front and its hypervolume with what the stored values give."""
    record = row_readers.studies(connection, name)[0]
    names, directions = list(record.directions), list(record.directions.values())
    points = repairs.complete_points(connection, name, names)
    own = {trial: values for trial, values, copied in points if not copied}
    wanted: set[int] = set()
    if own:
        mask = pareto.non_dominated(list(own.values()), directions)
        wanted = {trial for trial, keep in zip(own, mask, strict=True) if keep}
    stored = set(front_rows.members(connection, record))
    again = "compute the front and its history again"
    findings = []
    if stored != wanted:
        text = f"the front is {sorted(stored)}, and the stored values give {sorted(wanted)}"
        findings.append(Finding("front", None, text, again))
    history = front_rows.history(connection, name)
    if [point.trial for point in history] and len(history) != len(points):
        text = f"{len(history)} rows of history for {len(points)} complete trials"
        findings.append(Finding("front", None, text, again))
    if own:
        corner = pareto.reference_point([values for _, values, _ in points], directions)
        volume = pareto.hypervolume([own[t] for t in wanted], corner, directions)
        last = history[-1].hypervolume if history else 0.0
        if list(record.reference_point.values()) != corner:
            text = f"the reference point is {record.reference_point}, and the values give {corner}"
            findings.append(Finding("front", None, text, again))
        elif abs(last - volume) > TOLERANCE * max(1.0, abs(volume)) and pareto.is_exact(
            len(corner)
        ):
            text = f"the hypervolume is {last:.9g}, and the stored values give {volume:.9g}"
            findings.append(Finding("front", None, text, again))
    return findings


def _weights(store: Store, name: str, stored: dict[int, Evaluation]) -> list[Finding]:
    """Compare each file of weights with its stored digest."""
    findings = []
    for trial, evaluation in stored.items():
        if evaluation.weights_sha256 is None:
            continue
        try:
            read_weights(store.runs, name, trial, evaluation.weights_sha256)
        except InputError as error:
            findings.append(Finding("weights", trial, str(error), None))
    for trial, pause in rungs.pauses(store, name).items():
        digest = pause.evaluation.weights_sha256
        try:
            read_checkpoint(store.runs, name, trial, pause.result.rung, digest)
        except InputError as error:
            text = f"{error}; without it the next run trains the candidate again from the start"
            findings.append(Finding("weights", trial, text, None))
    return findings


def _files(store: Store, name: str, stored: dict[int, Evaluation]) -> list[Finding]:
    """Find files that no row needs, and results that have no row."""
    findings = [
        Finding("files", None, f"{path}: left by a run that was killed", "remove it")
        for path in _leftovers(store, name, set(stored))
    ]
    for path, result in UncommittedResults(store.runs, name).results():
        trial = result.trial if result is not None else None
        findings.append(Finding("files", trial, f"{path}: a result without a row", "record it"))
    return findings


def _leftovers(store: Store, name: str, trials: set[int]) -> list[StorePath]:
    """Return drafts, weights of trials without an evaluation, and checkpoints that none needs."""
    folder = study_folder(store.runs, name)
    spooled = {r.trial for _, r in UncommittedResults(store.runs, name).results() if r is not None}
    paths: list[StorePath] = []
    for path in matching(folder, "*/*"):
        number = path.parent.name
        draft = path.name.startswith(".")
        lost = path.name == FILE and number.isdigit() and int(number) not in trials | spooled
        if path.is_file() and (draft or lost):
            paths.append(path)
    used = {trial: pause.result.rung for trial, pause in rungs.pauses(store, name).items()}
    checkpoints = unused_checkpoints(store.runs, name, used)
    return paths + [path for path in checkpoints if path not in paths]


def _repair_trials(store: Store, name: str, names: list[str]) -> None:
    """Make Optuna's rows agree with ours."""
    stored = {e.trial: e for e in store.evaluations(name)}
    if not store.holds_optuna_study(name):
        directions: list[Any] = list(store.study(name).directions.values())
        optuna.create_study(study_name=name, storage=store.optuna_storage(), directions=directions)
    study = optuna.load_study(study_name=name, storage=store.optuna_storage())
    trials = study.get_trials(deepcopy=False)
    differing = reconcile.differences(stored, attempts.candidates(store, name), trials, names)
    reconcile.repair(store, study, differing, stored, names)
    for difference in differing:
        if difference.kind == "untold":
            found_outcome = outcome(stored[difference.trial], names)
            reconcile.correct(store, name, difference.trial, *found_outcome)
