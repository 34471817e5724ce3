"""Errors over HTTP: every one is a problem document (RFC 9457, application/problem+json)."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moenas.errors import (
    ConflictError,
    InputError,
    LocatedError,
    MoenasError,
    NotFoundError,
    SourceLocation,
    StorageError,
    StorageLostError,
    StudyBusyError,
)
from moenas.passwords import hide
from moenas.records import Plain
from moenas.service.task_process import TaskLostError, TaskTimeoutError
from moenas.terminal import to_json

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
STATUSES: tuple[tuple[type[MoenasError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (StudyBusyError, 409),
    (StorageError, 503),
    (StorageLostError, 503),
    (InputError, 422),
    (TaskTimeoutError, 504),
    (TaskLostError, 500),
)
"""Class of an error -> status; the first that fits counts."""


class Problem(Exception):
    """A request that cannot be answered as it was meant."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str = "",
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.more = status, detail, more
        self.kind = kind or HTTPStatus(status).phrase.lower().replace(" ", "-")
        self.headers = headers or {}

    def response(self, path: str) -> Response:
        """Return the problem document of a request for `path`."""
        body: Plain = {
            "type": f"urn:moenas:problem:{self.kind}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": hide(self.detail),
            "instance": path,
            **self.more,
        }
        content = to_json(body, None).encode()
        return Response(content, self.status, self.headers, media_type=MEDIA_TYPE)


def of_error(error: MoenasError) -> Problem:
    """Return the problem of an error of moenas, with line and column where it has a place."""
    status = next((code for cls, code in STATUSES if isinstance(error, cls)), 500)
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__.removesuffix("Error")).lower()
    more: Plain = {}
    if isinstance(error, LocatedError):
        more["errors"] = [located(error)]
    return Problem(status, str(error), kind=name, **more)


def located(error: LocatedError) -> Plain:
    """Return the fields of an error at a place of a space."""
    place = error.location or SourceLocation("")
    return {
        "message": error.message,
        "path": error.path,
        "file": place.source or None,
        "line": place.line or None,
        "column": place.column or None,
    }


def _of_validation(error: RequestValidationError) -> Problem:
    """Return the problem of a request whose body or parameters do not fit their types."""
    errors = [
        {"message": str(each["msg"]), "path": ".".join(map(str, each["loc"]))}
        for each in error.errors()
    ]
    told = "; ".join(f"{each['path']}: {each['message']}" for each in errors)
    return Problem(422, told, kind="request", errors=errors)


def _documented_methods(app: FastAPI, path: str) -> list[str]:
    """Return the methods of a path; the router knows only the methods of its first route."""
    for template, methods in app.openapi()["paths"].items():
        pattern = "[^/]+".join(map(re.escape, re.split(r"\{[^}]*\}", template)))
        if re.fullmatch(pattern, path):
            allowed = {method.upper() for method in methods}
            return sorted(allowed | ({"HEAD"} if "GET" in allowed else set()))
    return []


def handle_errors(app: FastAPI) -> None:
    """Let an application answer with problem documents alone."""

    @app.exception_handler(Problem)
    def of_problem(request: Request, error: Problem) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(MoenasError)
    def of_moenas(request: Request, error: MoenasError) -> Response:
        problem = of_error(error)
        if problem.status == 500:
            log.error("%s %s: %s", request.method, request.url.path, error)
        return problem.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    def of_validation(request: Request, error: RequestValidationError) -> Response:
        return _of_validation(error).response(request.url.path)

    @app.exception_handler(HTTPException)
    def of_http(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        if error.status_code == 405 and (allowed := _documented_methods(app, request.url.path)):
            headers["Allow"] = ", ".join(allowed)
        return Problem(error.status_code, detail, headers=headers).response(request.url.path)

    @app.exception_handler(Exception)
    def of_any(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return Problem(500, "moenas failed; its log has the reason").response(request.url.path)
