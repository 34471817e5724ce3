"""Requirements on a Ray cluster: it is there, has this moenas, is large enough and not busy."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from moenas.errors import InputError
from moenas.failures import clean, error_line
from moenas.space.sections import Search

ANSWER_S = 5.0
"""Seconds in which an address must accept a connection, and then greet as gRPC does."""
JOIN_S = 90.0
"""Seconds in which another process must have joined the cluster, to see that it can be."""
BUSY_S = 8.0
"""Seconds that what a candidate needs may be in use before the cluster is called busy."""
ON_A_GPU = 2
"""Candidates on each GPU if nobody says how many: one builds and saves while the other trains."""
VERSION_S = 60.0
"""Seconds in which a worker must have said its version."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of HTTP/2 begins, with empty settings (RFC 9113, sections 3.4 and 4.1)."""
_SETTINGS = 4
"""Type of the frame that a server begins with, in its fourth byte."""

_JOIN = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("joined")
"""


def probe(address: str) -> None:
    """See whether a Ray cluster can be joined, without joining: Ray would try for many minutes.

    Raises:
        InputError: saying what is wrong with the address.
    """
    if address != "auto":
        _greet(address)
    command = [sys.executable, "-P", "-c", _JOIN, address]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=JOIN_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"no Ray cluster at {address}: it could not be joined within {JOIN_S:.0f} s"
        ) from None
    if "joined" not in done.stdout:
        lines = clean(done.stderr, 4000).strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(
            f"no Ray cluster at {address}: {lines[-1]}; if it asks for a token, set"
            " RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here and on its nodes"
        )


def _greet(address: str) -> None:
    """Connect to an address and see whether it speaks HTTP/2, which gRPC is made of."""
    matched = re.fullmatch(r"(?:ray://)?(?:\[([^\]]+)\]|([^:/\s]+)):(\d{1,5})", address)
    if matched is None or not 0 < int(matched[3]) < 65536:
        raise InputError(
            f"--address {address}: not an address of a Ray cluster; write HOST:PORT, as"
            " `ray start --head` prints it, or auto"
        )
    try:
        with socket.create_connection(
            (matched[1] or matched[2], int(matched[3])), ANSWER_S
        ) as server:
            server.settimeout(ANSWER_S)
            server.sendall(_PREFACE)
            frame = b""
            while len(frame) < 4 and (part := server.recv(4 - len(frame))):
                frame += part
    except TimeoutError:
        raise InputError(
            f"no Ray cluster at {address}: no answer within {ANSWER_S:.0f} s"
        ) from None
    except OSError as error:
        raise InputError(
            f"no Ray cluster at {address}: {error.strerror or error}; `ray start --head` starts"
            " one and prints its address"
        ) from None
    if len(frame) < 4 or frame[3] != _SETTINGS:
        raise InputError(f"no Ray cluster at {address}: something else answers there")


def with_share(ray: Any, search: Search, workers: int | None, *, usable: bool = True) -> Search:
    """Return the search with a number for `gpus`.

    Where it is null, `workers` candidates have equal shares of all GPUs, or ON_A_GPU have each one.
    It is 0 where there is no GPU, or where PyTorch cannot use it (`usable`).
    """
    if search.gpus is not None:
        return search
    nodes = [node for node in _nodes(ray) if node.get("GPU", 0.0) >= 1] if usable else []
    gpus = sum(int(node["GPU"]) for node in nodes)
    if not gpus:
        return replace(search, gpus=0.0)
    together = workers or ON_A_GPU * gpus
    if search.cpus:
        together = min(together, sum(_room(node, replace(search, gpus=0.0)) for node in nodes))
    on_one = max(1, math.ceil(together / gpus))
    return replace(search, gpus=math.floor(1e4 / on_one) / 1e4)  # Ray counts in 1/10000


def fit(ray: Any, search: Search) -> int:
    """Return how many candidates the cluster can work on at a time; at least one.

    Raises:
        InputError: if no node has what a candidate asks for. Ray would wait for ever.
    """
    asked = _asked(search)
    nodes = _nodes(ray)
    if count := sum(_room(node, search) for node in nodes):
        return count
    for name, need in asked.items():
        most = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if need > most:
            raise InputError(
                f"search.{name.lower()}s: a candidate asks for {need:g} {name}, and no node of the"
                f" Ray cluster has more than {most:g}; set search.{name.lower()}s={most:g},"
                " or name another cluster with --address"
            )
    raise InputError(
        f"no node of the Ray cluster has {search.cpus:g} CPU and {asked['GPU']:g} GPU together"
    )


def sharers(ray: Any, search: Search) -> int:
    """Return how many candidates can share the memory of one device: of a GPU, or of a node."""
    if search.gpus:
        return _on_one(search.gpus)
    return max(1, max((_room(node, search) for node in _nodes(ray)), default=1))


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    """Return the resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _asked(search: Search) -> dict[str, float]:
    """Return what a candidate takes of Ray's resources."""
    return {"CPU": search.cpus, "GPU": search.gpus or 0.0}


def _on_one(gpus: float) -> int:
    """Return how many candidates one GPU has room for."""
    return max(1, int(1 / gpus + 1e-9))


def _room(node: Mapping[str, float], search: Search) -> int:
    """Return how many candidates a node can work on at a time; a GPU is not shared with another."""
    return min(_rooms(node, search), default=int(node.get("CPU", 1.0)))


def _rooms(node: Mapping[str, float], search: Search) -> Iterator[int]:
    """Yield how many candidates each resource of a node has room for."""
    if search.cpus:
        yield int(node.get("CPU", 0.0) / search.cpus + 1e-9)
    if search.gpus:
        whole, part = divmod(node.get("GPU", 0.0), 1.0)
        yield int(whole) * _on_one(search.gpus) + int(part / search.gpus + 1e-9)


def require_free(ray: Any, search: Search, where: str) -> None:
    """Refuse a cluster in which others use all that a candidate needs.

    Raises:
        InputError: saying what is in use.
    """
    end = time.monotonic() + BUSY_S
    while (text := in_use(ray, search, where)) is not None:
        if time.monotonic() >= end:
            raise InputError(f"{text}; wait until they are free, or use another cluster")
        time.sleep(0.5)


def in_use(ray: Any, search: Search, where: str) -> str | None:
    """Say that others use all that a candidate needs; None if they do not.

    It is None too if the whole cluster has less than a candidate needs: `fit` says so.
    """
    free, total = ray.available_resources(), ray.cluster_resources()
    for name, need in _asked(search).items():
        if free.get(name, 0.0) < need <= total.get(name, 0.0):
            return (
                f"all {name}s of the Ray cluster {where} are in use: {free.get(name, 0.0):g} of"
                f" {total[name]:g} are free, and a candidate asks for {need:g}"
            )
    return None


def _version() -> str:
    """Return the version of moenas in a worker; a task of Ray."""
    from moenas import __version__

    return __version__


def require_version(ray: Any) -> None:
    """Refuse a cluster whose nodes cannot import this version of moenas.

    Raises:
        InputError: saying which version its workers have, or that they have none.
    """
    from moenas import __version__

    here = f"install moenas=={__version__} on its nodes"
    # The task asks for no CPU: all of them may be in use.
    task = ray.remote(num_cpus=0, max_retries=0)(_version)
    try:
        versions = ray.get(task.remote(), timeout=VERSION_S)
    except ray.exceptions.GetTimeoutError:
        raise InputError(
            f"the Ray cluster has started no worker process within {VERSION_S:.0f} s; see the logs"
            f" of its nodes{_session(ray)}"
        ) from None
    except Exception as error:
        raise InputError(
            f"the Ray cluster's workers cannot import moenas ({error_line(error)}); {here}"
        ) from error
    if versions != __version__:
        raise InputError(
            f"the Ray cluster's workers have moenas {versions}, and this is {__version__}; {here}"
        )


def _session(ray: Any) -> str:
    """Return ` (FOLDER)` of the session, if it is known."""
    with suppress(Exception):
        return f" ({os.path.join(ray._private.worker._global_node.get_session_dir_path(), 'logs')})"
    return ""
