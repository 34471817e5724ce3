"""The gate: every request passes it, and reaches a route only from a known user with the right."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moenas.errors import MoenasError
from moenas.service.problems import Problem, of_error
from moenas.service.sessions import Identity, Sessions, cookie_value
from moenas.service.settings import MAX_BODY, ServerSettings
from moenas.store import access_tokens
from moenas.store.access_tokens import ROLES, Role
from moenas.store.store import Store

PUBLIC = frozenset({"/healthz", "/readyz", "/login"})
"""Paths that need no user."""
ASSETS = "/assets/"
SAFE = ("GET", "HEAD", "OPTIONS")
ADMIN_PATHS = ("/v1/audit",)
FREE_CHANGES = ("/logout", "/v1/login-links")
"""Paths where a viewer may change something: the own session alone."""
BODY_S = 30.0
"""Seconds in which the body of a request must be there."""
FAILURES_PER_S, FAILURES_BURST = 1.0, 20
"""Requests without a valid token that one address may send."""
TRACKED = 10_000
"""Users and addresses whose rates are held."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def required_role(method: str, path: str) -> Role | None:
    """Return who may send a request: None is everybody.

    It follows from the method and the path alone, so that no route can be without a rule.
    """
    if path in PUBLIC or path.startswith(ASSETS):
        return None
    if path.startswith(ADMIN_PATHS):
        return "admin"
    return "viewer" if method in SAFE or path in FREE_CHANGES else "submitter"


@dataclass
class _Bucket:
    """Tokens of a bucket: each request takes one, and they come back with time."""

    left: float
    at: float


class RateLimit:
    """At most `per_s` requests a second over a while and `burst` at once, for each key."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def wait(self, key: str) -> float:
        """Take one; return the seconds until one is there, or 0 if it was taken."""
        now = time.monotonic()
        bucket = self._buckets.setdefault(key, _Bucket(float(self._burst), now))
        self._buckets.move_to_end(key)
        while len(self._buckets) > TRACKED:
            self._buckets.popitem(last=False)
        bucket.left = min(self._burst, bucket.left + (now - bucket.at) * self._per_s)
        bucket.at = now
        if bucket.left < 1:
            return (1 - bucket.left) / self._per_s
        bucket.left -= 1
        return 0.0


class Gate:
    """The ASGI application in front of all others."""

    def __init__(
        self, app: ASGIApp, *, store: Store, settings: ServerSettings, sessions: Sessions
    ) -> None:
        self._app, self._store, self._settings = app, store, settings
        self._sessions = sessions
        self._rate = RateLimit(settings.requests_per_s, settings.burst)
        self._failures = RateLimit(FAILURES_PER_S, FAILURES_BURST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a problem document."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})

        async def secure(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            replay = await self._admitted(scope, receive)
        except Problem as problem:
            response: Response = problem.response(scope["path"])
            if problem.status == 401 and _is_visit(scope):
                response = RedirectResponse("/login", 303)
            return await response(scope, receive, secure)
        await self._app(scope, replay, secure)

    async def _admitted(self, scope: Scope, receive: Receive) -> Receive:
        """Check a request; return what gives its body, which is read and small.

        Raises:
            Problem: if the request is refused.
        """
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_origin(headers)
        role = required_role(scope["method"], scope["path"])
        is_attempt = scope["path"] == "/login" and scope["method"] not in SAFE
        if is_attempt and (wait := self._failures.wait(_address(scope))):
            raise _too_many(wait)
        if role is not None:
            identity, by_cookie = await self._identify(scope, headers)
            if by_cookie and scope["method"] not in SAFE and not self._is_same_origin(headers):
                raise Problem(403, "a change by a browser needs the header Origin of this server")
            if wait := self._rate.wait(identity.key):
                raise _too_many(wait)
            if ROLES.index(identity.role) < ROLES.index(role):
                told = f"the role of '{identity.user_name}' is {identity.role}; {role} is needed"
                raise Problem(403, told, kind="role")
            scope["identity"] = identity
        return _replayed(await _body(headers, receive), receive)

    # --- Host and Origin -------------------------------------------------------------------------

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _hostname(hosts[0]) if len(hosts) == 1 else ""
        if name not in self._settings.hosts:
            raise Problem(421, f"this server does not answer for the host {name[:80]!r}")

    def _check_origin(self, headers: Headers) -> None:
        """Refuse what a page of another site sends; programs send no Origin."""
        if "origin" in headers and not self._is_same_origin(headers):
            raise Problem(403, f"a page of {headers['origin'][:80]!r} may not use this server")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            is_visit = headers.get("sec-fetch-mode") == "navigate"
            if not (is_visit and headers.get("sec-fetch-dest") == "document"):
                raise Problem(403, "a page of another site may not use this server")

    def _is_same_origin(self, headers: Headers) -> bool:
        scheme = "https" if self._settings.behind_proxy else self._settings.scheme
        return headers.get("origin", "").lower() == f"{scheme}://{headers['host'].lower()}"

    # --- users -----------------------------------------------------------------------------------

    async def _identify(self, scope: Scope, headers: Headers) -> tuple[Identity, bool]:
        """Return the user of a request, and whether a cookie names it."""
        given = headers.get("authorization")
        cookie = cookie_value(headers.get("cookie", ""), self._sessions.cookie)
        try:
            identity = await run_in_threadpool(self._known, given, cookie)
        except MoenasError as error:
            raise of_error(error) from error
        if identity is not None:
            return identity, given is None and not self._settings.no_auth
        if wait := self._failures.wait(_address(scope)):
            raise _too_many(wait)
        raise Problem(
            401,
            "send `Authorization: Bearer TOKEN`, or log in at /login; `moenas token create` makes"
            " a token",
            headers={"WWW-Authenticate": 'Bearer realm="moenas"'},
        )

    def _known(self, given: str | None, cookie: str | None) -> Identity | None:
        """Return the user of a token or of a session, or None."""
        if given is not None:
            scheme, _, text = given.partition(" ")
            if scheme.lower() != "bearer":
                return None
            token = self._store.query(lambda c: access_tokens.checked(c, text.strip()))
            return None if token is None else Identity(token.user_name, token.role, token.id)
        if cookie is not None and (session := self._sessions.find(cookie)) is not None:
            return session if self._is_active(session) else None
        return Identity("local", "admin", None) if self._settings.no_auth else None

    def _is_active(self, identity: Identity) -> bool:
        """Whether the token with which a session began is still good."""
        if identity.token_id is None:
            return True
        tokens = self._store.query(access_tokens.listed)
        return any(t.id == identity.token_id and t.state == "active" for t in tokens)


def _address(scope: Scope) -> str:
    """Return the address of the client."""
    return str(scope["client"][0]) if scope.get("client") else ""


def _is_visit(scope: Scope) -> bool:
    """Whether a browser asks for a page."""
    accepted = Headers(scope=scope).get("accept", "")
    return scope["method"] == "GET" and "text/html" in accepted


def _too_many(wait: float) -> Problem:
    seconds = max(1, round(wait + 0.5))
    return Problem(429, f"wait {seconds} s", headers={"Retry-After": str(seconds)})


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


async def _body(headers: Headers, receive: Receive) -> bytes:
    """Read the body of a request; one that is too large or too slow is refused."""
    too_large = Problem(413, f"the body of a request has at most {MAX_BODY:,} bytes")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise too_large
    if length == "0" and "transfer-encoding" not in headers:
        return b""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Problem(400, "the client has gone")
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Problem(408, f"the body was not there after {BODY_S:.0f} s") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a receiver that gives a body that was read already, then later messages."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
