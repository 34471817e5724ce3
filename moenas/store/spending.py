"""The spending of a study over all its runs: wall time, training tokens and training FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, func, insert, select, update

from moenas.records import TRAINING, Evaluation, Plain, training_flops
from moenas.store import front_rows, mapping, row_readers, statements, tables
from moenas.store.counting import is_evaluated
from moenas.store.reader import StoreReader
from moenas.store.retry import RELEASE_S
from moenas.store.store import Store


@dataclass(frozen=True)
class Spending:
    """What a study has spent."""

    wall_seconds: float = 0.0
    """For which its runs worked, up to their last report."""
    train_tokens: float = 0.0
    """Up to the last row of each learning curve, failed candidates included."""
    train_flops: float = 0.0
    """TRAINING times the forward FLOPs of these tokens, prediction heads included."""

    def plain(self) -> Plain:
        """Return the record as a JSON object."""
        return dict(vars(self))

    def __add__(self, other: Spending) -> Spending:
        return Spending(
            self.wall_seconds + other.wall_seconds,
            self.train_tokens + other.train_tokens,
            self.train_flops + other.train_flops,
        )


def of_evaluation(evaluation: Evaluation) -> Spending:
    """Return what the training of one candidate has taken; nothing for a copy or a reuse."""
    if evaluation.is_copy or evaluation.reused_from is not None:
        return Spending()
    tokens = float(max((point.get("tokens") or 0 for point in evaluation.curve), default=0))
    return _training(tokens, evaluation.cost)


def _training(tokens: float, cost: Plain) -> Spending:
    flops = TRAINING * training_flops(cost) * tokens
    return Spending(train_tokens=tokens, train_flops=flops)


def of_pause(tokens: int, cost: Plain) -> Spending:
    """Return what the training of a candidate up to a rung has taken."""
    return _training(float(tokens), cost)


def spending(store: StoreReader, study: str) -> Spending:
    """Return what all runs of a study have spent; paused candidates count up to their rung."""

    def read(connection: Connection) -> Spending:
        return sum(_of_paused(connection, study).values(), start=_recorded(connection, study))

    return store.read(study, read)


def recorded(store: StoreReader, study: str) -> Spending:
    """Return what all runs have spent, without the training of paused candidates."""
    return store.read(study, lambda connection: _recorded(connection, study))


def of_paused(store: StoreReader, study: str) -> dict[int, Spending]:
    """Return trial -> what its training has taken, of candidates that wait at a rung."""
    return store.read(study, lambda connection: _of_paused(connection, study))


def _of_paused(connection: Connection, study: str) -> dict[int, Spending]:
    rung, candidate = tables.rung.c, tables.candidate.c
    if not statements.exists(connection, tables.rung):
        return {}
    this = (candidate.study == rung.study) & (candidate.trial == rung.trial)
    rows = connection.execute(
        select(rung.trial, rung.tokens, candidate.cost)
        .join(tables.candidate, this)
        .where(rung.study == study, rung.checkpoint_sha256.is_not(None))
    )
    # The row of an evaluation clears the checkpoints of its trial, so these have none yet.
    return {r.trial: of_pause(r.tokens, r.cost) for r in rows}


def _recorded(connection: Connection, study: str) -> Spending:
    evaluation, curve, run = tables.evaluation.c, tables.curve.c, tables.run.c
    seconds, reused = 0.0, set[int]()
    # A reader does not change a database of an older schema.
    if statements.exists(connection, tables.run):
        total = select(func.sum(run.seconds)).where(run.study == study)
        seconds = float(connection.scalar(total) or 0.0)
        of_reuse = select(tables.reuse.c.trial).where(tables.reuse.c.study == study)
        reused = set(connection.scalars(of_reuse))
    same = (curve.study == evaluation.study) & (curve.trial == evaluation.trial)
    rows = connection.execute(
        select(
            evaluation.trial,
            evaluation.metrics,
            evaluation.cost,
            func.max(curve.tokens).label("tokens"),
        )
        .join(tables.curve, same)
        .where(evaluation.study == study)
        .group_by(evaluation.study, evaluation.trial)
    )
    trained = (r for r in rows if "copied_from" not in r.metrics and r.trial not in reused)
    spent = (_training(float(r.tokens or 0), r.cost) for r in trained)
    return sum(spent, start=Spending(seconds))


def report_run(store: Store, study: str, began_at: str, seconds: float) -> None:
    """Store for how long a run has worked; it does not wait long for a database that is locked.

    `began_at` names the run. The same report again changes nothing.
    """
    run = tables.run
    this = (run.c.study == study) & (run.c.began_at == began_at)

    def change(connection: Connection) -> None:
        row = {"study": study, "began_at": began_at, "seconds": seconds}
        if connection.scalar(select(run.c.seconds).where(this)) is None:
            connection.execute(insert(run), row)
        else:
            connection.execute(update(run).where(this).values(seconds=seconds))

    store.apply_briefly(study, change, RELEASE_S)


def volumes(store: StoreReader, study: str) -> list[float]:
    """Return the hypervolume after each evaluated candidate, in the order of their records.

    All are measured from the same reference point. They are 0 before a first complete candidate.
    """
    return store.read(study, lambda connection: list(_volumes(connection, study)))


def _volumes(connection: Connection, study: str) -> Iterable[float]:
    after = {point.trial: point.hypervolume for point in front_rows.history(connection, study)}
    row = tables.evaluation.c
    rows = connection.execute(
        select(row.trial, row.status, row.metrics, row.failure)
        .where(row.study == study)
        .order_by(row.recorded_at, row.trial)
    ).all()
    valued = row_readers.trials_with_values(connection, study)
    volume = 0.0
    for r in rows:
        volume = after.get(r.trial, volume)
        failure = mapping.failure_of(r.failure)
        if is_evaluated(r.status, r.metrics, failure, r.trial in valued):
            yield volume


@dataclass(frozen=True)
class Timed:
    """A candidate that was trained, and how long that took."""

    train_flops: float
    train_seconds: float
    total_seconds: float
    """Training, measurements and the rest of the evaluation."""


def timed(store: StoreReader, device: Plain, limit: int = 200) -> list[Timed]:
    """Return the latest candidates of all studies that were trained on a device.

    `device` holds the name, threads and dtype that must be the same.
    """
    return store.query(lambda connection: list(_timed(connection, device, limit)))


def _timed(connection: Connection, device: Plain, limit: int) -> Iterable[Timed]:
    evaluation, curve = tables.evaluation.c, tables.curve.c
    latest = (
        select(evaluation.study, evaluation.trial)
        .where(
            evaluation.status == "complete",
            evaluation.device["name"].as_string() == device["name"],
            evaluation.device["dtype"].as_string() == device["dtype"],
            evaluation.device["threads"].as_integer() == device["threads"],
        )
        .order_by(evaluation.recorded_at.desc())
        .limit(limit)
        .subquery()
    )
    trained = (
        select(latest.c.study, latest.c.trial, func.max(curve.tokens).label("tokens"))
        .join(tables.curve, (curve.study == latest.c.study) & (curve.trial == latest.c.trial))
        .group_by(latest.c.study, latest.c.trial)
        .subquery()
    )
    rows = connection.execute(
        select(evaluation.cost, evaluation.seconds, trained.c.tokens).join(
            trained,
            (trained.c.study == evaluation.study) & (trained.c.trial == evaluation.trial),
        )
    )
    for row in rows:
        flops = _training(float(row.tokens or 0), row.cost).train_flops
        seconds = row.seconds.get("train", 0.0)
        if flops > 0 and seconds > 0:  # a copy has no seconds
            yield Timed(flops, seconds, max(seconds, row.seconds.get("total", 0.0)))
