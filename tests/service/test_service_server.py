"""The server as a process: a study over HTTP, found again after a kill, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import SMALL, moenas_serve, token

from moenas.store.store import Store

pytestmark = pytest.mark.integration

PATIENCE_S = 120.0
TINY_SPACE = SMALL.replace("[32, 64]", "[16, 32]")


def client(address: str, text: str, **more: Any) -> httpx.Client:
    headers = {"Authorization": f"Bearer {text}"}
    return httpx.Client(base_url=address, headers=headers, timeout=60, **more)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(api: httpx.Client, name: str = "small") -> Any:
    return api.get(f"/v1/studies/{name}").json()["state"]


def test_the_studies_of_a_server_are_logged_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("tensorboard", "mlflow"):
        pytest.importorskip(tool, reason=f"the extra moenas[{tool}] is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    text, password = token(tmp_path), "Tr0ub4dor"
    logs = ["--log", "tensorboard:board", "--log", f"mlflow:http://ann:{password}@127.0.0.1:9"]
    commands: set[str] = set()

    def is_finished() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().replace(b"\0", b" ").decode()
                commands.add(words if "driver_process" in words else "")
        assert state(api) != "failed"
        return bool(state(api) == "finished")

    with moenas_serve(tmp_path, *logs) as (_, address), client(address, text) as api:
        assert api.post("/v1/studies", json={"space": TINY_SPACE}).status_code == 201
        wait(is_finished)
        assert (tmp_path / "board" / "small" / "trial-0").is_dir()
        log = (tmp_path / "moenas_service" / "small" / "driver.log").read_text()
        assert "the logger of MLflow fails" in log
        assert "http://ann:***@127.0.0.1:9" in log
        seen = [api.get(f"/v1/studies/small{part}").text for part in ("", "/events?follow=false")]
    assert any("--workers inline" in words for words in commands)
    assert not any(password in told for told in (*commands, *seen))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or password.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("log", ["tensorbord", "mlflow:"])
def test_a_server_refuses_a_logger_that_cannot_be(tmp_path: Path, log: str) -> None:
    command = [sys.executable, "-m", "moenas", "serve", "--port", "0", "--log", log]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"--log {log}: " in done.stderr


def test_a_driver_survives_its_server_and_is_found_again(tmp_path: Path) -> None:
    text = token(tmp_path)
    # The study takes several times as long as the start of a server, however slow the machine is.
    long = TINY_SPACE.replace("tokens: 2048", "tokens: 300_000")
    with moenas_serve(tmp_path) as (process, address), client(address, text) as api:
        asked = {"space": long}
        assert api.post("/v1/studies", json=asked).status_code == 201
        assert api.post("/v1/studies", json=asked).status_code == 409

        def has_begun() -> bool:
            page = api.get("/v1/studies/small/events?follow=false").text
            return "event: trial_started" in page

        wait(has_begun)
        process.kill()
        process.wait()
    with moenas_serve(tmp_path) as (process, address), client(address, text) as api:
        wait(lambda: api.get("/metrics").text.find("moenas_drivers 1.0") >= 0)
        assert state(api) == "running"
        # The stream follows the study to its end, each event once.
        seen: list[int] = []
        kinds: list[str] = []
        with api.stream("GET", "/v1/studies/small/events", headers={"Last-Event-ID": "2"}) as live:
            for line in live.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    seen.append(event["id"])
                    kinds.append(event["kind"])
                    if event["kind"] in ("finished", "failed"):
                        break
        assert seen == list(range(3, 3 + len(seen)))
        assert kinds[-1] == "finished"
        assert "started" not in kinds
        assert "restarted" not in kinds
        front = api.get("/v1/studies/small/front").json()
        assert len(front["members"]) >= 1
        path = f"/v1/studies/small/trials/{front['members'][0]['trial']}/export"
        exported = api.get(path)
        assert exported.status_code == 200
        assert exported.content[:2] == b"PK"
        traced = api.get(path, params={"format": "torch_export"})
        assert traced.status_code == 200, traced.text
        with zipfile.ZipFile(io.BytesIO(traced.content)) as archive:
            names = {Path(name).name for name in archive.namelist()}
        assert names == {"README.md", "model.pt2", "moenas.json"}
        assert api.get(path, params={"format": "gguf"}).status_code == 422
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143


def test_ctrl_c_interrupts_the_drivers_and_keeps_their_place(tmp_path: Path) -> None:
    text = token(tmp_path)
    long = TINY_SPACE.replace("tokens: 2048", "tokens: 4_000_000")
    with moenas_serve(tmp_path) as (process, address), client(address, text) as api:
        api.post("/v1/studies", json={"space": long})
        wait(lambda: state(api) == "running")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 130
    store = Store.open(f"sqlite:///{tmp_path}/moenas.db")
    with store.engine.connect() as connection:
        row = connection.exec_driver_sql("SELECT state, runner FROM moenas_submission").one()
        runners = connection.exec_driver_sql("SELECT count(*) FROM moenas_runner").scalar()
    assert tuple(row) == ("queued", None)
    assert runners == 0
    assert store.query(lambda c: None) is None


def test_the_server_speaks_tls(tmp_path: Path) -> None:
    certificate(tmp_path)
    text = token(tmp_path)
    files = ("--tls-cert", "cert.pem", "--tls-key", "key.pem")
    with moenas_serve(tmp_path, *files) as (_, address):
        assert address.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with client(address, text, verify=trusted) as api:
            assert api.get("/healthz").json() == {"status": "ok"}
            assert api.get("/v1/studies").status_code == 200
        with client(address, text) as strict, pytest.raises(httpx.ConnectError):
            strict.get("/healthz")


def certificate(folder: Path) -> None:
    """Write a certificate of 127.0.0.1 that signs itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_a_port_that_is_taken_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    with moenas_serve(tmp_path) as (_, address):
        port = address.rpartition(":")[2]
        other = tmp_path / "other"
        other.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "moenas", "serve", "--port", port],
            cwd=other,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert "give another port" in done.stderr
    assert list(other.iterdir()) == []


PROBE = """
import sys
from pathlib import Path
from served import SMALL, served

with served(Path(sys.argv[1])) as one:
    assert one.send("POST", "/v1/spaces/check", json={"space": SMALL}).status_code == 200
    assert one.send("POST", "/v1/studies", json={"space": SMALL}).status_code == 201
    for path in ("", "/small", "/small/trials", "/small/front", "/small/history", "/small/report"):
        assert one.send("GET", "/v1/studies" + path).status_code == 200, path
    assert one.send("GET", "/v1/devices").json()["devices"][0]["kind"] == "cpu"
    assert one.send("GET", "/metrics").status_code == 200
print(*sorted({"torch", "ray", "scipy"} & set(sys.modules)))
"""


def test_the_process_of_the_api_never_imports_torch(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
