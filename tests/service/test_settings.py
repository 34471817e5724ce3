"""Where a server refuses to listen, and the commands of its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from moenas.cli.commands import app
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


def moenas(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def test_tokens_are_made_listed_and_revoked_by_commands(study_folder: Path) -> None:
    made = moenas("token", "create", "ann", "--role", "viewer", "--expires", "30d")
    assert made.exit_code == 0, made.stderr
    text = made.stdout.strip()
    assert text.startswith("moenas_")
    assert text not in made.stderr
    listed = moenas("token", "list", "-o", "json")
    (row,) = json.loads(listed.stdout)
    assert (row["name"], row["role"], row["state"]) == ("ann", "viewer", "active")
    assert text not in listed.stdout
    assert moenas("token", "revoke", "ann").stderr == "revoked: 1\n"
    assert json.loads(moenas("token", "list", "-o", "json").stdout)[0]["state"] == "revoked"
    with pytest.raises(InputError, match="viewer, submitter, admin"):
        raise moenas("token", "create", "ann", "--role", "root").exception
    with pytest.raises(InputError, match="moenas token create"):
        raise moenas("serve", "--host", "0.0.0.0", "--port", "0").exception
