"""Where commands find studies: in a database, or on a server; both give the same plain data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moenas.errors import InputError
from moenas.records import Plain
from moenas.terminal import say

if TYPE_CHECKING:
    from moenas.service.client import Server

SERVER_VARIABLE = "MOENAS_SERVER"
connections = contextlib.ExitStack()
"""The connections to servers, which the end of the command closes."""


class StudySource(Protocol):
    """Studies by their names."""

    def studies(self) -> list[Plain]:
        """Return the rows of `report.summary.listed_studies`."""

    def status(self, study: str) -> Plain:
        """Return `report.summary.status_report`."""

    def front(self, study: str) -> Plain:
        """Return `report.front_report.front_report`."""

    def trial(self, study: str, trial: int) -> Plain:
        """Return `report.summary.trial_report`."""

    def report(self, study: str, *, allow_code: bool) -> Plain:
        """Return `study.insights.insights`."""

    def export(self, study: str, trial: int, out: Path, *, format: str, allow_code: bool) -> Path:
        """Write a trained model into a new folder, and return the folder."""

    def enqueue(self, study: str, references: Sequence[str]) -> list[Plain]:
        """Let a study evaluate architectures next; return a row for each of them."""


class DatabaseStudies:
    """The studies of a database."""

    def __init__(self, storage: str | None) -> None:
        from moenas.store.store import Store

        self._storage, self._store = storage, Store.open(storage)

    def studies(self) -> list[Plain]:
        """Return the rows of all studies."""
        from moenas.report.summary import listed_studies

        return listed_studies(self._store)

    def status(self, study: str) -> Plain:
        """Return how far a study is."""
        from moenas.report.summary import status_report

        return status_report(self._store, study)

    def front(self, study: str) -> Plain:
        """Return the front of a study."""
        from moenas.report.front_report import front_report

        return front_report(self._store, study)

    def trial(self, study: str, trial: int) -> Plain:
        """Return everything that is stored of a trial."""
        from moenas.report.summary import trial_report

        return trial_report(self._store, study, trial)

    def report(self, study: str, *, allow_code: bool) -> Plain:
        """Return what a study shows of its space."""
        from moenas.study.insights import insights
        from moenas.study.launch import load_study

        return insights(load_study(study, self._storage), allow_code=allow_code)

    def export(self, study: str, trial: int, out: Path, *, format: str, allow_code: bool) -> Path:
        """Write a trained model into a new folder, and return the folder."""
        from moenas.export.formats import export

        return export(self._store, study, trial, out, format=format, allow_code=allow_code)

    def enqueue(self, study: str, references: Sequence[str]) -> list[Plain]:
        """Let a study evaluate architectures next; return a row for each of them."""
        from moenas.study import maintenance

        return maintenance.enqueue(study, references, storage=self._storage)


class ServerStudies:
    """The studies of a server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def studies(self) -> list[Plain]:
        """Return the rows of all studies."""
        return self._server.summaries()

    def status(self, study: str) -> Plain:
        """Return how far a study is."""
        return self._server.study(study).status()

    def front(self, study: str) -> Plain:
        """Return the front of a study."""
        return self._server.study(study).front_report()

    def trial(self, study: str, trial: int) -> Plain:
        """Return everything that is stored of a trial."""
        return self._server.study(study).trial(trial)

    def report(self, study: str, *, allow_code: bool) -> Plain:
        """Return what a study shows of its space."""
        _refuse_code(allow_code)
        return self._server.study(study).report()

    def export(self, study: str, trial: int, out: Path, *, format: str, allow_code: bool) -> Path:
        """Write a trained model into a new folder, and return the folder."""
        _refuse_code(allow_code)
        return self._server.study(study).export(trial, out, format=format)

    def enqueue(self, study: str, references: Sequence[str]) -> list[Plain]:
        """Let a study evaluate architectures next; return a row for each of them."""
        return self._server.study(study).enqueue(*references)


def _refuse_code(allow_code: bool) -> None:
    if allow_code:
        raise InputError("--allow-code: `moenas serve --allow-code` decides this for a server")


def open_source(storage: str | None, server: str | None) -> StudySource:
    """Return the studies that a command means.

    Raises:
        InputError: if both options are given, or the database or the server cannot be reached.
    """
    url = server_url(storage, server)
    return DatabaseStudies(storage) if url is None else ServerStudies(open_server(url))


def server_url(storage: str | None, server: str | None) -> str | None:
    """Return the URL of the server that a command means; None if it means a database.

    --storage wins over $MOENAS_SERVER, which wins over $MOENAS_STORAGE.

    Raises:
        InputError: if both options are given.
    """
    if server is not None and storage is not None:
        raise InputError("--server and --storage: give one of them")
    if server is not None or storage is not None:
        return server
    return os.environ.get(SERVER_VARIABLE) or None


def open_server(url: str) -> Server:
    """Connect to a server with the token $MOENAS_TOKEN.

    Raises:
        InputError: if no server answers there, or it refuses the token.
    """
    try:
        from moenas.service.client import connect
    except ImportError as error:
        raise InputError(f"--server needs {error.name}; `pip install 'moenas[service]'`") from None
    server = connect(url)
    server.listener = say
    connections.callback(server.close)
    return server


def require_server(verb: str, server: str | None) -> Server:
    """Connect to the server of a command that changes its queue.

    Raises:
        InputError: if no server is named, none answers there, or it refuses the token.
    """
    url = server_url(None, server)
    if url is None:
        raise InputError(
            f"{verb} changes the queue of a server: give --server URL or $MOENAS_SERVER. Ctrl-C"
            " stops a run of this machine, and `moenas run` resumes it"
        )
    return open_server(url)
