"""A server of the service in this process, over a small database, for the tests of its routes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from conftest import LASTING
from sqlalchemy import event
from starlette.testclient import TestClient

from moenas.service import server
from moenas.service.settings import ServerSettings
from moenas.service.state import ServiceState
from moenas.store import access_tokens, runners
from moenas.store.access_tokens import Role
from moenas.store.store import Store

HOST = "http://127.0.0.1:8321"
SMALL = """\
name: small
architecture:
  vocab_size: 256
  d_model: {choice: [32, 64]}
  blocks:
    - repeat: 2
      mixer: {kind: attention, head_dim: 16}
      ffn: {kind: dense, activation: swiglu, d_ff: {int: [64, 128], step: 32}}
objectives: [val_loss, flops_per_token]
data: pydoc
train: {tokens: 2048, context: 32, batch: 4, val_tokens: 1024}
search: {sampler: random, trials: 2}
"""


class Served:
    """A server whose requests do not leave the process; its queue stands still unless ticked."""

    def __init__(self, service: ServiceState, client: TestClient) -> None:
        self.service, self.client = service, client
        self.tokens = {role: self.token(role, role) for role in access_tokens.ROLES}

    def token(self, name: str, role: Role) -> str:
        return self.service.store.transact(lambda c: access_tokens.create(c, name, role, None))

    def send(self, method: str, path: str, who: str | None = "submitter", **more: Any) -> Any:
        """Send a request with the token of a role, or of a text that is a token itself."""
        headers = dict(more.pop("headers", {}))
        if who is not None:
            headers["Authorization"] = f"Bearer {self.tokens.get(who, who)}"
        return self.client.request(method, path, headers=headers, **more)


@contextlib.contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Served]:
    """Make a server on a database in a folder."""
    chosen: dict[str, Any] = {
        "storage": f"sqlite:///{folder}/moenas.db",
        "work_dir": folder / "work",
        "workers": "inline",
        "backoff_s": 0.0,
    }
    service = server.service_state(ServerSettings(**chosen | settings))
    engine = service.store.engine
    engine.dispose()
    own: dict[int, Any] = {}

    def keep(connection: Any, _: Any) -> None:
        own[id(connection)] = LASTING[id(connection)] = connection

    event.listen(engine, "connect", keep)
    service.runner.id = service.store.transact(runners.register)
    client = TestClient(server.create_app(service), HOST, raise_server_exceptions=False)
    client.follow_redirects = False
    try:
        with client:
            yield Served(service, client)
    finally:
        service.runner.stop(interrupt_drivers=True)
        service.close()
        engine.dispose()
        for key in own:
            LASTING.pop(key, None)


@contextlib.contextmanager
def listening(service: ServiceState, port: int = 0) -> Iterator[str]:
    """Let a real server of this process listen; yield its address."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    config = uvicorn.Config(
        server.create_app(service), log_level="error", timeout_graceful_shutdown=1
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def moenas_serve(
    folder: Path, *words: str, port: int = 0
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `moenas serve` in a folder; yield the process and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MOENAS_STORAGE", None)
    environment["MOENAS_SERVER"] = "http://127.0.0.1:9"  # no driver may take it for its server
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "moenas",
            "serve",
            "--port",
            str(port),
            "--workers",
            "inline",
            *words,
        ],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        assert " at http" in first, first + process.stderr.read()
        yield process, first.partition(" at ")[2].split()[0]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=90)
        process.stderr.close()


def token(folder: Path, role: access_tokens.Role = "submitter") -> str:
    store = Store.open(f"sqlite:///{folder}/moenas.db", create=True)
    text = store.transact(lambda c: access_tokens.create(c, "ann", role, None))
    store.engine.dispose()
    return text
