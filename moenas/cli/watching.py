"""Listeners of `moenas run`: the progress, loggers, and a command at the end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moenas.cli import progress
from moenas.cli.study_sources import SERVER_VARIABLE
from moenas.loggers.opening import open_logger
from moenas.passwords import hide
from moenas.study.events import Event, Interrupted, Listener
from moenas.terminal import say

if TYPE_CHECKING:
    from moenas.space.space import Space

LIMIT_S = 600.0
"""Seconds after which the command at the end of a run is stopped."""


@dataclass(frozen=True)
class Watchers:
    """Listeners of a run beside the terminal."""

    log: Sequence[str]
    """Texts of `--log`."""
    on_end: str | None
    """A command of the shell."""

    @contextmanager
    def listeners(self, space: Space, storage: str | None) -> Iterator[list[Listener]]:
        """Yield the listeners of a run; loggers and the command end with the run.

        Raises:
            InputError: if a text of `log` names no logger.
        """
        loggers = [open_logger(text) for text in self.log]
        end = RunEnd(space.name, storage)
        units = {o.name: o.unit for o in space.objectives}
        state, message = "failed", ""
        try:
            with progress.listener(space.name, units) as listen:
                yield [listen, *loggers, end.on_event]
            state, message = "finished", end.message
        except Interrupted as stop:
            state, message = "interrupted", str(stop)
            raise
        except Exception as error:
            message = str(error)
            raise
        finally:
            for logger in loggers:
                if (problem := logger.close()) is not None:
                    say(f"warning: {problem}")
            if self.on_end is not None:
                end.run(self.on_end, state, message)


class RunEnd:
    """Runs a command of the user once, when a run of a study ends."""

    def __init__(self, study: str, storage: str | None) -> None:
        self._study, self._storage = study, storage
        self._last: Event | None = None

    @property
    def message(self) -> str:
        """Text of the last event."""
        return "" if self._last is None else self._last.text

    def on_event(self, event: Event) -> None:
        """Keep the last event of the run."""
        self._last = event

    def run(self, command: str, state: str, message: str) -> None:
        """Run the command, unless the run ended before its first event.

        Its standard output goes to stderr, as stdout holds data. A failure is a warning.
        """
        if self._last is None:
            return
        problem = None
        try:
            code = _run_command(command, self.variables(state, message))
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        else:
            if code:
                problem = f"exit code {code}"
        if problem is not None:
            say(f"warning: the command of --on-end failed: {problem}")

    def variables(self, state: str, message: str) -> dict[str, str]:
        """Return the environment variables of the command."""
        assert self._last is not None
        now = self._last.progress
        counts = {
            "total": now.total,
            "evaluated": now.evaluated,
            "complete": now.complete,
            "failed": now.failed,
            "stopped": now.stopped,
            "infeasible": now.infeasible,
            "front": now.front,
        }
        storage = {} if self._storage is None else {"MOENAS_STORAGE": self._storage}
        return {
            "MOENAS_STUDY": self._study,
            "MOENAS_STATE": state,
            "MOENAS_MESSAGE": hide(message.replace("\0", "")),
            **{f"MOENAS_{name.upper()}": str(number) for name, number in counts.items()},
            **storage,
        }


def _run_command(command: str, variables: dict[str, str]) -> int:
    """Run a command of the user in a session of its own, and return its exit code.

    The study lies in the database of this run, so the command is not sent to a server.

    Raises:
        subprocess.TimeoutExpired: after LIMIT_S seconds; all processes of the session are killed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != SERVER_VARIABLE}
    with subprocess.Popen(
        command,
        shell=True,
        env={**inherited, **variables},
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(LIMIT_S)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
