"""What is written in one transaction is what Optuna's own storage reads and would have written."""

from __future__ import annotations

from pathlib import Path
from typing import cast

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

from moenas.store.optuna_storage import Storage
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
    study = optuna.create_study(storage=storage)
    ours, theirs = study.ask(), study.ask()
    for _ in range(2):  # again changes nothing
        storage.set_trial_params(ours._trial_id, params(VALUES))
        storage.set_trial_attributes(ours._trial_id, {"a": 1, "b": "x"}, {"constraints:c": -0.5})
    for name, value, distribution in params(VALUES):
        storage.set_trial_param(theirs._trial_id, name, value, distribution)
    theirs.set_user_attr("a", 1)
    theirs.set_user_attr("b", "x")
    theirs.set_constraint("c", -0.5)
    storage.set_trial_attributes(ours._trial_id, {"a": 2}, {})
    theirs.set_user_attr("a", 2)
    for trial in (ours, theirs):
        study.tell(trial, 1.0)
    stock = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/moenas.db")
    one, other = stock.get_all_trials(study._study_id)
    assert one.params == other.params == VALUES
    assert one.distributions == other.distributions
    assert one.user_attrs == other.user_attrs == {"a": 2, "b": "x"}
    assert one.constraints == other.constraints == {"c": -0.5}


def test_a_distribution_that_does_not_fit_is_refused(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    study.ask().suggest_categorical("norm", ("rmsnorm", "dyt"))
    trial = study.ask()
    with pytest.raises(ValueError, match="dynamic value space"):
        storage.set_trial_params(trial._trial_id, params(VALUES))
    assert storage.get_trial(trial._trial_id).params == {}


def test_a_finished_or_unknown_trial_is_not_changed(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_attributes(trial._trial_id, {"a": 1}, {})
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_params(trial._trial_id, params(VALUES))
    with pytest.raises(KeyError):
        storage.set_trial_attributes(99, {"a": 1}, {})


def test_enqueued_trials_wait_in_order(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    study.ask()
    for width in (8, 16):
        study.enqueue_trial({"width": width})
    waiting = storage.waiting_trials(study._study_id)
    assert [storage.get_trial(i).number for i in waiting] == [1, 2]
    storage.set_trial_state_values(waiting[0], TrialState.RUNNING)
    assert storage.waiting_trials(study._study_id) == waiting[1:]
