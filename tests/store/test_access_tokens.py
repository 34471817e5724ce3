"""Tokens: only digests are stored, and only an active token is one."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy

from moenas.errors import InputError, NotFoundError
from moenas.store import access_tokens, tables
from moenas.store.store import Store


@pytest.fixture
def store(database_url: str) -> Store:
    return Store.open(database_url, create=True)


def create(store: Store, name: str, until: str | None = None) -> str:
    return store.transact(lambda c: access_tokens.create(c, name, "viewer", until))


def check(store: Store, text: str) -> str | None:
    rows = store.query(lambda c: access_tokens.checked(c, text))
    return None if rows is None else rows.user_name


def test_a_token_is_known_by_all_of_its_text(store: Store) -> None:
    text, other = create(store, "ann"), create(store, "bob")
    assert check(store, text) == "ann"
    assert check(store, other) == "bob"
    mixed = "_".join([*text.split("_", 2)[:2], other.split("_", 2)[2]])
    for wrong in ("", "moenas", "moenas__", text[:-1], text + "x", text.upper(), mixed):
        assert check(store, wrong) is None


def test_the_database_holds_the_digest_alone(store: Store) -> None:
    text = create(store, "ann")
    with store.engine.connect() as connection:
        row = connection.execute(sqlalchemy.select(tables.token)).mappings().one()
    assert row["digest"] == hashlib.sha256(text.encode()).hexdigest()
    secret = text.split("_", 2)[2]
    assert not any(secret in str(value) for value in row.values())


def test_revoked_and_expired_tokens_are_none(store: Store) -> None:
    now = datetime.now(UTC)
    text = create(store, "ann")
    past = create(store, "old", (now - timedelta(seconds=1)).isoformat(timespec="milliseconds"))
    soon = create(store, "new", access_tokens.expiry("1h"))
    assert check(store, past) is None
    assert check(store, soon) == "new"
    number = text.split("_")[1]
    assert store.transact(lambda c: access_tokens.revoke(c, number)) == 1
    assert store.transact(lambda c: access_tokens.revoke(c, number)) == 0
    assert check(store, text) is None
    states = {t.user_name: t.state for t in store.query(access_tokens.listed)}
    assert states == {"ann": "revoked", "old": "expired", "new": "active"}
    with pytest.raises(NotFoundError, match="no token 'zoe'"):
        store.transact(lambda c: access_tokens.revoke(c, "zoe"))


@pytest.mark.parametrize(("text", "hours"), [("30m", 0.5), ("12h", 12), ("30d", 720), ("2w", 336)])
def test_durations(text: str, hours: float) -> None:
    until = access_tokens.expiry(text)
    assert until is not None
    left = datetime.fromisoformat(until) - datetime.now(UTC)
    assert abs(left - timedelta(hours=hours)) < timedelta(seconds=5)


@pytest.mark.parametrize("text", ["", "0d", "30", "d", "1y", "-1d", "1.5h", "999999d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match="such as 30d"):
        access_tokens.expiry(text)
