"""A study: launched or taken up again where it stopped, and read."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import optuna

from moenas.errors import InputError, StorageLostError
from moenas.records import StudyRecord
from moenas.search import points, samplers
from moenas.search.start_points import StartPoint, start_points
from moenas.store import attempts
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store
from moenas.study.changes import refuse_changes, version_changes, with_stored_sampler
from moenas.study.driver import Driver
from moenas.study.events import Event, Interrupted, Listener
from moenas.study.jobs import Jobs
from moenas.study.progress import Progress
from moenas.study.publishing import DashboardPublisher
from moenas.study.remeasure import Remeasurer
from moenas.study.replication import Replication
from moenas.study.session import Session
from moenas.study.stored_study import Front, Member, Study, load_study
from moenas.workers.pool import Pool, Workers, open_pool

if TYPE_CHECKING:
    from moenas.data.corpus import Corpus
    from moenas.space.space import Space
    from moenas.study.estimate import Estimate

__all__ = [
    "Event",
    "Front",
    "Interrupted",
    "Listener",
    "Member",
    "Progress",
    "Study",
    "load_study",
    "run",
]

RESEND_S = 0.05
"""Seconds after which a signal is sent again whose exception was swallowed."""


# --- launch or resume --------------------------------------------------------------------------


def run(
    space: Space,
    *,
    storage: str | None = None,
    trials: int | None = None,
    workers: Workers = None,
    address: str | None = None,
    pool: Pool | None = None,
    listeners: Sequence[Listener] = (),
    accept_changes: bool = False,
    fresh: bool = False,
) -> Study:
    """Run a study to its end and return it; called again, it goes on where it stopped.

    `trials` is how many candidates the study is to evaluate in total, failed ones included. Draws
    that are infeasible and models that are evaluated already are recorded and do not count. None
    takes what the space file says, or what an earlier run asked for if that is more. `workers` and
    `address` are those of `open_pool`; a `pool` replaces both, and the caller closes it. Each of
    the `listeners` gets an `Event` for each step of a trial. With `accept_changes`, objectives may
    have other files than before: finished trials are measured again by them, and the change is
    stored. With `fresh` no evaluation of another study is reused.

    Raises:
        InputError: if nothing in the space is feasible, an architecture of `search.start_from` is
            not in the space, or the study of that name has another space or corpus; nothing is
            written.
        StudyBusyError: if another process runs it.
        NoCandidateError: if not one trial is complete at the end.
        EnvironmentFaultError: if the machine fails every candidate, such as by a full disk.
        StudyStoppedError: if several candidates in a row fail for one reason.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    corpus, first = check_start(space, storage)
    known = Store.known(storage, space.name)
    space = with_stored_sampler(space, known)
    changed = [] if known is None else refuse_changes(known, space, corpus, accept_changes)
    sigterm = _Sigterm()
    with _plain_endings(sigterm), sigterm.heeded(), ExitStack() as stack:
        # Only where there is a pool is all that the user wrote known to be right.
        open_once = _PoolOpener(stack, space, workers, address, pool)
        if known is None:
            open_once()
        store = Store.open(storage, create=True)
        if known is None:
            _create(store, space, corpus, trials)
        if changed:
            Remeasurer(store, space, corpus.sha256).run(open_once(), changed)
        lease = stack.enter_context(StudyLease(store, space.name))
        refuse_changes(store.study(space.name), space, corpus)  # accepted by another run meanwhile
        total = _total(store.study(space.name), space, trials)
        session = Session.open(store, space, total, listeners)
        session.trials.enqueue(first)
        replication = Replication(session, Jobs(session.store, space, corpus.sha256))
        if session.over is None or replication.missing():
            _warn_of_versions(session, known)
            _drive(session, replication, open_once, lease, fresh)
        store.verify()
        session.finish()
        return Study(store, space.name)


def dry_run(
    space: Space,
    *,
    storage: str | None = None,
    trials: int | None = None,
    workers: Workers = None,
) -> Estimate:
    """Check all that `run` checks before it writes, and estimate what is left of the study.

    Raises:
        InputError: as `run`.
    """
    from moenas.study.estimate import estimate

    corpus, _ = check_start(space, storage)
    known, done = Store.known(storage, space.name), 0
    space = with_stored_sampler(space, known)
    if known is not None:
        refuse_changes(known, space, corpus)
        done = attempts.evaluated(Store.open(storage), space.name)
    total = (trials or space.search.trials) if known is None else _total(known, space, trials)
    count = 1 if workers == "inline" else workers
    left = max(0, total - done)
    return estimate(space, corpus, storage=storage, trials=left, workers=count)


def check_start(space: Space, storage: str | None) -> tuple[Corpus, list[StartPoint]]:
    """Check what can be checked of a study before anything is written.

    Returns the corpus of the space, and the architectures to start from.

    Raises:
        InputError: as `run`.
    """
    from moenas.evaluate.matching import open_corpus

    samplers.check(space.search.sampler)
    points.check_grid(space)
    space.require_feasible()
    refs, marks = space.search.start_from, space.start_marks
    first = start_points(space, refs, lambda: Store.open(storage), marks)
    return open_corpus(space), first


def _drive(
    session: Session,
    replication: Replication,
    open_once: _PoolOpener,
    lease: StudyLease,
    fresh: bool,
) -> None:
    """Bring a study to its end, then train the replicates of its front.

    The figures of the dashboard are kept up to date meanwhile. Only where the pool is one of this
    machine is the device of its workers known beforehand.
    """
    pool = open_once()
    if open_once.is_local and not fresh:
        session.cache.open(pool.device)
    publisher = DashboardPublisher(session.store.store, session.name, session.events.warn)
    session.events.add(publisher)
    try:
        Driver(session, replication.jobs, pool, lease).run()
        replication.run(pool, lease)
    finally:
        session.budget.report(last=True)
    publisher.publish()


def _warn_of_versions(session: Session, known: StudyRecord | None) -> None:
    """Warn if the study began with other versions than those here."""
    if known is not None and (text := version_changes(known, _versions())):
        session.events.warn(f"the study began with other versions: {text}")


@contextmanager
def _plain_endings(sigterm: _Sigterm) -> Iterator[None]:
    """Keep Optuna quiet, and turn what may end a run from outside into errors of moenas."""
    quiet = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise StorageLostError(f"the database: {error.__cause__ or error}") from error
    except KeyboardInterrupt:
        raise Interrupted(*sigterm.reason) from None
    finally:
        optuna.logging.set_verbosity(quiet)


def _versions() -> dict[str, str]:
    """Return the versions that a study is stored with."""
    from moenas.evaluate.job import versions

    return versions() | {"optuna": optuna.__version__}


def _create(store: Store, space: Space, corpus: Corpus, trials: int | None) -> None:
    """Store a new study; one that another process has just stored is taken as it is.

    Raises:
        InputError: if Optuna's tables hold a study of that name that is not ours.
    """
    if store.holds_optuna_study(space.name) and not store.knows(space.name):
        raise InputError(
            f"study '{space.name}': Optuna's tables in {store.place} hold a study of that name"
            " which moenas did not make; give the space another `name`"
        )
    try:
        store.create_study(_record(space, corpus, trials))
    except InputError:
        known = next((r for r in store.studies() if r.name == space.name), None)
        if known is None:
            raise
        refuse_changes(known, space, corpus)


class _PoolOpener:
    """Gives the pool of a run: the caller's, or one that is opened at the first call."""

    def __init__(
        self,
        stack: ExitStack,
        space: Space,
        workers: Workers,
        address: str | None,
        pool: Pool | None,
    ) -> None:
        self._stack, self._pool = stack, pool
        self.is_local = pool is None and address is None and "RAY_ADDRESS" not in os.environ
        self._open = partial(open_pool, workers, space.search, address=address)

    def __call__(self) -> Pool:
        """Return the pool; one that is opened here is closed with the stack."""
        if self._pool is None:
            self._pool = self._open()
            self._stack.callback(self._pool.close)
        return self._pool


class _Sigterm:
    """Lets SIGTERM and SIGHUP end a run as Ctrl-C does, and loses none of the three."""

    HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.reason = ("Ctrl-C", 130)
        """What ended the run, and the exit code for it."""
        self._number: int | None = None
        """The latest signal."""
        self._hook = sys.unraisablehook

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Heed the signals meanwhile.

        A signal that is ignored, as SIGHUP is under nohup, stays ignored. A caller's own handler of
        SIGINT stays, too.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in self.HEEDED}
        before = {s: handler for s, handler in before.items() if handler != signal.SIG_IGN}
        if before.get(signal.SIGINT) is not signal.default_int_handler:
            before.pop(signal.SIGINT, None)
        for number in before:
            signal.signal(number, self._stop)
        hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._hook = hook
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _stop(self, number: int, frame: object) -> None:
        """Raise what no `except Exception` swallows, and what Ray's waiting lets through."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.reason, self._number = (name, 128 + number), number
        raise KeyboardInterrupt

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Send a signal again whose exception a finalizer or a weak reference has swallowed."""
        if self._number is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            self._hook(lost)
            return
        again = threading.Timer(RESEND_S, os.kill, (os.getpid(), self._number))
        again.daemon = True
        again.start()


def _total(known: StudyRecord, space: Space, trials: int | None) -> int:
    """Return how many trials the study is to have now: a stated number, else the largest so far."""
    return trials or max(known.trials, space.search.trials)


def _record(space: Space, corpus: Corpus, trials: int | None) -> StudyRecord:
    """Write down what a new study is."""
    return StudyRecord(
        name=space.name,
        space_text=space.text,
        overrides=list(space.overrides),
        space=space.plain(),
        space_sha256=space.sha256,
        objectives=[o.info().plain() for o in space.objectives],
        data=corpus.manifest,
        versions=_versions(),
        trials=trials or space.search.trials,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
