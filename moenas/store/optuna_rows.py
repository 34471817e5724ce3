"""Corrections of Optuna's finished trials, which its API does not allow, and their parameters.

Optuna closes a trial for ever once it is told. Three cases need more: another program has told a
trial of ours, a failed trial is to run again, and an objective was measured again. Both stores
live in one database, so that a correction is one transaction with our own rows.

The tables belong to Optuna's own models; `pyproject.toml` pins the major version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import Connection, delete, insert, inspect, select, update

from moenas.errors import StorageLostError
from moenas.records import Plain

TRIAL = models.TrialModel.__table__
VALUE = models.TrialValueModel.__table__
ATTRIBUTE = models.TrialUserAttributeModel.__table__
SYSTEM = models.TrialSystemAttributeModel.__table__
STUDY = models.StudyModel.__table__
PARAM = models.TrialParamModel.__table__
CONSTRAINTS = "constraints"
"""First part of the system attributes that Optuna keeps constraints in."""
FINITE = models.TrialValueModel.TrialValueType.FINITE


def set_outcome(
    connection: Connection,
    study: str,
    number: int,
    state: TrialState,
    values: Sequence[float] | None,
    constraints: Mapping[str, float] | None = None,
) -> None:
    """Close a trial with this state and these values, whatever it says now.

    `constraints` replace constraints of the same names; others stay.

    Raises:
        StorageLostError: if Optuna has no such trial.
    """
    trial_id = _trial_id(connection, study, number)
    # Optuna stores times as naive UTC.
    now = datetime.now(UTC).replace(tzinfo=None)
    changes = {"state": state, "datetime_complete": now}
    connection.execute(update(TRIAL).where(TRIAL.c.trial_id == trial_id).values(changes))
    connection.execute(delete(VALUE).where(VALUE.c.trial_id == trial_id))
    rows = [
        {"trial_id": trial_id, "objective": i, "value": value, "value_type": FINITE}
        for i, value in enumerate(values or ())
    ]
    if rows:
        connection.execute(insert(VALUE), rows)
    for name, violation in (constraints or {}).items():
        key = f"{CONSTRAINTS}:{name}"
        this = (SYSTEM.c.trial_id == trial_id) & (SYSTEM.c.key == key)
        connection.execute(delete(SYSTEM).where(this))
        row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(float(violation))}
        connection.execute(insert(SYSTEM), row)


def reopen(connection: Connection, study: str, number: int) -> None:
    """Let a finished trial run again: it keeps its number, parameters and constraints.

    Raises:
        StorageLostError: if Optuna has no such trial.
    """
    trial_id = _trial_id(connection, study, number)
    changes = {"state": TrialState.RUNNING, "datetime_complete": None}
    connection.execute(update(TRIAL).where(TRIAL.c.trial_id == trial_id).values(changes))
    for table in (VALUE, ATTRIBUTE):
        connection.execute(delete(table).where(table.c.trial_id == trial_id))


def params(connection: Connection, study: str) -> dict[int, Plain]:
    """Return trial -> parameter -> value, of the trials of a study that have parameters."""
    if not inspect(connection).has_table(PARAM.name):
        return {}  # Optuna has not made its tables yet
    wanted = (
        select(TRIAL.c.number, PARAM.c.param_name, PARAM.c.param_value, PARAM.c.distribution_json)
        .join(TRIAL, TRIAL.c.trial_id == PARAM.c.trial_id)
        .join(STUDY, STUDY.c.study_id == TRIAL.c.study_id)
        .where(STUDY.c.study_name == study)
        .order_by(TRIAL.c.number, PARAM.c.param_id)
    )
    distributions: dict[str, BaseDistribution] = {}
    params_by_trial: dict[int, Plain] = {}
    for row in connection.execute(wanted):
        text = row.distribution_json
        if text not in distributions:
            distributions[text] = json_to_distribution(text)
        value = distributions[text].to_external_repr(row.param_value)
        params_by_trial.setdefault(row.number, {})[row.param_name] = value
    return params_by_trial


def has_study(connection: Connection, study: str) -> bool:
    """Say whether Optuna's tables hold a study of this name."""
    wanted = select(STUDY.c.study_id).where(STUDY.c.study_name == study)
    return connection.execute(wanted).first() is not None


def _trial_id(connection: Connection, study: str, number: int) -> int:
    wanted = (
        select(TRIAL.c.trial_id)
        .join(STUDY, STUDY.c.study_id == TRIAL.c.study_id)
        .where(STUDY.c.study_name == study, TRIAL.c.number == number)
    )
    trial_id = connection.execute(wanted).scalar()
    if trial_id is None:
        raise StorageLostError(
            f"study '{study}': Optuna's tables hold no trial {number} any more: another program"
            " has deleted it; run the same command again to restore it from ours"
        )
    return int(trial_id)
