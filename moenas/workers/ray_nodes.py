"""The nodes of a Ray cluster, asked for by a process that joins it for a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from moenas.errors import InputError
from moenas.failures import clean
from moenas.records import Plain

ANSWER_S = 60.0
"""Seconds in which the process must have answered."""

_ASK = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
nodes = [
    {
        "id": node["NodeID"],
        "address": node["NodeManagerAddress"],
        "host": node["NodeManagerHostname"],
        "alive": node["Alive"],
        "resources": {
            name: amount
            for name, amount in node["Resources"].items()
            if not name.startswith(("node:", "object_store_memory"))
        },
    }
    for node in ray.nodes()
]
print(json.dumps({"nodes": nodes}))
"""


def cluster_nodes(address: str) -> list[Plain]:
    """Return the nodes that a Ray cluster has and had: id, address, host, alive and resources.

    Ray is imported in another process alone, which takes seconds.

    Raises:
        InputError: if the cluster cannot be asked.
    """
    command = [sys.executable, "-P", "-c", _ASK, address]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"the Ray cluster at {address} did not answer within {ANSWER_S:.0f} s"
        ) from None
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"nodes"')]
    if not answers:
        lines = clean(done.stderr, 4000).strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"the Ray cluster at {address} cannot be asked: {lines[-1]}")
    nodes: list[Plain] = json.loads(answers[-1])["nodes"]
    return sorted(nodes, key=lambda node: (not node["alive"], node["host"], node["id"]))
