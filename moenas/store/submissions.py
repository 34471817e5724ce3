"""Submitted studies: the queue, its states, and changes by users, as rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, Row, delete, func, insert, select, update

from moenas.errors import ConflictError, InputError, NotFoundError, suggestion
from moenas.records import Plain
from moenas.store import audit, reservations, statements, study_events
from moenas.store.tables import evaluation, study, submission

State = Literal["queued", "running", "paused", "finished", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
"""`running` lasts from the choice of a server to the end of the driver. The driver of a study that
is paused or cancelled may still be ending."""
OVER: tuple[State, ...] = ("finished", "failed", "cancelled")
Action = Literal["pause", "resume", "cancel", "extend", "enqueue", "delete"]
TAKEN_IN: dict[Action, tuple[State, ...]] = {
    "pause": ("queued", "running"),
    "resume": ("paused", "failed", "cancelled"),
    "cancel": ("queued", "running", "paused"),
    "extend": STATES,
    "enqueue": STATES,
    "delete": ("queued", "paused", *OVER),
}
"""Action of a user -> the states of a study in which it changes something."""

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
"""Names of submitted studies: they are parts of URLs and names of folders."""


def require_study_name(name: str) -> None:
    """Check the name of a study that is submitted.

    Raises:
        InputError: if it cannot be part of a URL or the name of a folder.
    """
    if not STUDY_NAME.match(name):
        raise InputError(
            f"study name {name[:40]!r}: 1 to 100 letters, digits, '.', '_' or '-', the first one a"
            " letter or a digit; give the space another `name`"
        )


@dataclass(frozen=True)
class Submission:
    """A submitted study."""

    study: str
    user_name: str
    space_text: str
    overrides: list[str]
    trials: int
    priority: int
    state: State
    reason: str | None = None
    restarts: int = 0
    not_before: float = 0.0
    submitted_at: str = ""
    started_at: str | None = None
    ended_at: str | None = None
    runner: str | None = None
    driven_trials: int | None = None
    driver_machine: str | None = None
    driver_pid: int | None = None
    driver_process_start: str | None = None

    @property
    def driver_running(self) -> bool:
        """Whether a server looks after a driver of it, which may be ending."""
        return self.runner is not None

    def allows(self, action: Action) -> bool:
        """Whether the state allows an action; a study is deleted only without a driver."""
        free = action != "delete" or not self.driver_running
        return free and self.state in TAKEN_IN[action]


@dataclass(frozen=True)
class StudyFilter:
    """Which studies a list holds; None is any."""

    state: State | None = None
    user_name: str | None = None
    contains: str | None = None
    """A part of the name, in any case."""


@dataclass(frozen=True)
class ListedStudy:
    """One study of a list: submitted, or run by a command."""

    study: str
    trials: int
    created_at: str
    evaluations: int
    """Finished trials."""
    submission: Submission | None


def now() -> str:
    """Return the time as it is stored."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _record(row: Row[Any] | None) -> Submission | None:
    if row is None:
        return None
    return Submission(**{name: getattr(row, name) for name in Submission.__dataclass_fields__})


def find(connection: Connection, name: str, *, lock: bool = False) -> Submission | None:
    """Return a submitted study, or None; with `lock`, let no other transaction change it."""
    wanted = select(submission).where(submission.c.study == name)
    return _record(connection.execute(wanted.with_for_update() if lock else wanted).first())


def submitted(connection: Connection, name: str) -> Submission | None:
    """Return a submitted study, or None; a database of an older schema has none."""
    return find(connection, name) if statements.exists(connection, submission) else None


def every(connection: Connection) -> list[Submission]:
    """Return all submitted studies, oldest first; a database of an older schema has none."""
    if not statements.exists(connection, submission):
        return []
    wanted = select(submission).order_by(submission.c.submitted_at, submission.c.study)
    records = map(_record, connection.execute(wanted))
    return [row for row in records if row is not None]


def require(connection: Connection, name: str, *, lock: bool = False) -> Submission:
    """Return a submitted study.

    Raises:
        NotFoundError: if there is none of this name.
        ConflictError: if the study was run by a command, so that no server looks after it.
    """
    submitted = find(connection, name, lock=lock)
    if submitted is not None:
        return submitted
    if connection.execute(select(study.c.name).where(study.c.name == name)).first():
        raise ConflictError(
            f"study '{name}' was started by a command, not submitted; only its own command runs it"
        )
    names = list(connection.scalars(select(submission.c.study)))
    raise NotFoundError(f"no study '{name}'.{suggestion(name, names)}")


def submit(
    connection: Connection, new: Submission, *, key: str | None, request_sha256: str
) -> tuple[Submission, bool]:
    """Put a study into the queue; return it, and whether it is new.

    The same request with the same key of the same user gives the study of the first one.

    Raises:
        ConflictError: if the name is taken, or the key was used for another request.
    """
    if key is not None:
        this = (submission.c.user_name == new.user_name) & (submission.c.idempotency_key == key)
        row = connection.execute(select(submission).where(this)).first()
        if row is not None and row.request_sha256 != request_sha256:
            raise ConflictError(
                f"the Idempotency-Key {key!r} was used for study '{row.study}' by another request;"
                " send a new key"
            )
        if (known := _record(row)) is not None:
            return known, False
    _require_free(connection, new.study)
    row_of = {name: getattr(new, name) for name in Submission.__dataclass_fields__}
    row_of |= {"submitted_at": now(), "idempotency_key": key, "request_sha256": request_sha256}
    connection.execute(insert(submission), row_of)
    study_events.forget_deleted(connection, new.study)
    told = {"trials": new.trials, "priority": new.priority, "user": new.user_name}
    _tell(connection, new.user_name, new.study, "submitted", told)
    existing = find(connection, new.study)
    assert existing is not None
    return existing, True


def _require_free(connection: Connection, name: str) -> None:
    """Raise ConflictError if a study of this name is there."""
    submitted = connection.execute(
        select(submission.c.study).where(submission.c.study == name)
    ).first()
    stored = connection.execute(select(study.c.name).where(study.c.name == name)).first()
    if submitted or stored:
        raise ConflictError(f"study '{name}' already exists; give the space another `name`")
    reservations.require_free(connection, name)


def _tell(connection: Connection, user_name: str, name: str, kind: str, data: Plain) -> None:
    """Add the event and the audit row of a change."""
    study_events.append(connection, name, kind, data)
    audit.write(connection, user_name, kind, name, data)


# --- what a user changes -------------------------------------------------------------------------


def pause(connection: Connection, name: str, user_name: str) -> Submission:
    """Let a study stop until it is resumed; its driver finishes its current write and ends.

    Raises:
        ConflictError: if the study is over.
    """
    return _move(connection, name, user_name, "pause", "paused")


def cancel(connection: Connection, name: str, user_name: str) -> Submission:
    """End a study that is not over; its trials stay, and `resume` continues it.

    Raises:
        ConflictError: if the study is finished or failed.
    """
    return _move(connection, name, user_name, "cancel", "cancelled")


def resume(connection: Connection, name: str, user_name: str) -> Submission:
    """Put a paused, failed or cancelled study back into the queue.

    Raises:
        ConflictError: if the study is finished.
    """
    return _move(connection, name, user_name, "resume", "queued")


VERBS = {"paused": "paused", "cancelled": "cancelled", "queued": "resumed"}
"""State -> kind of the event of a user who brings a study there."""


def _move(
    connection: Connection, name: str, user_name: str, action: Action, after: State
) -> Submission:
    """Change the state of a study; one that is in the state already stays as it is."""
    submission = require(connection, name, lock=True)
    there = submission.state == after or (after == "queued" and submission.state == "running")
    if not there and not submission.allows(action):
        raise ConflictError(
            f"study '{name}' is {submission.state}; only one that is"
            f" {' or '.join(TAKEN_IN[action])} can be {VERBS[after]}"
        )
    if not there:
        ended = now() if after == "cancelled" else None
        changes = {"state": after, "reason": None, "ended_at": ended, "not_before": 0.0}
        _set(connection, name, changes | ({"restarts": 0} if after == "queued" else {}))
        _tell(connection, user_name, name, VERBS[after], {})
    return require(connection, name)


def extend(connection: Connection, name: str, user_name: str, trials: int) -> Submission:
    """Raise how many candidates a study evaluates in total; a finished one is queued again.

    Raises:
        ConflictError: if the study has as many already.
    """
    submission = require(connection, name, lock=True)
    if trials == submission.trials:
        return submission
    if trials < submission.trials:
        raise ConflictError(f"study '{name}' has {submission.trials} trials; give a larger number")
    changes: Plain = {"trials": trials}
    if submission.state == "finished":
        changes |= {"state": "queued", "ended_at": None, "restarts": 0, "reason": None}
    _set(connection, name, changes)
    _tell(connection, user_name, name, "extended", {"trials": trials})
    return require(connection, name)


def _set(connection: Connection, name: str, changes: Plain) -> None:
    connection.execute(update(submission).where(submission.c.study == name).values(changes))


def forget(connection: Connection, name: str) -> None:
    """Delete the row of a submitted study."""
    connection.execute(delete(submission).where(submission.c.study == name))


def rename(connection: Connection, name: str, new: str, overrides: list[str]) -> None:
    """Give a submitted study another name; `overrides` are used by its next driver."""
    _set(connection, name, {"study": new, "overrides": overrides})


# --- the queue -----------------------------------------------------------------------------------


def claim_next(connection: Connection, runner: str, clock: float) -> Submission | None:
    """Give a server the study that is to start next, in the state running; None if none waits.

    The order is priority, then how many studies of the user are running, then whose last start is
    longest ago, then the time of submission. Rows that another server is choosing from are skipped.
    """
    ready = (
        (submission.c.state == "queued")
        & submission.c.runner.is_(None)
        & (submission.c.not_before <= clock)
    )
    wanted = select(submission).where(ready).with_for_update(skip_locked=True)
    waiting = [
        submitted for row in connection.execute(wanted) if (submitted := _record(row)) is not None
    ]
    if not waiting:
        return None
    shares = select(
        submission.c.user_name,
        func.sum(submission.c.runner.is_not(None).cast(submission.c.priority.type)),
        func.max(submission.c.started_at),
    ).group_by(submission.c.user_name)
    share = {row[0]: (int(row[1] or 0), row[2] or "") for row in connection.execute(shares)}
    first = min(waiting, key=lambda s: (-s.priority, *share[s.user_name], s.submitted_at, s.study))
    changes: Plain = {"state": "running", "runner": runner, "started_at": now()}
    changes |= {
        "driver_machine": None,
        "driver_pid": None,
        "driver_process_start": None,
        "reason": None,
    }
    _set(connection, first.study, changes | {"driven_trials": first.trials})
    study_events.append(connection, first.study, "started", {"trials": first.trials})
    return find(connection, first.study)


def set_driver(
    connection: Connection, name: str, machine: str, pid: int, process_start: str
) -> None:
    """Store which process drives a study."""
    changes = {"driver_machine": machine, "driver_pid": pid, "driver_process_start": process_start}
    _set(connection, name, changes)


def wanted_end(connection: Connection, name: str) -> State | None:
    """Return `paused` or `cancelled` if the driver of a study is to end; None if it may go on.

    A study without a driver of a server is run by a command, which no state of the queue stops.
    """
    if not statements.exists(connection, submission):
        return None
    this = (submission.c.study == name) & submission.c.runner.is_not(None)
    ending = submission.c.state.in_(("paused", "cancelled"))
    state: State | None = connection.scalar(select(submission.c.state).where(this & ending))
    return state


def held(connection: Connection, runner: str) -> list[Submission]:
    """Return the studies whose drivers a server looks after."""
    wanted = select(submission).where(submission.c.runner == runner).order_by(submission.c.study)
    return [
        submitted for row in connection.execute(wanted) if (submitted := _record(row)) is not None
    ]


def keep_running(connection: Connection, name: str, runner: str) -> None:
    """Bring a study that was resumed before its driver was interrupted back to running."""
    this = (submission.c.study == name) & (submission.c.runner == runner)
    queued = this & (submission.c.state == "queued")
    if connection.execute(update(submission).where(queued).values(state="running")).rowcount:
        study_events.append(connection, name, "started", {})


Decide = Callable[[Submission], Plain]
"""Returns what changes of a running study whose driver has ended: state, reason and the rest."""


def driver_ended(connection: Connection, name: str, runner: str, decide: Decide) -> None:
    """Store that the driver of a study has ended; `decide` is asked only if the study is running.

    Nothing happens if another server has taken over.
    """
    submission = find(connection, name, lock=True)
    if submission is None or submission.runner != runner:
        return
    changes = decide(submission) if submission.state == "running" else {}
    cleared = {
        "runner": None,
        "driver_machine": None,
        "driver_pid": None,
        "driver_process_start": None,
    }
    _set(connection, name, changes | cleared)
    state = changes.get("state")
    if state in OVER:
        _set(connection, name, {"ended_at": now()})
        study_events.append(connection, name, state, {"reason": changes.get("reason")})
    elif state == "queued":
        kind = "restarted" if changes.get("restarts", 0) > submission.restarts else "requeued"
        study_events.append(connection, name, kind, {"reason": changes.get("reason")})
    else:
        study_events.append(connection, name, "driver_ended", {"state": submission.state})


# --- lists ---------------------------------------------------------------------------------------


def page(
    connection: Connection, wanted: StudyFilter, *, after: tuple[str, str] | None, limit: int
) -> list[ListedStudy]:
    """Return studies, newest first, that come after (created_at, name); at most `limit`."""
    submitted = select(
        submission.c.study.label("name"),
        submission.c.submitted_at.label("created"),
        submission.c.trials.label("trials"),
    ).where(*_conditions(wanted, submission.c.study))
    every = submitted
    if wanted.state is None and wanted.user_name is None:
        known = select(submission.c.study)
        own = select(study.c.name, study.c.created_at, study.c.trials).where(
            study.c.name.not_in(known), *_contains(wanted, study.c.name)
        )
        every = submitted.union_all(own)  # type: ignore[assignment]
    rows = every.subquery()
    listed = select(rows).order_by(rows.c.created.desc(), rows.c.name).limit(limit)
    if after is not None:
        created, name = after
        later = (rows.c.created == created) & (rows.c.name > name)
        listed = listed.where((rows.c.created < created) | later)
    listed_rows = connection.execute(listed).all()
    names = [row.name for row in listed_rows]
    count = select(evaluation.c.study, func.count()).group_by(evaluation.c.study)
    counts = {row[0]: int(row[1]) for row in connection.execute(count.where(_among(names)))}
    records = connection.execute(select(submission).where(submission.c.study.in_(names)))
    known_rows: dict[str, Submission | None] = {row.study: _record(row) for row in records}
    return [
        ListedStudy(r.name, r.trials, r.created, counts.get(r.name, 0), known_rows.get(r.name))
        for r in listed_rows
    ]


def _among(names: list[str]) -> ColumnElement[bool]:
    return evaluation.c.study.in_(names)


def _conditions(wanted: StudyFilter, name: ColumnElement[str]) -> list[ColumnElement[bool]]:
    conditions = _contains(wanted, name)
    if wanted.state is not None:
        conditions.append(submission.c.state == wanted.state)
    if wanted.user_name is not None:
        conditions.append(submission.c.user_name == wanted.user_name)
    return conditions


def _contains(wanted: StudyFilter, name: ColumnElement[str]) -> list[ColumnElement[bool]]:
    if wanted.contains is None:
        return []
    return [func.lower(name).contains(wanted.contains.lower(), autoescape=True)]


def counts(connection: Connection) -> dict[State, int]:
    """Return state -> how many submitted studies are in it."""
    wanted = select(submission.c.state, func.count()).group_by(submission.c.state)
    by_state = {row[0]: int(row[1]) for row in connection.execute(wanted)}
    return {state: by_state.get(state, 0) for state in STATES}
