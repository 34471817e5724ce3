"""Browsers that are logged in: a one-time link or a token is traded for a cookie."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from moenas.store.access_tokens import Role, digest

SESSION_S = 12 * 3600.0
"""Seconds that a browser stays logged in."""
LINK_S = 600
"""Seconds in which a one-time link must be used, except for the one of the start."""
MOST = 10_000
"""Sessions and links that are held; the oldest go first."""


@dataclass(frozen=True)
class Identity:
    """Who sends a request."""

    user_name: str
    role: Role
    token_id: str | None
    """None for the user of the machine."""

    @property
    def key(self) -> str:
        """What the rate of requests is counted by."""
        return self.token_id or f"local {self.user_name}"


def cookie_value(header: str, name: str) -> str | None:
    """Return the value of a cookie, or None."""
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return None
    return None if morsel is None else morsel.value


class Sessions:
    """The sessions and the one-time links of one server; secrets are held as digests alone."""

    def __init__(self, port: int, *, secure: bool) -> None:
        self.cookie = f"moenas_{port}"  # cookies of one host are shared by all of its ports
        self._secure = secure
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self._links: OrderedDict[str, tuple[Identity, float]] = OrderedDict()

    def new_link(self, identity: Identity, seconds: float = LINK_S) -> str:
        """Return the path of a link that logs a browser in, once."""
        return f"/login?key={self._store(self._links, identity, seconds)}"

    def use_link(self, key: str) -> Identity | None:
        """Return whose link it is and end the link, or None."""
        with self._lock:
            link = self._links.pop(digest(key), None)
        return link[0] if link is not None and link[1] > time.monotonic() else None

    def set_cookie(self, identity: Identity) -> str:
        """Begin a session; return the value of the header Set-Cookie."""
        secret = self._store(self._sessions, identity, SESSION_S)
        return self._cookie(secret, int(SESSION_S))

    def find(self, secret: str) -> Identity | None:
        """Return who has a session, or None."""
        with self._lock:
            session = self._sessions.get(digest(secret))
        return session[0] if session is not None and session[1] > time.monotonic() else None

    def end(self, secret: str) -> str:
        """End a session; return the value of the header Set-Cookie that removes the cookie."""
        with self._lock:
            self._sessions.pop(digest(secret), None)
        return self._cookie("", 0)

    def _store(
        self, held: OrderedDict[str, tuple[Identity, float]], identity: Identity, seconds: float
    ) -> str:
        secret = secrets.token_urlsafe(32)
        with self._lock:
            held[digest(secret)] = (identity, time.monotonic() + seconds)
            while len(held) > MOST:
                held.popitem(last=False)
        return secret

    def _cookie(self, value: str, seconds: int) -> str:
        secure = "; Secure" if self._secure else ""
        rules = f"Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"
        return f"{self.cookie}={value}; {rules}"
