"""Passwords that were given are in no text for people, however the address spells them."""

from __future__ import annotations

import pytest

from moenas import passwords
from moenas.failures import error_line, failure_of
from moenas.passwords import hide, hide_in, note_address, shown_address

ADDRESSES = {
    "mlflow:https://ann:Tr0ub4dor@h:5000/x": "mlflow:https://ann:***@h:5000/x",
    "https://ann:a@b#c/d?e@h": "https://ann:***@h",
    "https://ann:p%40ss%2Fword@h": "https://ann:***@h",
    "https://ghp_Token123@h/x": "https://***@h/x",
    "https://ghp_Token456:@h/x": "https://***@h/x",
    "https://h/?api_key=Tr0ub4dor": "https://h/?api_key=***",
    "postgresql://h/d?user=ann&password=Tr0ub4dor&x=1": (
        "postgresql://h/d?user=ann&password=***&x=1"
    ),
    "https://h/?api_token=Tr0ub4dor": "https://h/?api_token=***",
    "sqlite:////home/me@work/mlflow.db": "sqlite:////home/me@work/mlflow.db",
    "tensorboard:boards": "tensorboard:boards",
    "https://h/path": "https://h/path",
}
SECRETS = ("Tr0ub4dor", "a@b#c/d?e", "p%40ss%2Fword", "p@ss/word", "ghp_Token123", "ghp_Token456")


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_noted", set())


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_its_password(address: str) -> None:
    assert shown_address(address) == ADDRESSES[address]


def test_texts_of_other_programs_lose_the_passwords() -> None:
    for address in ADDRESSES:
        note_address(address)
    for secret in SECRETS:
        assert hide(f"cannot reach {secret}!") == "cannot reach ***!"
    assert hide("me@work, boards and h stay") == "me@work, boards and h stay"


def test_a_stored_failure_has_no_password() -> None:
    note_address("https://ann:Tr0ub4dor@h")
    try:
        raise OSError("no answer from https://ann:Tr0ub4dor@h/api")
    except OSError as error:
        failure, line = failure_of(error), error_line(error)
    for text in (failure.message, failure.traceback, line):
        assert "https://ann:***@h/api" in text
        assert "Tr0ub4dor" not in text


def test_texts_inside_plain_data_lose_the_passwords() -> None:
    secret = 'a"b\\c\u00e4'
    note_address(f"https://ann:{secret}@h")
    plain = {"message": f"no {secret}", "path": [f"https://ann:{secret}@h", 3], "code": None}
    hidden = hide_in(plain)
    assert hidden == {"message": "no ***", "path": ["https://ann:***@h", 3], "code": None}
