"""Requests to a server: each is sent again until it is answered, and none counts twice."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from moenas.errors import (
    ConflictError,
    InputError,
    MoenasError,
    NotFoundError,
    SourceLocation,
    SpaceError,
    StorageLostError,
)
from moenas.passwords import note, note_address, shown_address

PATIENCE_S = 300.0
"""Seconds for which a client waits for a server that does not answer."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
READ_S = 60.0
"""Seconds without a byte after which a connection is lost; streams have a comment every 15 s."""
PASSING = (429, 502, 503, 504)
"""Statuses after which the same request may succeed."""


class ServerConnection:
    """The connections to one server. A request that is lost on the way is sent again."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        note_address(url)
        note(token or "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=READ_S)
        self.listener: Callable[[str], None] | None = None
        """Gets one line when the server does not answer and is asked again."""

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        source: str | None = None,
        patience_s: float = PATIENCE_S,
        timeout: float = READ_S,
        accepted: tuple[int, ...] = (),
        **more: Any,
    ) -> Any:
        """Send a request until it is answered, and return the JSON of the answer.

        Every request of the API can be repeated without harm. `source` names the space in errors.
        `accepted` are statuses of problem documents that are returned, not raised.

        Raises:
            StorageLostError: if the server does not answer for `patience_s` seconds.
            MoenasError: the error that the server tells.
        """
        waits = Waits(patience_s, self.listener)
        while True:
            try:
                response = self._http.request(method, path, timeout=timeout, **more)
            except httpx.TransportError as error:
                waits.wait(f"{shown_address(self.url)}: {error_text(error)}")
                continue
            if response.status_code in PASSING and waits.is_left:
                reason = f"{shown_address(self.url)}: status {response.status_code}"
                waits.wait(reason, _retry_after(response))
                continue
            if response.is_success or response.status_code in accepted:
                return answer_of(response)
            raise error_of(response, source)

    @contextlib.contextmanager
    def stream(self, path: str, *, timeout: float, **more: Any) -> Iterator[httpx.Response]:
        """Yield an answer whose body is read piece by piece.

        Raises:
            httpx.TransportError: if the connection is lost.
            MoenasError: the error that the server tells.
        """
        with self._http.stream("GET", path, timeout=timeout, **more) as response:
            if not response.is_success:
                response.read()
                raise error_of(response, None)
            yield response


def error_text(error: Exception) -> str:
    """Return what an exception says, or its class if it says nothing."""
    return str(error) or type(error).__name__


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


class Waits:
    """Growing pauses between attempts, for a limited time."""

    def __init__(self, patience_s: float, listener: Callable[[str], None] | None = None) -> None:
        self._patience_s, self._listener = patience_s, listener
        self._end = time.monotonic() + patience_s
        self._next = FIRST_WAIT_S

    @property
    def is_left(self) -> bool:
        """Whether there is time for one more attempt."""
        return time.monotonic() < self._end

    def wait(self, reason: str, least: float = 0.0) -> None:
        """Sleep before the next attempt.

        Raises:
            StorageLostError: if the time is over.
        """
        if not self.is_left:
            raise StorageLostError(reason)
        if self._listener is not None:
            self._listener(f"{reason}; asks again for {self._patience_s:.0f} s")
            self._listener = None
        time.sleep(max(least, self._next * random.uniform(0.5, 1.0)))
        self._next = min(LONGEST_WAIT_S, 2 * self._next)


def answer_of(response: httpx.Response) -> Any:
    """Return the JSON of an answer.

    Raises:
        InputError: if it is no such answer, for example a login page.
    """
    try:
        return response.json()
    except ValueError:
        text = f"{response.url}: no moenas server answers there; check --server or MOENAS_SERVER"
        raise InputError(text) from None


def error_of(response: httpx.Response, source: str | None) -> MoenasError:
    """Return the error that a problem document tells."""
    problem: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError):
        told = response.json()
        problem = told if isinstance(told, dict) else {}
    detail = str(problem.get("detail", f"{response.url}: status {response.status_code}"))
    places = problem.get("errors") or [{}]
    if response.status_code == 422 and places[0].get("line"):
        place = places[0]
        location = SourceLocation(source or place["file"], place["line"], place["column"])
        return SpaceError(place["message"], location=location, path=place["path"])
    kinds: dict[int, type[MoenasError]] = {404: NotFoundError, 409: ConflictError}
    kinds |= dict.fromkeys((400, 401, 403, 413, 421, 422, 428), InputError)
    kinds |= dict.fromkeys(PASSING, StorageLostError)
    return kinds.get(response.status_code, MoenasError)(detail)
