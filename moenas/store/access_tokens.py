"""Tokens of users: created, listed, revoked and checked; only their digests are stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

from sqlalchemy import Connection, Row, insert, select, update

from moenas.errors import InputError, NotFoundError
from moenas.store.tables import token

Role = Literal["viewer", "submitter", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""From the one that may do least to the one that may do most."""
PREFIX = "moenas"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}\Z")
DURATION = re.compile(r"([1-9][0-9]{0,4})([mhdw])\Z")
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class AccessToken:
    """What is stored of a token; the token itself is not."""

    id: str
    user_name: str
    role: Role
    created_at: str
    expires_at: str | None
    revoked_at: str | None

    @property
    def state(self) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= _now() else "active"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def expiry(duration: str | None) -> str | None:
    """Return when a duration such as 30d, 12h or 2w ends from now; None for None.

    Raises:
        InputError: if it is not one.
    """
    if duration is None:
        return None
    matched = DURATION.match(duration)
    if matched is None:
        raise InputError(f"--expires {duration}: write a number and m, h, d or w, such as 30d")
    span = timedelta(**{UNITS[matched[2]]: int(matched[1])})
    return (datetime.now(UTC) + span).isoformat(timespec="milliseconds")


def digest(text: str) -> str:
    """Return the SHA-256 of a token; a token has 256 random bits, so no salt is needed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def create(connection: Connection, user_name: str, role: Role, expires_at: str | None) -> str:
    """Store a new token and return its text, which nobody can read again.

    Raises:
        InputError: if the name cannot be one.
    """
    if not NAME.match(user_name):
        raise InputError(
            f"token name {user_name[:40]!r}: 1 to 100 letters, digits, '.', '_', '@' or '-',"
            " the first one a letter or a digit"
        )
    number = secrets.token_hex(8)
    text = f"{PREFIX}_{number}_{secrets.token_urlsafe(32)}"
    row = {
        "id": number,
        "digest": digest(text),
        "user_name": user_name,
        "role": role,
        "created_at": _now(),
        "expires_at": expires_at,
        "revoked_at": None,
    }
    connection.execute(insert(token), row)
    return text


def listed(connection: Connection) -> list[AccessToken]:
    """Return all tokens, oldest first."""
    rows = connection.execute(select(token).order_by(token.c.created_at, token.c.id))
    return [_record(row) for row in rows]


def _record(row: Row[tuple[object, ...]]) -> AccessToken:
    names = ("id", "user_name", "role", "created_at", "expires_at", "revoked_at")
    return AccessToken(**{name: getattr(row, name) for name in names})


def revoke(connection: Connection, name: str) -> int:
    """Revoke the token of an id, or all tokens of a user; return how many were active.

    Raises:
        NotFoundError: if there is no such token.
    """
    this = (token.c.id == name) | (token.c.user_name == name)
    if connection.execute(select(token.c.id).where(this)).first() is None:
        raise NotFoundError(f"no token '{name}'; `moenas token list` shows ids and names")
    live = this & token.c.revoked_at.is_(None)
    return connection.execute(update(token).where(live).values(revoked_at=_now())).rowcount


def checked(connection: Connection, text: str) -> AccessToken | None:
    """Return the active token that a text is, or None; digests are compared in constant time."""
    parts = text.split("_", 2)
    number = parts[1] if len(parts) == 3 and parts[0] == PREFIX else ""
    row = connection.execute(select(token).where(token.c.id == number)).first()
    known = row.digest if row is not None else digest("")
    if not hmac.compare_digest(known, digest(text)) or row is None:
        return None
    record = _record(row)
    return record if record.state == "active" else None
