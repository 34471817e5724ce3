"""The Optuna dashboard inside the server, behind its gate."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from a2wsgi import WSGIMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from moenas.store.store import Store

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PATHS = ("/dashboard", "/api/", "/static/")
"""Beginnings of the paths that the Optuna dashboard answers."""
CHECKED_BY_GATE = ("HTTP_ORIGIN", "HTTP_SEC_FETCH_SITE", "HTTP_AUTHORIZATION", "HTTP_COOKIE")


class Dashboard:
    """The dashboard as a WSGI application that is made at its first request.

    Its own guard answers loopback names alone. The gate has checked Host and Origin before, so the
    guard gets a loopback name; its other refusals stay.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._app: WSGIApplication | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        for key in CHECKED_BY_GATE:
            environ.pop(key, None)
        environ["HTTP_HOST"] = "127.0.0.1"
        return self._made()(environ, start_response)

    def _made(self) -> WSGIApplication:
        with self._lock:
            if self._app is None:
                from moenas.dashboard.server import application

                self._app = application(self._store)
            return self._app


class WithDashboard:
    """Sends requests for the dashboard there, and all others to the API."""

    def __init__(self, api: ASGIApp, store: Store) -> None:
        self._api = api
        dashboard: Any = Dashboard(store)
        self._dashboard: Any = WSGIMiddleware(dashboard)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or take part in the start and the end of the server."""
        if scope["type"] == "http" and scope["path"].startswith(PATHS):
            await self._dashboard(scope, receive, send)
        else:
            await self._api(scope, receive, send)
