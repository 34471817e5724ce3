"""The application and its server: everything of `moenas serve` put together."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import ssl
import threading
import types
from collections.abc import AsyncIterator, Callable

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

import moenas
from moenas.errors import InputError
from moenas.service import (
    control_routes,
    operation_routes,
    page_routes,
    schemas,
    study_routes,
    tasks,
)
from moenas.service.dashboard_mount import WithDashboard
from moenas.service.event_stream import EventHub
from moenas.service.gate import Gate
from moenas.service.head_requests import HeadRequests
from moenas.service.problems import MEDIA_TYPE, handle_errors
from moenas.service.runner import Runner
from moenas.service.sessions import Identity, Sessions
from moenas.service.settings import ServerSettings
from moenas.service.state import ServiceState
from moenas.service.task_process import TaskLostError, TaskProcess, TaskTimeoutError
from moenas.store import access_tokens
from moenas.store.store import Store

log = logging.getLogger(__name__)

GRACE_S = 3
"""Seconds that open connections have at the end."""
PROBLEMS: dict[int | str, dict[str, object]] = {
    "4XX": {
        "description": "A problem document (RFC 9457).",
        "content": {MEDIA_TYPE: {"schema": schemas.ProblemDetails.model_json_schema()}},
    }
}
ROUTERS = (
    study_routes.router,
    control_routes.router,
    operation_routes.router,
    page_routes.router,
)


def service_state(settings: ServerSettings) -> ServiceState:
    """Open the database of a server and make what its routes share; nothing is started.

    Raises:
        StorageError: if the database cannot be opened.
        InputError: if the settings would let strangers in.
    """
    store = Store.open(settings.storage, create=True)
    tokens = store.query(access_tokens.listed)
    settings.check(sum(token.state == "active" for token in tokens))
    secure = settings.scheme == "https" or settings.behind_proxy
    return ServiceState(
        settings=settings,
        store=store,
        runner=Runner(store, settings),
        sessions=Sessions(settings.port, secure=secure),
        hub=EventHub(store),
        checks=TaskProcess("checks"),
        jobs=TaskProcess("jobs"),
        drawing=TaskProcess("figures"),
    )


def create_api(service: ServiceState) -> FastAPI:
    """Return the application behind the gate: routes, errors and the OpenAPI document."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.hub.start()
        yield
        await service.hub.close()

    app = FastAPI(
        title="moenas",
        version=moenas.__version__,
        description="Neural architecture search over mixture-of-experts language models.",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its page loads scripts from another site
        redoc_url=None,
        lifespan=lifespan,
        responses=PROBLEMS,
        redirect_slashes=False,
    )
    app.state.service = service
    handle_errors(app)
    for router in ROUTERS:
        app.include_router(router)
    return app


def create_app(service: ServiceState) -> ASGIApp:
    """Return the whole application, with the gate in front."""
    api = create_api(service)
    whole = WithDashboard(HeadRequests(api), service.store)
    return Gate(whole, store=service.store, settings=service.settings, sessions=service.sessions)


class _Server(uvicorn.Server):
    """A server that notes which signal ended it."""

    ended_by: int | None = None

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Begin to end, as uvicorn does."""
        self.ended_by = sig
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Heed the signals, and do not send them again at the end, as uvicorn does."""
        heeded = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(settings: ServerSettings) -> socket.socket:
    """Return a listening socket.

    Raises:
        InputError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InputError(
            f"--host {settings.host} --port {settings.port}: {error.strerror}; give another port,"
            " or 0 for a free one"
        ) from None
    return listener


def serve(settings: ServerSettings, say: Callable[[str], None]) -> int:
    """Serve until a signal ends it; return the exit code.

    Ctrl-C interrupts the drivers, and their studies wait for the next start. After SIGTERM they go
    on, and the next server finds them again.

    Raises:
        InputError: if the settings are refused.
    """
    sock = _listen(settings)
    with contextlib.closing(sock):
        port = sock.getsockname()[1]
        settings = ServerSettings(**{**vars(settings), "port": port})
        service = service_state(settings)
        config = uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            ssl_version=ssl.PROTOCOL_TLS_SERVER,
            proxy_headers=settings.behind_proxy,
        )
        server = _Server(config)
        service.runner.start()
        try:
            _greet(service, say)
            threading.Thread(target=warm, args=(service,), daemon=True).start()
            server.run(sockets=[sock])
        finally:
            by_user = server.ended_by != signal.SIGTERM
            service.runner.stop(interrupt_drivers=by_user)
            service.close()
    say("stopped")
    return 128 + (server.ended_by or signal.SIGINT)


def _greet(service: ServiceState, say: Callable[[str], None]) -> None:
    """Say where the server is, and how to log in."""
    settings = service.settings
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{settings.scheme}://{host}:{settings.port}"
    say(f"serving {service.store.place} at {address} (Ctrl-C stops it)")
    if settings.no_auth:
        say("every program of this machine may use it, because of --no-auth")
    elif settings.is_loopback:
        link = service.sessions.new_link(Identity("local", "admin", None), float("inf"))
        say(f"open once in a browser: {address}{link}")
        say("programs send a token: moenas token create NAME --role submitter")
    else:
        say(f"browsers log in with a token at {address}/login")


def warm(service: ServiceState) -> None:
    """Start the process of the checks, so that the first check does not wait."""
    with contextlib.suppress(TaskLostError, TaskTimeoutError):  # the server has ended meanwhile
        service.checks.call(tasks.warm)
