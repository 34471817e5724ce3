"""The connection of this process to Ray: to its own cluster on the loopback, or to an address."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from moenas import folders
from moenas.errors import InputError, MoenasError, StorageLostError
from moenas.failures import clean, error_line
from moenas.processes import children, kill, kill_descendants, kill_marked, process_start, state
from moenas.space.sections import Search
from moenas.workers.ray_address import (
    in_use,
    probe,
    require_free,
    require_version,
    with_share,
)

PREFIX = "moenas-r"
LONGEST = 39
"""Most bytes of the path of our folder. A socket path has at most 107, and Ray adds 68."""
START_S = 180.0
"""Most seconds for the start of a cluster."""
ASK = 10.0
"""Seconds between two health checks of the cluster."""
SILENT_S = 45.0
"""Seconds without an answer after which the cluster counts as lost."""
STOPPED_S = 15.0
"""Seconds that a process of our cluster can be stopped before the cluster counts as lost."""
SHUTDOWN_S = 5.0
"""Most seconds for closing a connection to a lost cluster."""


class Cluster:
    """The one connection of a process to Ray, shared by the runs in its threads and counted."""

    def __init__(self, ray: Any, address: str | None, head: Head | None, *, ours: bool) -> None:
        self.ray, self.address, self.head, self._ours = ray, address, head, ours
        self.users = 1
        self.available: list[Mapping[str, float]] = []
        """Free resources of the cluster at the latest check."""
        self._lost: str | None = None
        self._answered = time.monotonic()
        self._stopped: dict[int, float] = {}
        """Pid of a stopped process of our cluster -> time of its stop."""
        self._end, self._asking = threading.Event(), threading.Lock()
        threading.Thread(target=self._ask, name="moenas-ray", daemon=True).start()

    def _ask(self) -> None:
        """Check the health of the cluster periodically. A check can block forever."""
        while not self._end.wait(ASK):
            with self._asking, suppress(Exception):
                # A check after the end would make Ray start another cluster.
                if not self._end.is_set():
                    alive = any(node["Alive"] for node in self.ray.nodes())
                if not self._end.is_set():
                    self.available = [self.ray.available_resources()]
                    self._answered = time.monotonic() if alive else self._answered

    def trouble(self) -> str | None:
        """Return why the cluster is lost, or None while it lives."""
        if self._lost is None:
            self._lost = self._trouble()
        return self._lost

    def _trouble(self) -> str | None:
        now = time.monotonic()
        if self.head is not None and (text := self.head.trouble()) is not None:
            return text
        for name, pid in self.head.pids.items() if self.head else ():
            if state(pid) != "T":
                self._stopped.pop(pid, None)
            elif now - self._stopped.setdefault(pid, now) > STOPPED_S:
                return f"its process {name} ({pid}) has been stopped for {STOPPED_S:.0f} s"
        silent = now - self._answered
        return f"it has not answered for {silent:.0f} s" if silent > SILENT_S else None

    def kill_stopped(self, spare: Collection[int | None]) -> bool:
        """Kill the stopped workers of our own cluster, in which no job can begin.

        Returns whether there were any.
        """
        if self.head is None or "raylet" not in self.head.pids:
            return False
        below = children(self.head.pids["raylet"])
        stopped = [pid for pid in below if pid not in spare and state(pid) == "T"]
        for pid in stopped:
            kill(pid)
        return bool(stopped)

    def close(self) -> None:
        """End the connection, and the cluster if it is this process' own."""
        self._end.set()
        if self._asking.acquire(timeout=SHUTDOWN_S):
            self._asking.release()
        if not self._ours:
            return
        if self.trouble() is None:
            self.ray.shutdown()
        else:
            # Ray waits long for a lost cluster, here and at the end of the process.
            shutting = threading.Thread(target=self._shut_down, daemon=True)
            shutting.start()
            shutting.join(SHUTDOWN_S)
            if shutting.is_alive():
                atexit.unregister(self.ray.shutdown)
        if self.head is not None:
            self.head.stop()

    def _shut_down(self) -> None:
        with suppress(Exception):
            self.ray.shutdown()


_lock = threading.Lock()
_shared: Cluster | None = None


def acquire(search: Search, workers: int | None, address: str | None) -> Cluster:
    """Return this process' connection to Ray, made if there is none; give it back by `release`.

    Raises:
        InputError: if the cluster cannot be used, or the process is connected to another one.
        StorageLostError: if the connection that the process has is lost.
        MoenasError: if Ray does not start.
    """
    global _shared
    address = None if address in ("", "local") else address
    cores = _cores()
    if address is None and search.cpus > cores:
        raise InputError(
            f"search.cpus: a candidate asks for {search.cpus:g} cores, and this machine has {cores}"
        )
    with _lock:
        if _shared is None:
            _shared = _connect(search, workers, address)
            return _shared
        if (text := _shared.trouble()) is not None:
            raise StorageLostError(f"the Ray cluster of this process went away: {text}")
        if address not in (None, _shared.address):
            raise InputError(
                f"--address {address}: this process is connected to"
                f" {_shared.address or 'a Ray cluster of its own'} already; a process has one"
                " connection to Ray, so run the other study in a process of its own"
            )
        _shared.users += 1
        return _shared


def release(cluster: Cluster) -> None:
    """Give a connection back; the last user ends it."""
    global _shared
    with _lock:
        cluster.users -= 1
        if cluster.users == 0:
            _shared = None
            cluster.close()


def _connect(search: Search, workers: int | None, address: str | None) -> Cluster:
    """Connect this process to Ray."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        require_version(ray)
        require_free(ray, with_share(ray, search, workers), "this process is connected to")
        return Cluster(ray, None, None, ours=False)
    if address is not None:
        with _ray_environment(_joining()):
            probe(address)
            ray = _init(address)
        cluster = Cluster(ray, address, None, ours=True)
        try:
            require_version(ray)
            text = in_use(ray, with_share(ray, search, workers), f"at {address}")
            if text is not None:
                print(f"moenas: {text}; the candidates wait for their turn", file=sys.stderr)
        except BaseException:
            cluster.close()
            raise
        return cluster
    room = max(1, math.ceil(workers * search.cpus)) if workers else _cores()
    head = Head.start(room)
    try:
        with _ray_environment(head.environment), _loopback():
            ray = _init(head.address)
    except BaseException:
        head.stop()
        raise
    return Cluster(ray, None, head, ours=True)


def _init(address: str) -> Any:
    """Import Ray and connect, and keep the signal handlers."""
    import ray

    # Ray prints dead workers to stdout even with log_to_driver=False, but stdout is for data.
    ray._private.worker._worker_logs_enabled = False
    _forget_token()
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise InputError(
            f"no Ray cluster at {address}: {error_line(error)}; if it asks for a token, set"
            " RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here and on its nodes"
        ) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return ray


def _forget_token() -> None:
    """Make Ray read its settings and token again, because it caches the settings and the token of
    the first cluster."""
    with suppress(ImportError, AttributeError):
        import ray

        raylet: Any = ray._raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _ray_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for Ray, and restore the environment at the end."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def _joining() -> dict[str, str]:
    """Return the variables of a process that joins a cluster.

    By default Ray ends this process a minute after it loses the cluster, without a message.
    """
    return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": "1000000"}


@contextmanager
def _loopback() -> Iterator[None]:
    """Make Ray accept 127.0.0.1 as an address of this machine, as on macOS and Windows."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


# --- a cluster of our own ----------------------------------------------------------------------


class Head:
    """The head process of our own cluster (see `ray_head`)."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process, self._folder = process, folder
        self._process_start = process_start(process.pid)
        self.environment: dict[str, str] = {}
        self.address = ""
        self.session = ""
        self.pids: dict[str, int] = {}

    @classmethod
    def start(cls, cpus: int) -> Head:
        """Start the process and wait for Ray. Clean up after a failure or an interrupt."""
        folders.sweep(PREFIX)
        folder = folders.make(PREFIX, LONGEST)
        try:
            environment = _joining() | _token(folder)
            # With another address Ray would listen on every interface.
            environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            # Workers inherit this environment; they must find this moenas.
            paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
            path = os.pathsep.join(p for p in paths if p)
            inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
            with (folder / "head.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "moenas.workers.ray_head"],
                    env=inherited | environment | {"PYTHONPATH": path},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C in a terminal is for this process alone
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        head = cls(process, folder)
        head.environment = environment
        try:
            head._greet({"folder": str(folder), "cpus": cpus})
        except BaseException:
            head.stop()
            raise
        return head

    def _greet(self, settings: dict[str, Any]) -> None:
        """Send the settings and read the answer of Ray."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        line = _line(process.stdout, START_S)
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            text = clean(" ".join(str(answer["error"]).split()), 500)
            raise MoenasError(f"Ray does not start here: {text}; --workers inline does without it")
        self.address, self.session = answer["address"], answer["session"]
        self.pids = answer["pids"]

    def _last_words(self) -> str:
        """Return the last lines of the log of the process."""
        with suppress(OSError):
            text = (self._folder / "head.log").read_text(encoding="utf-8", errors="replace")
            if text.strip():
                return text[-400:]
        code = self._process.poll()
        return f"no answer in {START_S:.0f} s" if code is None else f"its process ended with {code}"

    def trouble(self) -> str | None:
        """Return which part of the cluster is gone, or None."""
        if self._process.poll() is not None:
            return f"its process moenas.workers.ray_head ({self._process.pid}) died"
        for name, pid in self.pids.items():
            if not state(pid):
                return f"its process {name} ({pid}) died"
        if not Path(self.session, "sockets").is_dir():
            return f"its folder {self.session} was removed"
        return None

    def stop(self) -> None:
        """End the cluster: the process kills its descendants, removes its folder, and ends."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            kill_descendants(process.pid)
            kill(process.pid)
            process.wait()
        kill_marked(str(self._folder))  # processes that are left if the head was killed before
        shutil.rmtree(self._folder, ignore_errors=True)


def _line(pipe: IO[bytes], timeout: float) -> bytes:
    """Read a line from a pipe. It is empty after the timeout or at the end of the pipe."""
    end, received = time.monotonic() + timeout, b""
    while not received.endswith(b"\n") and (left := end - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            break
        part = os.read(pipe.fileno(), 65536)
        if not part:
            break
        received += part
    return received if received.endswith(b"\n") else b""


def _token(folder: Path) -> dict[str, str]:
    """Return the variables of a token: the user's own, or a new one in a file of `folder`."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return {}
    path = folder / "token"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    return {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(path)}


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
