"""Optuna's storage on our database: each call is tried again, and says plainly why it failed."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any, TypeAlias, cast

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import delete, insert, select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session

from moenas.errors import StorageError
from moenas.store.database import Database, engine_arguments, tune_sqlite
from moenas.store.faults import is_lock
from moenas.store.urls import is_uri

Param: TypeAlias = "tuple[str, float, BaseDistribution]"
"""Name of a parameter, its value in Optuna's internal form, and its distribution."""
TABLES_S = 30.0
"""How long processes may block each other when they create Optuna's tables."""

REPEATED = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "_set_trial_param",
    "get_trial_param",
    "get_trial_id_from_study_id_trial_number",
    "_get_best_trial_id",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "get_all_trials",
    "_get_trials",
    "record_heartbeat",
    "_get_stale_trial_ids",
)
"""Calls of RDBStorage that are one transaction each, and safe to repeat.

A new trial whose commit was not answered stays behind as RUNNING, and is evaluated by the next
run. Every other call sets its arguments, or reads.
"""


@dataclass(frozen=True)
class TrialChanges:
    """What one transaction changes of a running trial."""

    params: Sequence[Param] = ()
    user: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the user."""
    system: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of Optuna, such as constraints."""
    state: TrialState | None = None
    """How the trial ends; None if it goes on."""
    values: Sequence[float] | None = None
    """Values of the objectives of a trial that ends."""


class Storage(RDBStorage):
    """RDBStorage that waits for its database as our own tables do."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Optuna fills in the URL as a template of str.format.
        url = database.engine_url.render_as_string(hide_password=False)
        url = url.replace("{", "{{").replace("}", "}}")
        super().__init__(url, engine_kwargs=engine_arguments(database.url))
        self._distributions: dict[tuple[int, str], BaseDistribution] = {}
        """(study, parameter) -> a distribution that the study has for it."""
        self._newest: FrozenTrial | None = None
        """The trial that was made by the call before; it is not read again."""

    def write_trial(self, trial_id: int, changes: TrialChanges) -> None:
        """Change a running trial in one transaction; the same changes again change nothing.

        Raises:
            KeyError: if there is no such trial.
            UpdateFinishedTrialError: if it is finished.
            ValueError: if a parameter has a distribution that does not fit the other trials.
        """

        def change() -> None:
            self._plainly(_write, trial_id, changes)

        if changes.state is None:
            self._database.again(change)
        else:
            self._finish(trial_id, changes.state, changes.values, change)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial."""
        newest, self._newest = self._newest, None
        if newest is not None and newest._trial_id == trial_id:
            return newest
        stock = RDBStorage.get_trial
        return self._database.again(lambda: cast(FrozenTrial, self._plainly(stock, trial_id)))

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        """Make a trial, which the next call need not read."""
        stock = RDBStorage._create_new_trial
        made = self._database.again(
            lambda: cast(FrozenTrial, self._plainly(stock, study_id, template_trial))
        )
        self._newest = copy.deepcopy(made)
        return made

    def waiting_trials(self, study_id: int) -> list[int]:
        """Return the ids of the trials that are enqueued, in order, without reading the others."""
        wanted = (
            select(models.TrialModel.trial_id)
            .where(
                models.TrialModel.study_id == study_id,
                models.TrialModel.state == TrialState.WAITING,
            )
            .order_by(models.TrialModel.number)
        )

        def read(storage: Storage) -> list[int]:
            with _create_scoped_session(storage.scoped_session) as session:
                return list(session.execute(wanted).scalars())

        return self._database.again(lambda: cast(list[int], self._plainly(read)))

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set how a trial ended; once more after a lost answer changes nothing."""
        stock = RDBStorage.set_trial_state_values
        done = self._finish(
            trial_id, state, values, lambda: self._plainly(stock, trial_id, state, values)
        )
        return bool(done)

    def _finish(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
        change: Callable[[], Any],
    ) -> Any:
        """Run a change that ends a trial; if it is done already, return True from the second try.

        The answer of a commit can be lost, and a finished trial takes no change.
        """
        tries = 0

        def work() -> Any:
            nonlocal tries
            tries += 1
            try:
                return change()
            except UpdateFinishedTrialError:
                known = self.get_trial(trial_id)
                ours = known.state == state and known.values == (values and list(values))
                if tries == 1 or not ours:
                    raise
                return True

        return self._database.again(work)

    def _plainly(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of RDBStorage; raise what the database said, not Optuna's guess at it."""
        self._newest = None
        try:
            with self._database.plainly():
                return call(self, *args, **kwargs)
        except StorageInternalError as error:
            cause = error.__cause__
            broken = isinstance(cause, DBAPIError | PendingRollbackError)
            if not broken or isinstance(cause, IntegrityError | DataError):
                raise
            raise self._database.lost(cause) from cause


def _write(storage: Storage, trial_id: int, changes: TrialChanges) -> None:
    """Change a trial as RDBStorage does by many calls, all in one transaction."""
    ends = changes.state is not None
    with _create_scoped_session(storage.scoped_session, not ends) as session:
        trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=ends)
        storage.check_trial_is_updatable(trial_id, cast(TrialState, trial.state))
        if ends and trial.state != TrialState.RUNNING:
            raise UpdateFinishedTrialError(f"trial {trial.number} waits, and cannot end")
        if changes.params:
            _write_params(storage, session, trial, changes.params)
        attributes = (
            (models.TrialUserAttributeModel, changes.user),
            (models.TrialSystemAttributeModel, changes.system),
        )
        for model, entries in attributes:
            if entries:
                this = model.trial_id == trial_id, model.key.in_(list(entries))
                session.execute(delete(model).where(*this))
                rows = [
                    {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                    for key, value in entries.items()
                ]
                session.execute(insert(model), rows)
        if ends:
            _write_end(session, trial, changes)


def _write_params(
    storage: Storage, session: Session, trial: models.TrialModel, params: Sequence[Param]
) -> None:
    """Set parameters of a trial."""
    model, study_id = models.TrialParamModel, cast(int, trial.study_id)
    rows, known = [], storage._distributions
    for name, value, distribution in params:
        text = distribution_to_json(distribution)
        key = study_id, name
        if key not in known:
            earlier = (
                session.query(model)
                .join(models.TrialModel)
                .filter(models.TrialModel.study_id == study_id, model.param_name == name)
                .first()
            )
            known[key] = (
                distribution
                if earlier is None
                else json_to_distribution(cast(str, earlier.distribution_json))
            )
        check_distribution_compatibility(known[key], distribution)
        row = {"trial_id": trial.trial_id, "param_name": name, "param_value": value}
        rows.append({**row, "distribution_json": text})
    names = [row["param_name"] for row in rows]
    session.execute(
        delete(model).where(model.trial_id == trial.trial_id, model.param_name.in_(names))
    )
    session.execute(insert(model), rows)


def _write_end(session: Session, trial: models.TrialModel, changes: TrialChanges) -> None:
    """Set the state and the values of a trial that ends."""
    model = models.TrialValueModel
    session.execute(delete(model).where(model.trial_id == trial.trial_id))
    rows = []
    for objective, value in enumerate(changes.values or ()):
        number, kind = model.value_to_stored_repr(value)
        row = {"trial_id": trial.trial_id, "objective": objective}
        rows.append({**row, "value": number, "value_type": kind})
    if rows:
        session.execute(insert(model), rows)
    for name, entry in (("state", changes.state), ("datetime_complete", datetime.now())):
        setattr(trial, name, entry)  # the columns of Optuna's class have no types


def _repeated(name: str) -> Callable[..., Any]:
    @wraps(getattr(RDBStorage, name))
    def call(self: Storage, *args: Any, **kwargs: Any) -> Any:
        stock = getattr(RDBStorage, name)
        return self._database.again(lambda: self._plainly(stock, *args, **kwargs))

    return call


for _name in REPEATED:
    setattr(Storage, _name, _repeated(_name))


def open_storage(database: Database, *, serving: bool) -> Storage:
    """Return Optuna's storage on a database; its tables are made if they are missing.

    A transaction takes its lock at its beginning, so that no two processes tell one trial. With
    `serving`, for a process that shows studies, reading does not keep the driver waiting.

    Raises:
        StorageError: if another version of Optuna wrote the tables.
    """
    try:
        with database.setting_up():
            storage = _made(database)
    except RuntimeError as error:
        raise StorageError(f"{database.place}: {error}") from None
    may_write = database.mode == "rw" and not is_uri(database.url)
    if database.path is not None and may_write and not serving:
        # A commit of ours after one of Optuna's makes both safe from a loss of power.
        tune_sqlite(storage.engine, "NORMAL")
        storage.engine.dispose()
    return storage


def _made(database: Database) -> Storage:
    """Make the storage, once more while another process makes the same tables on SQLite."""
    end = time.monotonic() + TABLES_S
    while True:
        try:
            with database.plainly():
                return Storage(database)
        except Exception as error:
            cause = error.__cause__
            race = is_lock(cause) or isinstance(error, IntegrityError)
            if not race or time.monotonic() > end:
                if isinstance(error, StorageInternalError) and isinstance(cause, DBAPIError):
                    raise database.lost(cause) from cause
                raise
            time.sleep(0.05)
