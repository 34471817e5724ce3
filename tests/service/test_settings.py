"""Where a server refuses to listen, and the commands of its tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moenas.errors import InputError
from moenas.service.settings import ServerSettings


@pytest.mark.parametrize(
    ("more", "tokens", "says"),
    [
        ({"host": "0.0.0.0"}, 0, "moenas token create"),
        ({"host": "0.0.0.0"}, 1, "--tls-cert"),
        ({"host": "0.0.0.0", "no_auth": True}, 1, "remove --no-auth"),
        ({"host": "0.0.0.0", "no_auth": True, "behind_proxy": True}, 1, "remove --no-auth"),
        ({"tls_cert": Path("cert.pem")}, 1, "give both"),
        ({"tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}, 1, "no such file"),
        ({"data_roots": (Path("nowhere"),)}, 1, "no such folder"),
    ],
)
def test_a_server_that_strangers_could_use_is_refused(
    more: dict[str, Any], tokens: int, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        ServerSettings(**more).check(tokens)


@pytest.mark.parametrize(
    ("more", "tokens"),
    [({}, 0), ({"no_auth": True}, 0), ({"host": "0.0.0.0", "behind_proxy": True}, 1)],
)
def test_other_servers_may_listen(more: dict[str, Any], tokens: int) -> None:
    ServerSettings(**more).check(tokens)


def test_hosts_are_names_without_a_port() -> None:
    assert "node7" in ServerSettings(allowed_hosts=("Node7",)).hosts
    assert "0.0.0.0" not in ServerSettings().hosts


def moenas(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moenas", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_tokens_are_made_listed_and_revoked_by_commands(tmp_path: Path) -> None:
    made = moenas(tmp_path, "token", "create", "ann", "--role", "viewer", "--expires", "30d")
    assert made.returncode == 0, made.stderr
    text = made.stdout.strip()
    assert text.startswith("moenas_")
    assert text not in made.stderr
    listed = moenas(tmp_path, "token", "list", "-o", "json")
    (row,) = json.loads(listed.stdout)
    assert (row["name"], row["role"], row["state"]) == ("ann", "viewer", "active")
    assert text not in listed.stdout
    assert moenas(tmp_path, "token", "revoke", "ann").stderr == "revoked: 1\n"
    assert (
        json.loads(moenas(tmp_path, "token", "list", "-o", "json").stdout)[0]["state"] == "revoked"
    )
    wrong = moenas(tmp_path, "token", "create", "ann", "--role", "root")
    assert wrong.returncode == 2
    assert "viewer, submitter, admin" in wrong.stderr
    refused = moenas(tmp_path, "serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "moenas token create" in refused.stderr
