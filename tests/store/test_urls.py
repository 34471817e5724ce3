"""What is secret in the URL of a database is never shown, in whatever form it is written."""

from __future__ import annotations

import pytest
import sqlalchemy

from moenas.cli.options import command_line, without_password
from moenas.errors import StorageError
from moenas.passwords import hide
from moenas.store.store import Store
from moenas.store.urls import shown, storage_url

PARTS = [
    "s3cr3t",
    "pa@ss3cr3t",
    "s3cr3t@x",
    "a:s3cr3t",
    "a/s3cr3t",
    "a?s3cr3t",
    "a#s3cr3t",
    "@s3cr3t@",
]
FORMS = [
    *(f"postgresql://bob:{part}@127.0.0.1:1/db" for part in PARTS),
    *(f"postgres://bob:{part}@127.0.0.1:port/db" for part in PARTS),
    *(f"mysql://bob:{part}@h/db" for part in PARTS),
    "postgresql://127.0.0.1:1/db?user=bob&password=s3cr3t",
    "postgresql://127.0.0.1:1/db?user=bob&PassWord=s3cr3t",
    "postgresql://127.0.0.1:1/db?sslpassword=s3cr3t&user=bob",
    "postgresql://127.0.0.1:1/?dbname=postgresql://bob:s3cr3t@h/db",
    "postgresql://127.0.0.1:1/?dbname=host=h%20password=s3cr3t",
    "postgresql://127.0.0.1:port/db?user=bob&password=s3cr3t",
    "postgresql+x://bob:s3cr3t@127.0.0.1:1/db",
    "host=h user=bob password=s3cr3t",
]


@pytest.mark.parametrize("url", FORMS)
def test_no_form_of_a_password_is_shown(url: str) -> None:
    assert "s3cr3t" not in shown(url)
    assert "s3cr3t" not in without_password(url)
    assert "s3cr3t" not in command_line(["run", "s.yaml"], {"storage": url})
    with pytest.raises(StorageError) as refused:
        Store.open(url, create=True)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["postgresql://bob:pa@ss@h/db", "postgresql://bob:p@a/b@h/db", "postgresql://b:c@b@h"]
)
def test_a_raw_at_sign_is_explained(url: str) -> None:
    with pytest.raises(StorageError, match="write %40 for '@'"):
        storage_url(url)


def test_what_is_not_secret_is_shown() -> None:
    assert shown("sqlite:///my@folder/moenas.db") == "sqlite:///my@folder/moenas.db"
    assert shown("moenas.db") == "moenas.db"
    assert shown("postgresql://bob@h:5432/db?passfile=x&sslmode=require") == (
        "postgresql://bob@h:5432/db?passfile=x&sslmode=require"
    )


def test_texts_of_other_programs_are_cleaned() -> None:
    storage_url("postgresql://bob:Tr0ub%40dor@h/db")
    assert hide("cannot connect as bob with Tr0ub@dor or Tr0ub%40dor") == (
        "cannot connect as bob with *** or ***"
    )


def test_a_database_that_cannot_hold_every_text(postgres_url: str) -> None:
    server = sqlalchemy.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        for name, encoding in (("ascii", "SQL_ASCII"), ("latin", "LATIN1")):
            connection.exec_driver_sql(
                f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C'"
                " LC_CTYPE 'C'"
            )
            url = server.url.set(database=name).render_as_string(hide_password=False)
            for create in (True, False):
                with pytest.raises(
                    StorageError, match=f"encoding is {encoding}; moenas needs UTF8"
                ):
                    Store.open(url, create=create)
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.dispose()
