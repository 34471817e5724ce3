"""Routes that check, submit and change studies; each change has an audit row."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from sqlalchemy import Connection

from moenas.records import Plain
from moenas.service import schemas, study_views, tasks
from moenas.service.problems import Problem
from moenas.service.sessions import Identity
from moenas.service.state import Service, ServiceState, User
from moenas.service.study_actions import may_change
from moenas.store import audit, study_events, submissions
from moenas.store.submissions import Submission
from moenas.study.deletion import delete_study

router = APIRouter(prefix="/v1", tags=["control"])


@router.post("/spaces/check", tags=["spaces"])
async def check_space(
    service: Service, user: User, request: schemas.SpaceRequest
) -> schemas.SpaceReport:
    """Check a space: points, costs, random architectures, and what a study would take.

    A space that is not valid is a problem of status 422 with line, column, path and message of
    what is wrong.
    """
    report = await service.wait(
        service.checks.call,
        tasks.check_space,
        request.space,
        tuple(request.overrides),
        service.rules,
        storage=service.store.url,
        draws=request.draws,
    )
    return schemas.SpaceReport(**report)


IdempotencyKey = Annotated[
    str | None,
    Header(max_length=255, pattern=r"^[!-~]+$", description="A repeat with it submits nothing."),
]


@router.post("/studies", status_code=201)
async def submit_study(
    service: Service,
    user: User,
    request: schemas.SubmissionRequest,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> schemas.StudyDetail:
    """Put a study into the queue.

    The same request with the same `Idempotency-Key` returns the study of the first one with
    status 200.
    """
    detail, is_new = await service.wait(_submit, service, user, request, idempotency_key)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/studies/{detail.name}"
    return detail


def _submit(
    service: ServiceState, user: Identity, request: schemas.SubmissionRequest, key: str | None
) -> tuple[schemas.StudyDetail, bool]:
    """Check a study and put it into the queue; return it, and whether it is new."""
    asked = json.dumps(request.model_dump(), sort_keys=True)
    sha256 = hashlib.sha256(asked.encode()).hexdigest()
    checked = service.checks.call(
        tasks.check_submission,
        request.space,
        tuple(request.overrides),
        service.rules,
        storage=service.store.url,
    )
    new = Submission(
        study=checked["name"],
        user_name=user.user_name,
        space_text=request.space,
        overrides=list(request.overrides),
        trials=request.trials or checked["trials"],
        priority=request.priority,
        state="queued",
    )
    own_key = key or uuid.uuid4().hex  # a transaction that is repeated finds its own row
    submission, is_new = service.store.transact(
        lambda c: submissions.submit(c, new, key=own_key, request_sha256=sha256)
    )
    service.runner.wake()
    return study_views.study_detail(service.store, submission.study, user), is_new


# --- studies that were submitted -----------------------------------------------------------------


def _require_own(connection: Connection, name: str, user: Identity) -> Submission:
    """Return a submitted study that a user may change; others' are for admins."""
    submission = submissions.require(connection, name)
    if not may_change(user, submission):
        raise Problem(
            403,
            f"study '{name}' belongs to '{submission.user_name}', who may change it, as an admin"
            f" may",
        )
    return submission


def _change_own(
    service: ServiceState,
    user: Identity,
    name: str,
    change: Callable[[Connection, str, str], Submission],
) -> schemas.StudyDetail:
    """Change a submitted study in one transaction, and return it; the runner looks at once."""

    def checked(connection: Connection) -> None:
        _require_own(connection, name, user)
        change(connection, name, user.user_name)

    service.store.transact(checked)
    service.runner.wake()
    return study_views.study_detail(service.store, name, user)


@router.post("/studies/{name}/pause")
def pause_study(service: Service, user: User, name: str) -> schemas.StudyDetail:
    """Let a study stop until it is resumed; nothing is lost."""
    return _change_own(service, user, name, submissions.pause)


@router.post("/studies/{name}/resume")
def resume_study(service: Service, user: User, name: str) -> schemas.StudyDetail:
    """Put a paused, failed or cancelled study back into the queue."""
    return _change_own(service, user, name, submissions.resume)


@router.post("/studies/{name}/cancel")
def cancel_study(service: Service, user: User, name: str) -> schemas.StudyDetail:
    """End a study; its trials stay."""
    return _change_own(service, user, name, submissions.cancel)


@router.post("/studies/{name}/extend")
def extend_study(
    service: Service, user: User, name: str, request: schemas.Extension
) -> schemas.StudyDetail:
    """Raise how many candidates a study evaluates in total; a finished one is queued again."""
    extend = partial(submissions.extend, trials=request.trials)
    return _change_own(service, user, name, extend)


@router.post("/studies/{name}/enqueue")
async def enqueue_architectures(
    service: Service, user: User, name: str, request: schemas.EnqueueRequest
) -> list[schemas.Enqueued]:
    """Let a study evaluate architectures of your own next, also while it runs."""
    return await service.wait(_enqueue, service, user, name, request)


def _enqueue(
    service: ServiceState, user: Identity, name: str, request: schemas.EnqueueRequest
) -> list[schemas.Enqueued]:
    """Enqueue architectures, and store the event and the audit row."""
    service.store.query(lambda c: _require_own(c, name, user))
    if not study_views.begun(service.store, name):
        raise Problem(409, f"study '{name}' has not begun; enqueue once it runs")
    architectures: list[str | tuple[str, str]] = [
        each if isinstance(each, str) else (each.name, each.text) for each in request.references
    ]
    if request.architecture is not None:
        architectures.append((tasks.ARCHITECTURE_FILE, request.architecture))
    if not architectures:
        raise Problem(422, "give `references`, or an `architecture`")
    rows = service.checks.call(
        tasks.enqueue,
        name,
        tuple(architectures),
        service.rules,
        storage=service.store.url,
    )
    told: Plain = {
        "sources": [row["source"] for row in rows],
        "trials": [row["trial"] for row in rows],
    }

    told["request"] = uuid.uuid4().hex

    def change(connection: Connection) -> None:
        if study_events.append_once(connection, name, "enqueued", told):
            audit.write(connection, user.user_name, "enqueued", name, told)

    service.store.transact(change)
    return [schemas.Enqueued(**row) for row in rows]


@router.delete("/studies/{name}")
def remove_study(
    service: Service,
    user: User,
    name: str,
    confirm: Annotated[str | None, Query(max_length=100)] = None,
) -> schemas.Deleted:
    """Delete a study with its trials and weights.

    Without `confirm`, nothing is deleted: the problem of status 428 has the value of `confirm` in
    its field `confirmation`. It changes when the study does.
    """
    study = study_views.listed(service.store, name)
    if study.submission is not None:
        service.store.query(lambda c: _require_own(c, name, user))
        if not study.submission.allows("delete"):
            raise Problem(409, f"study '{name}' is running; cancel it, and wait for its driver")
    elif not may_change(user, None):
        raise Problem(403, f"study '{name}' was started by a command; only an admin may delete it")
    mark = f"{name}|{study.created_at}|{study.evaluations}"
    wanted = hashlib.sha256(mark.encode()).hexdigest()[:16]
    if confirm != wanted:
        raise Problem(
            428,
            f"study '{name}' has {study.evaluations} finished trials; repeat the request with"
            f" ?confirm={wanted} to delete them and their weights",
            confirmation=wanted,
        )
    if study.submission is not None and study.submission.state in ("queued", "paused"):
        _require_unstarted(service, name, user)
    trials = delete_study(service.store, name, user.user_name)
    service.runner.drivers.forget(name)
    return schemas.Deleted(deleted=name, trials=trials)


def _require_unstarted(service: ServiceState, name: str, user: Identity) -> None:
    """Keep a queued or paused study from being started while it is deleted."""
    submission = service.store.transact(lambda c: submissions.cancel(c, name, user.user_name))
    if submission.driver_running:
        raise Problem(409, f"study '{name}' has just started and is cancelled; delete it later")
