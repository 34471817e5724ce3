"""Routes about the server itself: health, metrics, devices, audit and logins."""

from __future__ import annotations

import threading
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from moenas.errors import InputError
from moenas.service import schemas, tasks
from moenas.service.page_routes import html
from moenas.service.problems import Problem
from moenas.service.sessions import LINK_S, Identity, cookie_value
from moenas.service.state import Service, User
from moenas.store import access_tokens, audit, study_events, submissions
from moenas.workers.ray_nodes import cluster_nodes

router = APIRouter()


@router.get("/healthz", tags=["operation"])
def get_health() -> schemas.Health:
    """Say that the server lives."""
    return schemas.Health(status="ok")


@router.get("/readyz", tags=["operation"])
def get_readiness(service: Service) -> schemas.Health:
    """Say that the server reaches its database; a problem of status 503 if it does not."""
    service.store.query(submissions.counts)
    return schemas.Health(status="ok")


@router.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
def get_metrics(service: Service) -> Response:
    """Return the state of the queue in Prometheus' text format."""
    registry = CollectorRegistry()
    counts = service.store.query(submissions.counts)
    studies = Gauge(
        "moenas_studies", "Submitted studies by their state.", ["state"], registry=registry
    )
    for state, count in counts.items():
        studies.labels(state).set(count)
    held = service.store.query(lambda c: submissions.held(c, service.runner.id))
    drivers = Gauge("moenas_drivers", "Drivers that this server looks after.", registry=registry)
    drivers.set(len(held))
    limit = Gauge("moenas_drivers_limit", "Drivers that it runs at most.", registry=registry)
    limit.set(service.settings.max_running)
    events = Gauge("moenas_events", "Events of all studies since the first.", registry=registry)
    events.set(sum(service.store.query(study_events.newest).values()))
    threads = Gauge("moenas_threads", "Threads of the server.", registry=registry)
    threads.set(threading.active_count())
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/devices", tags=["operation"])
async def get_devices(service: Service) -> schemas.Devices:
    """Return the devices of the server's machine, and the nodes of its Ray cluster."""
    devices = await service.wait(service.checks.call, tasks.devices)
    address, nodes, error = service.settings.address, [], None
    if address is not None:
        try:
            nodes = await service.wait(cluster_nodes, address)
        except InputError as caught:
            error = str(caught)
    return schemas.Devices(
        devices=[schemas.Device(**row) for row in devices],
        nodes=[schemas.RayNode(**row) for row in nodes],
        nodes_error=error,
    )


@router.get("/v1/audit", tags=["operation"])
def get_audit(
    service: Service,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> schemas.AuditPage:
    """Return who changed what, newest first; for admins."""
    entries = service.store.query(lambda c: audit.entries(c, before=before, limit=limit + 1))
    rows = [
        schemas.AuditRow(
            id=e.id, at=e.at, user=e.user_name, action=e.action, study=e.study, detail=e.detail
        )
        for e in entries[:limit]
    ]
    return schemas.AuditPage(entries=rows, next=rows[-1].id if len(entries) > limit else None)


# --- logins of browsers --------------------------------------------------------------------------


@router.post("/v1/login-links", status_code=201, tags=["operation"])
def create_login_link(service: Service, user: User) -> schemas.LoginLink:
    """Return a path that logs a browser in as the user of the request, once."""
    path = service.sessions.new_link(user)
    return schemas.LoginLink(path=path, expires_in_s=LINK_S)


@router.get("/login", include_in_schema=False)
def log_in_by_link(service: Service, key: str | None = None) -> Response:
    """Trade a one-time link for a cookie; without a link, show a form for a token."""
    if key is None:
        return html("login.html", said="")
    identity = service.sessions.use_link(key)
    if identity is None:
        return html("login.html", status=403, said="This link was used or is too old.")
    return _logged_in(service, identity)


@router.post("/login", include_in_schema=False)
async def log_in_by_token(service: Service, request: Request) -> Response:
    """Trade a token for a cookie."""
    fields = parse_qs((await request.body()).decode("utf-8", "replace"))
    text = fields.get("token", [""])[0].strip()
    token = await run_in_threadpool(service.store.query, lambda c: access_tokens.checked(c, text))
    if token is None:
        return html("login.html", status=403, said="No active token is like this.")
    return _logged_in(service, Identity(token.user_name, token.role, token.id))


def _logged_in(service: Service, identity: Identity) -> Response:
    cookie = service.sessions.set_cookie(identity)
    return RedirectResponse("/", 303, headers={"Set-Cookie": cookie})


@router.post("/logout", include_in_schema=False)
def log_out(service: Service, request: Request) -> Response:
    """End the session of the browser."""
    secret = cookie_value(request.headers.get("cookie", ""), service.sessions.cookie)
    if secret is None:
        raise Problem(400, "no browser is logged in by this request")
    cookie = service.sessions.end(secret)
    return RedirectResponse("/login", 303, headers={"Set-Cookie": cookie})
