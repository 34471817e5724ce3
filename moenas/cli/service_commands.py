"""Commands of the service: the server, and the tokens of its users."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moenas.cli.options import (
    Address,
    Format,
    Log,
    NoServer,
    Output,
    Storage,
    Workers,
    operator,
    worker_count,
    write_rows,
)
from moenas.errors import InputError
from moenas.terminal import emit, say

if TYPE_CHECKING:
    from sqlalchemy import Connection

commands = typer.Typer()
"""The command `serve`, which the command line includes."""
token = typer.Typer(
    name="token",
    help="Create, list and revoke the tokens of a server's users.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Further host name of requests; repeat it for several."),
]
DataRoots = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="Folder of corpora that spaces may name; repeatable."),
]


@commands.command()
def serve(
    storage: Storage = None,
    address: Address = None,
    workers: Workers = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8321,
    max_running: Annotated[
        int, typer.Option(min=1, max=1000, help="Studies that run at a time.")
    ] = 1,
    work_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the space files and logs of studies.")
    ] = Path("moenas_service"),
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Let every program of this machine in; loopback alone."),
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Key of the certificate, PEM.")
    ] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy adds TLS and forwards to this address.")
    ] = False,
    allowed_host: AllowedHosts = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let spaces name Python files, which are run.")
    ] = False,
    data_root: DataRoots = None,
    log: Log = None,
) -> None:
    """Serve studies over HTTP: an API, a queue and pages, for the users of this database."""
    try:
        from moenas.service import server
        from moenas.service.settings import ServerSettings
    except ImportError as error:
        raise InputError(f"serve needs {error.name}; `pip install 'moenas[service]'`") from None

    worker_count(workers)
    settings = ServerSettings(
        storage=storage,
        host=host,
        port=port,
        work_dir=work_dir,
        workers=workers,
        address=address,
        max_running=max_running,
        no_auth=no_auth,
        behind_proxy=behind_proxy,
        tls_cert=tls_cert,
        tls_key=tls_key,
        allowed_hosts=tuple(allowed_host or ()),
        allow_code=allow_code,
        data_roots=tuple(data_root or ()),
        log=tuple(log or ()),
    )
    raise typer.Exit(server.serve(settings, say))


@token.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the user.")],
    role: Annotated[
        str, typer.Option(metavar="ROLE", help="viewer, submitter or admin.")
    ] = "submitter",
    expires: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Such as 30d or 12h. Default: never.")
    ] = None,
    storage: Storage = None,
    server: NoServer = None,
) -> None:
    """Print a new token; only its digest is stored, so it cannot be printed again."""
    from moenas.store import access_tokens, audit
    from moenas.store.store import Store

    if role not in access_tokens.ROLES:
        raise InputError(f"--role {role}: give one of {', '.join(access_tokens.ROLES)}")
    wanted, until = next(r for r in access_tokens.ROLES if r == role), access_tokens.expiry(expires)
    store = Store.open(storage, create=True)

    def change(connection: Connection) -> str:
        text = access_tokens.create(connection, name, wanted, until)
        told = {"name": name, "role": wanted, "expires": until}
        audit.write(connection, operator(), "token_created", None, told)
        return text

    text = store.transact(change)
    emit(text)
    say(f"token of {name}, {role}, {f'until {until[:16]} UTC' if until else 'without an end'}")


@token.command("list")
def list_tokens(
    storage: Storage = None, server: NoServer = None, output: Format = Output.table
) -> None:
    """List the tokens: id, name, role, state and times."""
    from moenas.store import access_tokens
    from moenas.store.store import Store

    store = Store.open(storage, create=True)
    rows = [
        {
            "id": record.id,
            "name": record.user_name,
            "role": record.role,
            "state": record.state,
            "created": record.created_at[:19],
            "expires": record.expires_at[:19] if record.expires_at else None,
        }
        for record in store.query(access_tokens.listed)
    ]
    write_rows(rows, output)


@token.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Id of a token, or name of a user.")],
    storage: Storage = None,
    server: NoServer = None,
) -> None:
    """Revoke a token, or all tokens of a user; it is refused from the next request on."""
    from moenas.store import access_tokens, audit
    from moenas.store.store import Store

    def change(connection: Connection) -> int:
        count = access_tokens.revoke(connection, name)
        told = {"name": name, "tokens": count}
        audit.write(connection, operator(), "token_revoked", None, told)
        return count

    count = Store.open(storage, create=True).transact(change)
    say(f"revoked: {count}")
