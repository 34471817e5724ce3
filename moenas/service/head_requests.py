"""HEAD requests: the answer to a GET request without its body (RFC 9110, section 9.3.2)."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ONE_TIME = "/login"
"""The path where a GET request uses up a link, which a preview by HEAD must not do."""
EXPORT = "/export"
"""The end of the paths where a GET request starts a job and writes files."""


class HeadRequests:
    """Answers HEAD with the status and the headers that the application gives for GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; the work on a body that HEAD leaves out is cancelled."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or _has_effect(scope["path"]):
            return await self._app(scope, receive, send)
        is_answered = asyncio.Event()

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                is_answered.set()

        work = asyncio.ensure_future(self._app({**scope, "method": "GET"}, receive, send_head))
        answer = asyncio.ensure_future(is_answered.wait())
        try:
            await asyncio.wait({work, answer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answer.cancel()
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


def _has_effect(path: str) -> bool:
    """Whether a GET request of a path does more than read; HEAD has no answer there."""
    return path == ONE_TIME or path.endswith(EXPORT)
