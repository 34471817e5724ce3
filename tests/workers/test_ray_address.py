"""An address where no cluster can be used is told soon, with the true reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moenas.errors import InputError
from moenas.space.sections import Search
from moenas.workers.ray_address import fit, probe, sharers, with_share


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """A server that gives each caller an answer, or none at all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.recv(1000)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [(None, "no answer within"), (b"HTTP/1.1 400 no\r\n\r\n", "something else answers there")],
)
def test_what_is_no_cluster_is_told_soon(answer: bytes | None, words: str) -> None:
    began = time.monotonic()
    with server(answer) as address, pytest.raises(InputError, match=words):
        probe(address)
    assert time.monotonic() - began < 15


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"[::1]:{port}"):
        with pytest.raises(InputError, match="no Ray cluster at"):
            probe(address)
    with pytest.raises(InputError, match="no Ray cluster at"):
        probe("no-such-host.invalid:6379")


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "host:port", "host:0", "host:99999", "a b:1", ":1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="write HOST:PORT"):
        probe(address)


BUSY = """
import ray
from moenas.errors import InputError
from moenas.workers.pool import open_pool
from moenas.space.sections import Search

@ray.remote(num_cpus=1)
class Holder:
    def there(self):
        return True

if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    holder = Holder.remote()
    ray.get(holder.there.remote())
    try:
        open_pool(1, Search())
    except InputError as error:
        print(error)
    assert ray.is_initialized()
"""


@pytest.mark.slow
def test_a_cluster_without_a_free_cpu_is_told_as_such(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": root, "RAY_TMPDIR": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", BUSY],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.startswith("all CPUs of the Ray cluster"), done.stderr
    assert "0 of 1 are free" in done.stdout


class Nodes:
    """What Ray says of its nodes."""

    def __init__(self, *resources: dict[str, float]) -> None:
        self.resources = resources

    def nodes(self) -> list[dict[str, object]]:
        dead = {"Alive": False, "Resources": {"CPU": 99.0}}
        return [dead, *({"Alive": True, "Resources": resources} for resources in self.resources)]


@pytest.mark.parametrize(
    ("cpus", "gpus", "together", "sharing"),
    [(1, 0, 12, 8), (3, 0, 3, 2), (1, 1, 4, 1), (1, 0.5, 8, 2), (0, 0.3, 12, 3)],
)
def test_candidates_share_the_memory_of_a_node_or_of_a_gpu(
    cpus: float, gpus: float, together: int, sharing: int
) -> None:
    ray = Nodes({"CPU": 8.0, "GPU": 4.0}, {"CPU": 4.0})
    search = Search(cpus=cpus, gpus=gpus)
    assert fit(ray, search) >= sharers(ray, search) == sharing
    assert fit(ray, search) == together


@pytest.mark.parametrize(
    ("workers", "cpus", "share", "together"),
    [
        (None, 1, 0.5, 8),
        (None, 0, 0.5, 8),
        (1, 1, 1.0, 4),
        (4, 1, 1.0, 4),
        (5, 1, 0.5, 8),
        (28, 0, 0.1428, 28),
        (None, 3, 1.0, 2),  # the cores of the node with GPUs are enough for two candidates
    ],
)
def test_without_a_number_all_gpus_are_shared_equally(
    workers: int | None, cpus: float, share: float, together: int
) -> None:
    ray = Nodes({"CPU": 8.0, "GPU": 4.0}, {"CPU": 4.0})
    search = with_share(ray, Search(cpus=cpus), workers)
    assert search.gpus == share
    assert fit(ray, search) == together
    assert with_share(ray, Search(gpus=0.25), workers).gpus == 0.25
    assert with_share(ray, Search(gpus=0.0), workers).gpus == 0.0


def test_without_a_number_and_without_a_gpu_candidates_are_on_the_cpu() -> None:
    assert with_share(Nodes({"CPU": 8.0}), Search(), None).gpus == 0.0
    unusable = Nodes({"CPU": 8.0, "GPU": 4.0})
    assert with_share(unusable, Search(), None, usable=False).gpus == 0.0
