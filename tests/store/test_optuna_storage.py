"""What is written in one transaction is what Optuna's own storage reads and would have written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from moenas.store import optuna_storage
from moenas.store.optuna_storage import Storage, TrialChanges
from moenas.store.store import Store

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "norm": CategoricalDistribution(("rmsnorm", "layernorm")),
    "width": IntDistribution(8, 64, step=8),
    "slack": FloatDistribution(0.0, 1.0),
}
VALUES = {"norm": "layernorm", "width": 16, "slack": 0.25}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    store = Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True)
    return cast(Storage, store.optuna_storage())


def params(values: dict[str, object]) -> list[tuple[str, float, BaseDistribution]]:
    return [(n, DISTRIBUTIONS[n].to_internal_repr(x), DISTRIBUTIONS[n]) for n, x in values.items()]


def test_a_trial_is_the_one_that_optuna_s_calls_write(storage: Storage, tmp_path: Path) -> None:
    study = optuna.create_study(storage=storage, directions=["minimize"] * 3)
    ours, theirs = study.ask(), study.ask()
    changes = TrialChanges(params(VALUES), {"a": 1, "b": "x"}, {"constraints:c": -0.5})
    for _ in range(2):  # again changes nothing
        storage.write_trial(ours._trial_id, changes)
    for name, value, distribution in params(VALUES):
        storage.set_trial_param(theirs._trial_id, name, value, distribution)
    theirs.set_user_attr("a", 1)
    theirs.set_user_attr("b", "x")
    theirs.set_constraint("c", -0.5)
    theirs.set_user_attr("a", 2)
    values = [1.0, -2.5, math.inf]
    storage.write_trial(
        ours._trial_id, TrialChanges(user={"a": 2}, state=TrialState.COMPLETE, values=values)
    )
    study.tell(theirs, values)
    stock = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/moenas.db")
    one, other = stock.get_all_trials(study._study_id)
    assert one.params == other.params == VALUES
    assert one.distributions == other.distributions
    assert one.user_attrs == other.user_attrs == {"a": 2, "b": "x"}
    assert one.constraints == other.constraints == {"c": -0.5}
    assert one.values == other.values == values
    assert one.state == other.state == TrialState.COMPLETE
    assert one.datetime_start is not None
    assert one.datetime_complete is not None
    assert one.datetime_complete >= one.datetime_start


def test_a_distribution_that_does_not_fit_is_refused(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    study.ask().suggest_categorical("norm", ("rmsnorm", "dyt"))
    trial = study.ask()
    with pytest.raises(ValueError, match="dynamic value space"):
        storage.write_trial(trial._trial_id, TrialChanges(params(VALUES), {"a": 1}))
    stored = storage.get_trial(trial._trial_id)
    assert stored.params == {}
    assert stored.user_attrs == {}


def test_a_finished_or_unknown_trial_is_not_changed(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    study.tell(trial, 1.0)
    ended = TrialChanges(state=TrialState.COMPLETE, values=[1.0])
    for changes in (TrialChanges(user={"a": 1}), TrialChanges(params(VALUES)), ended):
        with pytest.raises(UpdateFinishedTrialError):
            storage.write_trial(trial._trial_id, changes)
    with pytest.raises(KeyError):
        storage.write_trial(99, TrialChanges(user={"a": 1}))


def test_the_end_of_a_trial_whose_answer_is_lost_is_written_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    written, lost = optuna_storage._write, iter([True])

    def losing(*args: Any) -> None:
        written(*args)
        if next(lost, False):
            raise OperationalError("COMMIT", {}, Exception("database is locked"))

    monkeypatch.setattr(optuna_storage, "_write", losing)
    storage.write_trial(trial._trial_id, TrialChanges(state=TrialState.COMPLETE, values=[1.5]))
    assert study.trials[0].values == [1.5]


def test_a_new_trial_is_not_read_again_unless_it_was_changed(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    new = storage._create_new_trial(study._study_id)
    storage.set_trial_user_attr(new._trial_id, "a", 1)
    assert storage.get_trial(new._trial_id).user_attrs == {"a": 1}
    other = storage._create_new_trial(study._study_id)
    first = storage.get_trial(other._trial_id)
    first.user_attrs["of the reader"] = 1
    assert storage.get_trial(other._trial_id).user_attrs == {}
    assert (first.number, first.state) == (1, TrialState.RUNNING)


def test_enqueued_trials_wait_in_order(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    study.ask()
    for width in (8, 16):
        study.enqueue_trial({"width": width})
    waiting = storage.waiting_trials(study._study_id)
    assert [storage.get_trial(i).number for i in waiting] == [1, 2]
    storage.set_trial_state_values(waiting[0], TrialState.RUNNING)
    assert storage.waiting_trials(study._study_id) == waiting[1:]
