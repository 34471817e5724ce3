"""A stored study by its name: trials enqueued, failed ones run again, objectives measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import optuna

from moenas.errors import InputError, suggestion
from moenas.records import Plain, StudyRecord
from moenas.search.start_points import enqueue as enqueue_points
from moenas.search.start_points import start_points
from moenas.store import attempts
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store
from moenas.study import repairs
from moenas.study.changes import refuse_changes, with_stored_defaults
from moenas.study.events import Listener
from moenas.study.launch import Study, run
from moenas.study.remeasure import Progress, Remeasured, Remeasurer, chosen_objectives
from moenas.study.stop_rules import FINAL
from moenas.study.uncommitted import UncommittedResults
from moenas.workers.pool import Pool, Workers, names_cluster, open_pool

if TYPE_CHECKING:
    from moenas.space.space import Space

SAME_AGAIN = (*FINAL, "parameters", "foreign")
"""Kinds of failure that another try ends with, too; only named ones are tried again."""


def stored_space(record: StudyRecord) -> Space:
    """Return the space of a study from the text and the overrides that are stored.

    Objectives and other files are read from the places that the text names.
    """
    from moenas.space.space import Space

    space = Space.parse(record.space_text, f"{record.name}.yaml", record.overrides)
    return with_stored_defaults(replace(space, name=record.name), record)


def reopen_failed(store: Store, study: str, kinds: Sequence[str] = ()) -> list[int]:
    """Open failed trials again, so that the next run evaluates them; return their numbers.

    Without `kinds`, those whose outcome may be another one: a diverged model diverges again.

    Raises:
        InputError: if no failed trial has a kind of `kinds`.
        StudyBusyError: if a process runs the study.
    """
    with StudyLease(store, study):
        # The lease comes first: another process may have evaluated them again meanwhile.
        UncommittedResults(store.runs, study).commit(store)
        failed = {
            e.trial: e.failure.kind if e.failure else "error"
            for e in store.evaluations(study)
            if e.status == "failed"
        }
        chosen = _chosen(study, failed, kinds)
        if chosen:
            store.apply(study, lambda connection: repairs.reopen(connection, study, chosen))
            store.set_ended(study, None)
    return chosen


def _chosen(study: str, failed: Mapping[int, str], kinds: Sequence[str]) -> list[int]:
    """Return the failed trials to open; `failed` is trial -> kind of failure."""
    there = sorted(set(failed.values()))
    for kind in kinds:
        if kind not in there:
            known = f"its failures are {', '.join(there)}" if there else "it has no failed trial"
            raise InputError(
                f"--failed {kind}: study '{study}' has no such failure."
                f"{suggestion(kind, there)} {known[0].upper()}{known[1:]}."
            )
    return [
        trial
        for trial, kind in failed.items()
        if (kind in kinds if kinds else kind not in SAME_AGAIN)
    ]


def retry(
    name: str,
    *,
    kinds: Sequence[str] = (),
    storage: str | None = None,
    workers: Workers = None,
    address: str | None = None,
    pool: Pool | None = None,
    listeners: Sequence[Listener] = (),
) -> Study:
    """Run failed trials of a stored study again, and the rest of the study; see `launch.run`.

    Raises:
        InputError: if the files that the study names have changed, or no trial is to be retried.
        StudyBusyError: if a process runs the study.
    """
    from moenas.data.loading import load

    store = Store.open(storage)
    record = store.study(name)
    space = stored_space(record)
    refuse_changes(record, space, load(space.data))
    if not reopen_failed(store, name, kinds):
        raise InputError(
            f"study '{name}': no failed trial may end otherwise; --failed KIND names one of the"
            " kinds that `moenas status` lists"
        )
    return run(
        space,
        storage=storage,
        trials=record.trials,
        workers=workers,
        address=address,
        pool=pool,
        listeners=listeners,
    )


def enqueue(
    name: str,
    refs: Sequence[str],
    *,
    storage: str | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Plain]:
    """Let a stored study evaluate some architectures next, also while a process runs it.

    `refs` have the form of `search.start_from`; `names` says what to store for some of them.
    Returns a row for each architecture: source, fingerprint, and the trial that evaluates it or has
    evaluated it.

    Raises:
        InputError: if an architecture cannot be read or is not in the space; nothing is enqueued.
    """
    store = Store.open(storage)
    space = stored_space(store.study(name))
    called = names or {}
    points = [
        replace(point, source=called.get(point.source, point.source))
        for point in start_points(space, refs, lambda: store)
    ]
    study = optuna.load_study(study_name=name, storage=store.optuna_storage())
    known = {p.fingerprint: attempts.trial_of(store, name, p.fingerprint) for p in points}
    new = [point for point in points if known[point.fingerprint] is None]
    numbers, before = enqueue_points(study, new)
    trials = known | {p.fingerprint: number for p, number in zip(new, numbers, strict=True)}
    return [
        {
            "trial": (number := trials[point.fingerprint]),
            "status": "known" if number is not None and number < before else "enqueued",
            "source": point.source,
            "fingerprint": point.fingerprint,
        }
        for point in points
    ]


def remeasure(
    name: str,
    *,
    trial: int | None = None,
    objective: str | None = None,
    storage: str | None = None,
    workers: Workers = None,
    address: str | None = None,
    pool: Pool | None = None,
    progress: Progress | None = None,
) -> Remeasured:
    """Measure objectives of finished trials again, from their stored weights.

    `objective` is a name or a file. The study need not have it: its values are then stored beside
    the others and do not change the front. A `pool` replaces `workers` and `address`, and the
    caller closes it.

    Raises:
        InputError: if there is nothing to measure, or the study's corpus has changed.
        StudyBusyError: if a process runs the study.
    """
    from moenas.data.loading import load

    store = Store.open(storage)
    record = store.study(name)
    space = stored_space(record)
    chosen = chosen_objectives(record, space, objective, trial)
    corpus = load(space.data)
    refuse_changes(record, space, corpus, accept=True)
    elsewhere = pool is not None or names_cluster(address)
    remeasurer = Remeasurer(store, space, corpus, elsewhere=elsewhere)
    if pool is not None:
        return remeasurer.run(pool, chosen, trial, progress)
    with closing(open_pool(workers, space.search, address=address)) as opened:
        return remeasurer.run(opened, chosen, trial, progress)
