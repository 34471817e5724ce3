"""Our rows of a study against Optuna's: the differences, and the repair of each.

Ours are the truth for every trial that we asked for: they were written first, and measured. Another
program may tell, fail, add, ask or delete trials in Optuna's tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Connection

from moenas.records import Evaluation, Failure
from moenas.search.trials import outcome
from moenas.store import attempts, optuna_rows
from moenas.store.store import Store

Kind = Literal["missing", "untold", "different", "taken", "foreign"]

FOREIGN = Failure("foreign", "another program made and finished this trial in Optuna's tables")


@dataclass(frozen=True)
class Difference:
    """One trial on which the two stores do not agree."""

    trial: int
    kind: Kind
    text: str


def differences(
    stored: Mapping[int, Evaluation],
    asked: set[int],
    trials: Sequence[FrozenTrial],
    names: Sequence[str],
) -> list[Difference]:
    """Compare trial by trial.

    `stored` are our evaluations, `asked` the trials that have an architecture of ours, `names` the
    objectives in order.
    """
    differing = []
    told = {frozen.number: frozen for frozen in trials}
    last = max([*stored, *asked, *told], default=-1)
    for number in range(last + 1):
        ours, theirs = stored.get(number), told.get(number)
        if theirs is None:
            differing.append(Difference(number, "missing", "Optuna's tables lack it"))
        elif ours is None:
            if not theirs.state.is_finished():
                continue  # the next run evaluates it
            if number in asked:
                text = f"Optuna's is {theirs.state.name}, and it was not evaluated"
                differing.append(Difference(number, "taken", text))
            else:
                text = f"{theirs.state.name}, made by another program"
                differing.append(Difference(number, "foreign", text))
        elif not theirs.state.is_finished():
            differing.append(Difference(number, "untold", "evaluated, and not told to Optuna"))
        elif ours.failure is None or ours.failure.kind != "foreign":
            state, values = outcome(ours, names)
            if (theirs.state, theirs.values) != (state, values):
                text = (
                    f"Optuna's is {theirs.state.name} with {theirs.values}, ours"
                    f" {state.name} with {values}"
                )
                differing.append(Difference(number, "different", text))
    return differing


def repair(
    store: Store,
    study: optuna.Study,
    differing: Sequence[Difference],
    stored: Mapping[int, Evaluation],
    names: Sequence[str],
) -> None:
    """Make Optuna's rows agree with ours; `study` must be opened again afterwards.

    A trial that Optuna's tables lack is added with our values and without parameters. A trial of
    ours that another program has finished is opened again. A trial of another program becomes a
    failed row of ours, which does not count. What is untold stays so; see
    `OptunaTrials.tell_stored`.
    """
    name = study.study_name
    # 1. Trials that are gone come back first, in order: Optuna numbers them by itself.
    for difference in differing:
        if difference.kind == "missing":
            ours = stored.get(difference.trial)
            state, values = outcome(ours, names) if ours else (TrialState.FAIL, None)
            study.add_trial(create_trial(state=state, values=values))
            if ours is None:
                _record_foreign(store, name, difference.trial)
    # 2. The rest is a correction of one row of Optuna's, or a row of ours.
    for difference in differing:
        number = difference.trial
        if difference.kind == "different":
            state, values = outcome(stored[number], names)
            correct(store, name, number, state, values)
        elif difference.kind == "taken":
            reopen(store, name, number)
        elif difference.kind == "foreign":
            _record_foreign(store, name, number)


def correct(
    store: Store, name: str, number: int, state: TrialState, values: list[float] | None
) -> None:
    """Give Optuna's trial the outcome of ours."""

    def change(connection: Connection) -> None:
        optuna_rows.set_outcome(connection, name, number, state, values)

    store.apply(name, change)


def reopen(store: Store, name: str, number: int) -> None:
    """Let Optuna's trial run again."""
    store.apply(name, lambda connection: optuna_rows.reopen(connection, name, number))


def _record_foreign(store: Store, name: str, number: int) -> None:
    """Record a trial that is not ours, so that both stores hold the same numbers."""
    if not attempts.has_candidate(store, name, number):
        store.add_candidate(name, number, "", {}, {})
    attempt = store.attempts(name, number)
    store.record(Evaluation(name, number, attempt, "failed", "", failure=FOREIGN))
