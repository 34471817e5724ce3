"""URLs of databases: read, and shown to people without secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from moenas import passwords
from moenas.errors import StorageError
from moenas.passwords import HIDDEN

DEFAULT_URL = "sqlite:///moenas.db"
POSTGRES = "postgresql+psycopg"
DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": POSTGRES,
    "postgresql": POSTGRES,
    POSTGRES: POSTGRES,
}
"""What a URL may begin with -> the driver that is used."""
EXAMPLES = f"{DEFAULT_URL} or {POSTGRES}://USER:PASSWORD@HOST/NAME"

SECRET_KEY = re.compile(r"passw(or)?d$|passphrase|secret|scram_", re.IGNORECASE)
"""Parameters of a URL whose values nobody may see."""
NESTED = re.compile(r"://|password", re.IGNORECASE)
"""A value that may itself be a connection string, as `dbname` may be."""


def storage_url(text: str | None) -> URL:
    """Return the URL given, or $MOENAS_STORAGE, or $OPTUNA_STORAGE, or sqlite:///moenas.db.

    `postgres://` and `postgresql://` mean psycopg 3.

    Raises:
        StorageError: if it is not a URL of a file of SQLite or a database of PostgreSQL.
    """
    environment = os.environ.get("MOENAS_STORAGE") or os.environ.get("OPTUNA_STORAGE")
    text = text or environment or DEFAULT_URL
    url = _parsed(text)
    if url is None:
        raise StorageError(f"{shown(text)}: not the URL of a database; write {EXAMPLES}")
    _remember(url)
    if _is_cut(url):
        raise StorageError(
            f"{shown(text)}: the user or the password has an '@'; write %40 for '@', %3A for"
            " ':', %2F for '/', %3F for '?' and %23 for '#'"
        )
    if url.drivername not in DRIVERS:
        raise StorageError(
            f"{shown(url)}: '{url.drivername}' is not a database that moenas knows;"
            f" write {EXAMPLES}"
        )
    url = url.set(drivername=DRIVERS[url.drivername])
    if url.drivername == "sqlite" and ":memory:" in (url.database or ":memory:"):
        raise StorageError(f"{shown(url)}: names no file; write {DEFAULT_URL}")
    return url


def _parsed(text: str) -> URL | None:
    try:
        return make_url(text)
    except (ArgumentError, ValueError):
        return None


def _is_cut(url: URL) -> bool:
    """Whether a raw '@' has put a part of the user or the password into the host or beyond."""
    beyond = [url.host or "", *url.query]
    if url.password is not None:
        beyond.append(url.database or "")
    return any("@" in part for part in beyond)


def shown(url: URL | str) -> str:
    """Return a URL, or a text given for one, as people may see it: without its secrets.

    Of a text that is not a whole URL, all that could belong to a password is left out.
    """
    if isinstance(url, str):
        parsed = _parsed(url)
        if parsed is None or _is_cut(parsed):
            return _masked(url)
        url = parsed
    query = {
        key: HIDDEN if SECRET_KEY.search(key) or NESTED.search(str(value)) else value
        for key, value in url.query.items()
    }
    if url.drivername.startswith("sqlite"):  # the path is not percent-encoded
        text = f"{url.drivername}://" + (f"/{url.database}" if url.database else "")
        return text + ("?" if query else "") + "&".join(f"{k}={v}" for k, v in query.items())
    return url.set(query=query).render_as_string(hide_password=True)


def _masked(text: str) -> str:
    """Hide what stands before the last '@' of a text, and its parameters."""
    text = re.sub(r"(?s)(?<=://).*@", f"{HIDDEN}@", text)
    text = re.sub(r"(?i)(passw(or)?d\s*=\s*).*", rf"\1{HIDDEN}", text)
    return re.sub(r"(?s)\?.*", f"?{HIDDEN}", text) if NESTED.search(text) else text


def _remember(url: URL) -> None:
    """Note the secrets of a URL, so that they are hidden in the texts of other programs."""
    values = [str(url.password)] if url.password else []
    values += [str(value) for key, value in url.query.items() if SECRET_KEY.search(key)]
    passwords.note(*values)


def file_of(url: URL) -> Path | None:
    """Return the absolute path of an SQLite URL's file, and None for another database."""
    if url.drivername != "sqlite":
        return None
    name = str(url.database)
    if is_uri(url):
        name = unquote(name.removeprefix("file:").removeprefix("//"))
    return Path(name).absolute()


def is_uri(url: URL) -> bool:
    """Whether an SQLite URL names its file in SQLite's own form, `file:PATH?mode=ro`."""
    return str(url.database).startswith("file:")


def sqlite_url(path: Path, **parameters: str) -> URL:
    """Return the URL of a file with parameters of SQLite's own, such as `mode`."""
    return URL.create(
        "sqlite", database=f"file:{quote(str(path))}", query={**parameters, "uri": "true"}
    )
