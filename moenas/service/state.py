"""The shared state of the routes: store, queue, sessions, events and task processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from moenas.records import Plain
from moenas.service.event_stream import EventHub
from moenas.service.runner import Runner
from moenas.service.sessions import Identity, Sessions
from moenas.service.settings import ServerSettings
from moenas.service.space_rules import SpaceRules
from moenas.service.task_process import TaskProcess
from moenas.store.store import Store

P = ParamSpec("P")
T = TypeVar("T")

KEPT = 32
"""Studies whose figures and reports are kept."""
WAITERS = 32
"""Requests that may wait for the task processes at a time."""


@dataclass(frozen=True)
class ServiceState:
    """Everything of one server."""

    settings: ServerSettings
    store: Store
    runner: Runner
    sessions: Sessions
    hub: EventHub
    checks: TaskProcess
    """Runs checks of spaces, which people wait for."""
    jobs: TaskProcess
    """Runs what takes longer: reports and exports."""
    drawing: TaskProcess
    """Draws figures, which takes a second of computation."""
    drawn: dict[str, tuple[int, Plain]] = field(default_factory=dict)
    """Study -> id of its newest event, and its figures then; of the latest KEPT studies."""
    reports: dict[str, tuple[int, Plain]] = field(default_factory=dict)
    """The same with the reports."""
    waiters: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(WAITERS, "moenas-waiter")
    )
    """Threads that wait for the task processes, so that no read of rows waits behind them."""

    def close(self) -> None:
        """End the task processes, and the threads that wait for them."""
        for process in (self.checks, self.jobs, self.drawing):
            process.close()
        self.waiters.shutdown()

    async def wait(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that waits for a task process, and return its result."""
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.waiters, work)

    @property
    def rules(self) -> SpaceRules:
        """What a submitted space may name."""
        roots = tuple(str(path.absolute()) for path in self.settings.data_roots)
        return SpaceRules(self.settings.allow_code, roots)


def _state(request: Request) -> ServiceState:
    state: ServiceState = request.app.state.service
    return state


def _identity(request: Request) -> Identity:
    identity: Identity = request.scope["identity"]
    return identity


Service = Annotated[ServiceState, Depends(_state)]
User = Annotated[Identity, Depends(_identity)]
