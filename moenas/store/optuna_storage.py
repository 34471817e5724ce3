"""Optuna's storage on our database: each call is tried again, and says plainly why it failed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
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
from optuna.trial import TrialState
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
    "_create_new_trial",
    "_set_trial_param",
    "get_trial_param",
    "get_trial_id_from_study_id_trial_number",
    "_get_best_trial_id",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "get_trial",
    "get_all_trials",
    "_get_trials",
    "record_heartbeat",
    "_get_stale_trial_ids",
)
"""Calls of RDBStorage that are one transaction each, and safe to repeat.

A new trial whose commit was not answered stays behind as RUNNING, and is evaluated by the next
run. Every other call sets what it is given, or reads.
"""


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

    def set_trial_params(self, trial_id: int, params: Sequence[Param]) -> None:
        """Set several parameters of a trial in one transaction; again changes nothing.

        Raises:
            KeyError: if there is no such trial.
            UpdateFinishedTrialError: if it is finished.
            ValueError: if a parameter has a distribution that does not fit those of other trials.
        """
        self._database.again(lambda: self._plainly(_write_params, trial_id, params))

    def set_trial_attributes(
        self, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any]
    ) -> None:
        """Set several attributes of a trial in one transaction; again changes nothing.

        Raises:
            KeyError: if there is no such trial.
            UpdateFinishedTrialError: if it is finished.
        """
        self._database.again(lambda: self._plainly(_write_attributes, trial_id, user, system))

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
        tries = 0

        def work() -> bool:
            nonlocal tries
            tries += 1
            try:
                stock = RDBStorage.set_trial_state_values
                return bool(self._plainly(stock, trial_id, state, values))
            except UpdateFinishedTrialError:
                known = self.get_trial(trial_id)
                ours = known.state == state and known.values == (values and list(values))
                if tries == 1 or not ours:
                    raise
                return True

        return self._database.again(work)

    def _plainly(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of RDBStorage; raise what the database said, not Optuna's guess at it."""
        try:
            with self._database.plainly():
                return call(self, *args, **kwargs)
        except StorageInternalError as error:
            cause = error.__cause__
            broken = isinstance(cause, DBAPIError | PendingRollbackError)
            if not broken or isinstance(cause, IntegrityError | DataError):
                raise
            raise self._database.lost(cause) from cause


def _updatable(storage: Storage, session: Session, trial_id: int) -> Any:
    """Return the row of a trial that is not finished."""
    trial = models.TrialModel.find_or_raise_by_id(trial_id, session)
    storage.check_trial_is_updatable(trial_id, cast(TrialState, trial.state))
    return trial


def _write_params(storage: Storage, trial_id: int, params: Sequence[Param]) -> None:
    """Set parameters as RDBStorage sets one, all in one transaction."""
    model = models.TrialParamModel
    with _create_scoped_session(storage.scoped_session, True) as session:
        study_id = _updatable(storage, session, trial_id).study_id
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
            row = {"trial_id": trial_id, "param_name": name, "param_value": value}
            rows.append({**row, "distribution_json": text})
        names = [row["param_name"] for row in rows]
        session.execute(
            delete(model).where(model.trial_id == trial_id, model.param_name.in_(names))
        )
        session.execute(insert(model), rows)


def _write_attributes(
    storage: Storage, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any]
) -> None:
    """Set attributes as RDBStorage sets one, all in one transaction."""
    with _create_scoped_session(storage.scoped_session, True) as session:
        _updatable(storage, session, trial_id)
        kinds = (models.TrialUserAttributeModel, user), (models.TrialSystemAttributeModel, system)
        for model, attributes in kinds:
            if attributes:
                this = model.trial_id == trial_id, model.key.in_(list(attributes))
                session.execute(delete(model).where(*this))
                rows = [
                    {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                    for key, value in attributes.items()
                ]
                session.execute(insert(model), rows)


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
        StorageError: if the tables are those of another version of Optuna.
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
