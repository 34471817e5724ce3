"""A study: launched or taken up again where it stopped, and read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from moenas.errors import InputError, NotFoundError, SpaceError
from moenas.grammar import user_parts
from moenas.records import EndReason, Evaluation, Plain, StudyRecord, View
from moenas.report.seed_report import seed_report
from moenas.search import points, samplers
from moenas.search.start_points import StartPoint, start_points
from moenas.store import attempts
from moenas.store.files import check_wanted_root
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store
from moenas.study import repairs
from moenas.study.changes import (
    refuse_changes,
    version_changes,
    with_stored_defaults,
)
from moenas.study.driver import Driver
from moenas.study.ending_signals import EndingSignals, plain_endings
from moenas.study.events import Event, Interrupted, Listener
from moenas.study.front import Front, Member, seed_fields
from moenas.study.jobs import Jobs
from moenas.study.progress import Progress
from moenas.study.publishing import DashboardPublisher
from moenas.study.remeasure import Remeasurer
from moenas.study.replication import Replication, missing_replicates
from moenas.study.session import Session
from moenas.study.training_reference import fix_training_reference
from moenas.workers.pool import Pool, Workers, names_cluster, open_pool

if TYPE_CHECKING:
    import pandas

    from moenas.data.corpus import Corpus
    from moenas.model.architecture import Architecture, Model
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


class Study:
    """One study in a store; everything is read when it is asked for."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name

    def __repr__(self) -> str:
        return f"Study({self.name!r}, {self.store.place!r})"

    def _repr_html_(self) -> str:
        done, total = self.store.count(self.name), self.record.trials
        return f"<h4>{self.name}: {done} of {total} trials</h4>{self.front()._repr_html_()}"

    @property
    def record(self) -> StudyRecord:
        """The settings that were stored when the study began."""
        return self.store.study(self.name)

    @property
    def changes(self) -> list[Plain]:
        """Changes that were accepted after the start, in order: {changed_at, what, before,
        after}."""
        return self.store.read(self.name, lambda c: repairs.changes(c, self.name))

    @property
    def view(self) -> View:
        """Everything of the study at once."""
        return self.store.view(self.name)

    @property
    def finished(self) -> EndReason | None:
        """Why the study is over; None if it is not.

        `trials`: all are evaluated; `exhausted`: every point of a finite space was drawn;
        `sampler`: the sampler stopped it; `draws`: too many draws in a row gave no new candidate;
        `wall_time`, `train_flops`, `train_tokens` and `plateau`: that rule of `search.stop`.
        """
        ended = self.store.ended(self.name)
        if ended is None and attempts.evaluated(self.store, self.name) >= self.record.trials:
            return "trials"  # it ended under a version that did not store the reason
        return ended

    @property
    def optuna(self) -> optuna.Study:
        """The Optuna study behind it."""
        return optuna.load_study(study_name=self.name, storage=self.store.optuna_storage())

    def evaluation(self, trial: int) -> Evaluation:
        """Return the evaluation of a trial.

        Raises:
            NotFoundError: if the trial does not exist or is not finished.
        """
        evaluation = self.store.evaluation(self.name, trial)
        if evaluation is None:
            raise NotFoundError(f"study '{self.name}' has no finished trial {trial}")
        return evaluation

    def architecture(self, trial: int, *, allow_code: bool = False) -> Architecture:
        """Return the architecture of a trial.

        With `allow_code` the Python files that the database holds for the study are run.

        Raises:
            InputError: if the architecture needs such a file, which is neither allowed nor here.
        """
        from moenas.model.architecture import Architecture

        user_parts.load_stored(self.record.space, allow_code=allow_code)
        return Architecture.parse(self.store.architecture(self.name, trial))

    def export(
        self,
        trial: int,
        out: str | os.PathLike[str],
        *,
        format: str = "folder",
        allow_code: bool = False,
    ) -> Path:
        """Write a trained trial into the new folder `out`; see `moenas export`.

        Raises:
            NotFoundError: if there is no such trial, or its weights are gone.
            InputError: if the trial has no trained weights, the format is unknown or cannot hold
                its architecture, or `out` is in use.
        """
        from moenas.export.formats import export

        path = Path(out)
        return export(self.store, self.name, trial, path, format=format, allow_code=allow_code)

    def load_model(self, trial: int, *, allow_code: bool = False) -> Model:
        """Return the trained model of a trial on the CPU in float32, in evaluation mode.

        Raises:
            NotFoundError: if there is no such trial, or its weights are gone.
            InputError: if the trial has no trained weights.
        """
        from moenas.export.trained_trial import trained_trial

        return trained_trial(self.store, self.name, trial, allow_code=allow_code).model()

    def front(self) -> Front:
        """Return the Pareto front."""
        view = self.store.front_view(self.name)
        names = view.study.directions
        report = seed_report(self.store, self.name) or {"members": []}
        replicated = {member["trial"]: member for member in report["members"]}
        members = tuple(
            Member(
                e.trial,
                {name: e.values[name] for name in names},
                view.architectures[e.trial],
                **seed_fields(replicated.get(e.trial)),
            )
            for e in view.members
        )
        return Front(members, names, view.summary.hypervolume, view.study.reference_point)

    def dataframe(self) -> pandas.DataFrame:
        """Return a row for each finished trial: state, values, parameters, cost, failure, seconds.

        Columns of the values are the objectives' names; drawn parameters have the prefix
        `params.`, exact costs `cost.`.
        """
        import pandas

        names = self.record.directions
        drawn = {t.number: t.params for t in self.optuna.get_trials(deepcopy=False)}
        rows = [
            {
                "trial": e.trial,
                "state": e.status,
                **{name: e.values.get(name) for name in names},
                **{f"cost.{name}": value for name, value in e.cost.items()},
                "failure": e.failure.kind if e.failure else None,
                "seconds": e.seconds.get("total"),
                **{f"params.{name}": value for name, value in drawn.get(e.trial, {}).items()},
            }
            for e in self.store.evaluations(self.name)
        ]
        return pandas.DataFrame(rows)


def load_study(name: str, storage: str | None = None) -> Study:
    """Return a stored study.

    Raises:
        NotFoundError: if there is none of that name.
    """
    store = Store.open(storage)
    store.study(name)  # raises NotFoundError
    return Study(store, name)


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
    `address` go to `open_pool`; a `pool` replaces both, and the caller closes it. Each of the
    `listeners` gets an `Event` for each step of a trial. With `accept_changes`, objectives may have
    other files than before: finished trials are measured again by them. Later candidates are
    refused by the newest calibration, not by the first that the study found. Both are stored.
    With `fresh` no evaluation of another study is reused.

    Raises:
        InputError: if a budget names another device, or nothing in the space is feasible. Also if
        an entry of `search.start_from` is not in the space, or the study has another space or
        corpus. Nothing is written. StudyBusyError: if another process runs it. NoCandidateError: if
        not one trial is complete at the end. EnvironmentFaultError: if the machine fails every
        candidate, such as by a full disk. StudyStoppedError: if several candidates in a row fail
        for one reason. Interrupted: on Ctrl-C or SIGTERM.
    """
    elsewhere = pool is not None or names_cluster(address)
    corpus, first = check_start(space, storage, elsewhere=elsewhere)
    known = Store.known(storage, space.name)
    space = with_stored_defaults(space, known)
    changed = [] if known is None else refuse_changes(known, space, corpus, accept_changes)
    signals = EndingSignals()
    with plain_endings(signals), signals.heeded(), ExitStack() as stack:
        # Only where there is a pool is all that the user wrote known to be right.
        open_once = _PoolOpener(stack, space, workers, address, pool)
        if known is None:
            open_once()
        store = Store.open(storage, create=True)
        if known is None:
            _create(store, space, corpus, trials)
        if changed:
            Remeasurer(store, space, corpus, elsewhere=elsewhere).run(open_once(), changed)
        lease = stack.enter_context(StudyLease(store, space.name))
        refuse_changes(store.study(space.name), space, corpus)  # accepted by another run meanwhile
        total = _total(store.study(space.name), space, trials)
        session = Session.open(store, space, total, listeners)
        session.trials.enqueue(first)
        if session.over is None or missing_replicates(session):
            _warn_of_versions(session, known)
            jobs = Jobs(session.store, space, corpus, elsewhere=elsewhere)
            _drive(session, jobs, open_once, lease, fresh=fresh, accept_changes=accept_changes)
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
    """Check all that `run` checks before it writes, and estimate the rest of the study.

    Raises:
        InputError: as `run`.
    """
    from moenas.study.estimate import estimate, expected_replicates

    corpus, _ = check_start(space, storage, elsewhere=names_cluster(None))
    known, done, front, replicated = Store.known(storage, space.name), 0, 0, 0
    space = with_stored_defaults(space, known)
    if known is not None:
        refuse_changes(known, space, corpus)
        store = Store.open(storage)
        done, front = attempts.evaluated(store, space.name), len(store.front(space.name))
        replicated = len(store.replicates(space.name))
    total = (trials or space.search.trials) if known is None else _total(known, space, trials)
    count = 1 if workers == "inline" else workers
    left = max(0, total - done)
    # The front of a search that is over is known; the front of a search that goes on grows.
    expected = expected_replicates(space, total if left else 0, front)
    return estimate(
        space,
        corpus,
        storage=storage,
        trials=left,
        workers=count,
        replicates=max(0, expected - replicated),
    )


def require_named_device(space: Space) -> None:
    """Refuse a budget of seconds on another device than the candidates here had.

    Raises:
        SpaceError: at the budget in the space file.
    """
    if not space.train.has_time_budget:
        return
    from moenas.evaluate import devices, step_time

    try:
        step_time.require_named_device(space.train, devices.of_candidates(space.search.gpus))
    except InputError as error:
        raise SpaceError(str(error), location=space.budget_mark) from None


def check_start(
    space: Space, storage: str | None, *, elsewhere: bool = False
) -> tuple[Corpus, list[StartPoint]]:
    """Check what can be checked of a study before anything is written.

    With `elsewhere` candidates may run on other machines, and each worker checks its own device.
    Returns the corpus of the space, and the architectures to start from.

    Raises:
        InputError: as `run`.
    """
    from moenas.evaluate.matching import open_corpus

    check_wanted_root()
    if not elsewhere:
        require_named_device(space)
    samplers.check(space.search.sampler)
    points.check_grid(space)
    space.require_feasible()
    refs, marks = space.search.start_from, space.start_marks
    first = start_points(space, refs, lambda: Store.open(storage), marks)
    return open_corpus(space), first


def _drive(
    session: Session,
    jobs: Jobs,
    open_once: _PoolOpener,
    lease: StudyLease,
    *,
    fresh: bool,
    accept_changes: bool,
) -> None:
    """Bring a study to its end, then train the replicates of its front.

    The figures of the dashboard are kept up to date meanwhile. Only where the pool is one of this
    machine is the device of its workers known beforehand.
    """
    pool = open_once()
    if open_once.is_local:
        session.latency_bounds.open(pool.device, newest=accept_changes)
        fix_training_reference(session, pool.device)
    if open_once.is_local and not fresh:
        session.cache.open(pool.device)
    publisher = DashboardPublisher(session.store.store, session.name, session.events.warn)
    session.events.add(publisher)
    try:
        Driver(session, jobs, pool, lease).run()
        Replication(session, jobs).run(pool, lease)
    finally:
        session.budget.report(last=True)
        session.uncommitted.close()
    publisher.publish()


def _warn_of_versions(session: Session, known: StudyRecord | None) -> None:
    """Warn if the study began with other versions than those here."""
    if known is not None and (text := version_changes(known, _versions())):
        session.events.warn(f"the study began with other versions: {text}")


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
        self.is_local = pool is None and not names_cluster(address)
        self._open = partial(open_pool, workers, space.search, address=address)

    def __call__(self) -> Pool:
        """Return the pool; one that is opened here is closed with the stack."""
        if self._pool is None:
            self._pool = self._open()
            self._stack.callback(self._pool.close)
        return self._pool


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
