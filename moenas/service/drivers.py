"""Drivers of studies as processes of their own: started, found again, interrupted and read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moenas.passwords import hide
from moenas.processes import kill_descendants, machine, process_start
from moenas.resources import sha256
from moenas.service.driver_process import LOG_VARIABLE
from moenas.service.settings import ServerSettings
from moenas.store.submissions import STUDY_NAME, Submission

CODE_FILE = "exit_code"
LOG_FILE = "driver.log"
TAIL_BYTES, TAIL_LINES = 8192, 12
"""How much of the end of a log is looked at, and how many lines are told."""


@dataclass(frozen=True)
class DriverProcess:
    """A process, which differs from a later one with the same pid."""

    machine: str
    pid: int
    process_start: str
    """When it began, as `processes.process_start` says it."""

    @property
    def is_local(self) -> bool:
        """Whether the process is on this machine and in this process namespace."""
        return self.machine == machine()

    @property
    def is_alive(self) -> bool:
        """Whether the process of this machine lives."""
        return process_start(self.pid) == self.process_start


def process_of(submission: Submission) -> DriverProcess | None:
    """Return the process that drives a study, or None if none was stored."""
    if submission.driver_pid is None or submission.driver_machine is None:
        return None
    return DriverProcess(
        submission.driver_machine, submission.driver_pid, submission.driver_process_start or ""
    )


class Drivers:
    """Starts and ends the drivers of one server on this machine."""

    def __init__(self, settings: ServerSettings, storage_url: str) -> None:
        self._settings, self._storage_url = settings, storage_url
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def folder(self, study: str) -> Path:
        """Return the folder of a study's space file and log, directly below the work folder.

        Earlier versions renamed submitted studies to any text. A name that no folder can have gets
        the folder `_` and a digest; no name of a submission begins with `_`.
        """
        name = study if STUDY_NAME.match(study) else f"_{sha256(study.encode())[:16]}"
        return self._settings.work_dir.absolute() / name

    def start(self, submission: Submission) -> DriverProcess:
        """Start the driver of a study in a session of its own.

        Raises:
            OSError: if its files cannot be written or no process can be made.
        """
        folder = self.folder(submission.study)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CODE_FILE).unlink(missing_ok=True)
        space = folder / f"{folder.name}.yaml"
        space.write_text(submission.space_text, encoding="utf-8")
        words = ["run", "--trials", str(submission.trials)]
        for flag, value in (
            ("--workers", self._settings.workers),
            ("--address", self._settings.address),
        ):
            words += [flag, value] if value is not None else []
        words += ["--", str(space), *submission.overrides]
        # These may hold passwords, and every user of this machine can read a command line.
        environment = {**os.environ, "MOENAS_STORAGE": self._storage_url, "COLUMNS": "200"}
        environment[LOG_VARIABLE] = json.dumps(self._settings.log)
        environment.pop("MOENAS_SERVER", None)  # a driver that submits to a server would not end
        module = [sys.executable, "-m", "moenas.service.driver_process"]
        with open(folder / LOG_FILE, "wb") as log:
            process = subprocess.Popen(
                [*module, str(folder / CODE_FILE), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._children[process.pid] = process
        return DriverProcess(machine(), process.pid, process_start(process.pid) or "")

    def is_alive(self, process: DriverProcess) -> bool:
        """Say whether a driver of this machine lives; a dead child is reaped."""
        child = self._children.get(process.pid)
        if child is not None and child.poll() is not None:
            del self._children[process.pid]
        return process.is_alive

    def interrupt(self, process: DriverProcess) -> None:
        """Ask a driver to end, as Ctrl-C does."""
        with suppress(ProcessLookupError, PermissionError):
            if process.is_alive:
                os.kill(process.pid, signal.SIGINT)

    def kill(self, process: DriverProcess) -> None:
        """End a driver and all that it started."""
        if not process.is_alive:
            return
        kill_descendants(process.pid)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if (child := self._children.pop(process.pid, None)) is not None:
            child.wait()

    def exit_code(self, study: str) -> int | None:
        """Return the exit code that the driver has left, or None if it was killed."""
        try:
            return int((self.folder(study) / CODE_FILE).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def log_tail(self, study: str) -> str:
        """Return the last lines of the driver's stderr, without passwords."""
        try:
            with open(self.folder(study) / LOG_FILE, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        return hide("\n".join(lines[-TAIL_LINES:]))

    def forget(self, study: str) -> None:
        """Delete the files of a study."""
        shutil.rmtree(self.folder(study), ignore_errors=True)
