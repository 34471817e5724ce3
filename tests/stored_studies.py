"""A made-up view put into a real store, with the Optuna study that belongs to it."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna

from moenas.records import Evaluation, Plain, View
from moenas.store.store import Store

STATES = {
    "complete": optuna.trial.TrialState.COMPLETE,
    "failed": optuna.trial.TrialState.FAIL,
    "infeasible": optuna.trial.TrialState.COMPLETE,
}
SPLENDID = 1e-3
"""What an infeasible trial is said to reach: it dominates all others, and must not be shown so."""


def shelve(folder: Path, *views: View) -> Store:
    """Return a store in `folder` that holds these studies."""
    store = Store.open(f"sqlite:///{folder}/moenas.db", create=True)
    storage = store.optuna_storage()
    for view in views:
        store.create_study(view.study)
        directions = list(view.study.directions.values())
        name = view.study.name
        study = optuna.create_study(study_name=name, storage=storage, directions=directions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(view.study.directions))
        for evaluation in view.evaluations:
            add(store, evaluation, view.architectures[evaluation.trial], study)
    storage.engine.dispose()
    store.engine.dispose()
    return store


def add(
    store: Store, evaluation: Evaluation, architecture: Plain, study: optuna.Study | None = None
) -> None:
    """Put one more trial into the store and into Optuna's study."""
    name, trial = evaluation.study, evaluation.trial
    store.add_candidate(name, trial, evaluation.fingerprint, architecture, evaluation.cost)
    store.start_attempt(name, trial)
    store.record(evaluation)
    values = [evaluation.values.get(n, SPLENDID) for n in store.study(name).directions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        told = optuna.trial.create_trial(
            state=STATES[evaluation.status],
            values=None if evaluation.status == "failed" else values,
            params={"d_model": architecture["d_model"]},
            distributions={"d_model": optuna.distributions.IntDistribution(32, 512)},
            constraints={"active_params": max(evaluation.violations.values(), default=-1.0)},
        )
    (study or study_of(store, name)).add_trial(told)


def study_of(store: Store, name: str) -> optuna.Study:
    """Return the Optuna study."""
    return optuna.load_study(study_name=name, storage=store.optuna_storage())
