"""The scripts of deploy/ do on this machine what they do on a cluster: with one node of Slurm, and with two of Ray."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from ray_nodes import TwoNodes, free_port
from served import SMALL

from moenas import connect
from moenas.processes import kill_marked
from moenas.store.store import Store

pytestmark = pytest.mark.cluster

DEPLOY = Path(__file__).parents[2] / "deploy"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], said: Path) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.3)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables with the commands `ray` and `moenas` of this interpreter, and a folder for Ray."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("ray", "ray.scripts.scripts"), ("moenas", "moenas")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (commands / name).chmod(0o755)
    ray_folder = tempfile.mkdtemp(prefix="mr", dir="/tmp")
    yield {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "RAY_TMPDIR": ray_folder,
        "MOENAS_STORAGE": f"sqlite:///{tmp_path}/moenas.db",
        "MOENAS_RUNS": f"file://{tmp_path}/shared",
    }
    kill_marked(ray_folder)
    shutil.rmtree(ray_folder, ignore_errors=True)


def start(
    command: list[str], folder: Path, environment: dict[str, str], said: Path
) -> subprocess.Popen[bytes]:
    with said.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def test_the_script_of_slurm_runs_a_study_and_resumes_it(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    text = SMALL.replace("d_ff: {int: [64, 128], step: 32}", "d_ff: {int: [64, 2000]}")
    (tmp_path / "s.yaml").write_text(text.replace("trials: 2", "trials: 3"))
    own = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_PORT": str(free_port()),
    }
    said = tmp_path / "said"
    command = ["bash", str(DEPLOY / "slurm.sh"), "s.yaml"]
    script = start(command, tmp_path, environment | own, said)
    url = environment["MOENAS_STORAGE"]

    def evaluated() -> bool:
        return Store.known(url, "small") is not None and Store.open(url).count("small") > 0

    try:
        wait_until(evaluated, script, said)
        script.send_signal(signal.SIGINT)  # as Slurm does before the time limit
        assert script.wait(timeout=120) == 143, said.read_text()
        assert Store.open(url).count("small") < 3
        assert not list(tmp_path.glob(".ray_token*"))
        script = start(command, tmp_path, environment | own | {"RAY_PORT": str(free_port())}, said)
        assert script.wait(timeout=240) == 0, said.read_text()
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
            script.wait()
    assert Store.open(url).count("small") == 3
    assert len(list((tmp_path / "shared").rglob("model.safetensors"))) == 3


def test_the_script_of_the_server_joins_the_cluster_and_serves(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    port, said = free_port(), tmp_path / "said"
    token = subprocess.run(
        [sys.executable, "-m", "moenas", "token", "create", "ann", "--role", "admin"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with TwoNodes() as nodes:
        own = nodes.environment | {"RAY_HEAD": nodes.address}
        command = ["bash", str(DEPLOY / "serve.sh"), "--behind-proxy", "--port", str(port)]
        server = start(command, tmp_path, environment | own, said)
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            try:
                return httpx.get(f"{url}/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        try:
            wait_until(is_ready, server, said)
            (tmp_path / "small.yaml").write_text(SMALL)
            with connect(url, token) as client:
                cpus = [node["resources"].get("CPU", 0.0) for node in client.nodes()]
                assert sorted(cpus) == [0.0, 1.0, 1.0]
                study = client.submit(tmp_path / "small.yaml")
                study.wait()
                assert len(study.front()) > 0
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
    assert list((tmp_path / "shared").rglob("model.safetensors"))
