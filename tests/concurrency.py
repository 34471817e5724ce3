"""Processes that do one thing to one database at the same moment."""

from __future__ import annotations

import multiprocessing

from moenas.errors import StudyBusyError
from moenas.records import Evaluation
from moenas.store import leases, runners, study_events, submissions
from moenas.store.store import Store

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["moenas.store.store", "optuna.storages._rdb.models", "alembic.command", "psycopg"]
CONTEXT.set_forkserver_preload(PRELOAD)


def together(work, url, processes, *arguments):
    """Run `work(url, barrier, index, *arguments)` in processes; return what each returned."""
    barrier, queue = CONTEXT.Barrier(processes), CONTEXT.Queue()
    running = [
        CONTEXT.Process(target=_run, args=(queue, work, url, barrier, index, *arguments))
        for index in range(processes)
    ]
    for process in running:
        process.start()
    outcomes = dict(queue.get(timeout=120) for _ in running)
    for process in running:
        process.join()
    wrong = [result for result in outcomes.values() if isinstance(result, RuntimeError)]
    assert wrong == []
    return [outcomes[index] for index in range(processes)]


def _run(queue, work, url, barrier, index, *arguments):
    try:
        queue.put((index, work(url, barrier, index, *arguments)))
    except Exception as error:
        barrier.abort()
        queue.put((index, RuntimeError(f"{type(error).__name__}: {error}")))


def open_empty(url, barrier, index):
    """Make all tables, ours and Optuna's; return how many studies there are."""
    barrier.wait()
    store = Store.open(url, create=True)
    return len(store.studies()) + len(store.optuna_storage().get_all_studies())


def claim_and_record(url, barrier, index, rounds):
    """Claim study s0, record trial 0 of study x, fix a reference time; then the next round."""
    store, claimed, fixed = Store.open(url), [], []
    for trial in range(rounds):
        barrier.wait()
        try:
            store.claim(f"s{trial}")
            claimed.append(True)
        except StudyBusyError:
            claimed.append(False)
        values = {"val_loss": float(index), "speed": float(trial)}
        barrier.wait()
        store.record(Evaluation("x", trial, 1, "complete", f"f{trial}", values=values))
        fixed.append(store.set_reference_ms("x", f"key{trial}", float(index)))
    return claimed, fixed


def tell(url, barrier, index, trials):
    """Tell the trials of Optuna's study x their values; return those that were accepted."""
    import optuna

    study = optuna.load_study(study_name="x", storage=Store.open(url).optuna_storage())
    accepted = []
    for trial in range(trials):
        barrier.wait()
        try:
            study.tell(trial, [float(index), 0.0])
            accepted.append(trial)
        except (ValueError, RuntimeError):
            pass
    return accepted


def claim_submissions(url, barrier, index):
    """Register as a server, claim studies until none is left, and return their names."""
    store = Store.open(url)
    runner = store.transact(runners.register)
    barrier.wait()
    names, misses = [], 0
    while misses < 3:
        row = store.transact(lambda c: submissions.claim_next(c, runner, leases.clock(c)))
        misses += row is None  # rows that the other one chooses from are skipped
        names += [row.study] if row is not None else []
    return names


def append_events(url, barrier, index, count):
    """Add events to one study, one transaction each."""
    store = Store.open(url)
    barrier.wait()
    for i in range(count):
        store.transact(lambda c, i=i: study_events.append(c, "x", "tick", {"of": [index, i]}))
    return count
