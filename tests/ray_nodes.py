"""A Ray cluster of two nodes on this machine, each a raylet with a CPU of its own, that asks for a token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from moenas.processes import descendants, kill_marked

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class TwoNodes:
    """The head, and a second node that sees nothing of the folder `hidden` and has a cache of its own."""

    def __init__(self, hidden: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))  # short, for sockets
        self.address = f"127.0.0.1:{free_port()}"
        self.hidden = hidden
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def cache(self, node: str) -> Path:
        """The cache folder of a node."""
        return self.folder / f"cache-{node}"

    def start(self, node: str) -> None:
        """Start one of the nodes `one`, the head, and `two`."""
        command = [*RAY, "--node-ip-address=127.0.0.1", f'--resources={{"{node}": 1}}']
        if node == "one":
            port = self.address.rpartition(":")[2]
            command += ["--head", f"--port={port}", "--include-dashboard=false"]
            command += [f"--temp-dir={self.folder}/ray"]
        else:
            command += [f"--address={self.address}"]
            if self.hidden is not None:
                script = f'mount -t tmpfs tmpfs "{self.hidden}" && exec "$@"'
                command = ["unshare", "-m", "bash", "-c", script, "bash", *command]
        own = {**self.environment, "XDG_CACHE_HOME": str(self.cache(node))}
        with (self.folder / f"{node}.log").open("ab") as log:
            self.nodes[node] = subprocess.Popen(
                command,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (self.folder / f"{node}.log").read_text():
            if self.nodes[node].poll() is not None or time.monotonic() > deadline:
                text = (self.folder / f"{node}.log").read_text()
                raise RuntimeError(f"node {node} of Ray did not start:\n{text}")
            time.sleep(0.2)

    def works(self, node: str) -> bool:
        """Whether a process of a node evaluates a candidate now."""
        for pid in descendants(self.nodes[node].pid):
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_work"):
                    return True
            except OSError:
                continue
        return False

    def kill(self, node: str) -> None:
        """Kill all processes of a node at once, as when its machine loses its power."""
        process = self.nodes.pop(node)
        below = descendants(process.pid)
        for pid in (process.pid, *below):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        (self.folder / f"{node}.log").unlink()

    def __enter__(self) -> Self:
        try:
            self.start("one")
            self.start("two")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for node in list(self.nodes):
            self.kill(node)
        kill_marked(str(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)


def can_hide() -> bool:
    """Whether a process of this user may have mounts of its own."""
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True
    )
    return done.returncode == 0
