"""The settings of `moenas serve`, and the combinations that it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moenas.errors import InputError
from moenas.loggers.opening import check_logger

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 2 << 20
"""Bytes of the body of a request."""
MAX_SPACE = 1 << 20
"""Bytes of a space file."""


@dataclass(frozen=True)
class ServerSettings:
    """Everything that a server is told at its start."""

    storage: str | None = None
    """URL of the database; see `Store.open`."""
    host: str = "127.0.0.1"
    port: int = 8321
    work_dir: Path = Path("moenas_service")
    """Folder of the space files and logs of the drivers."""
    workers: str | None = None
    """--workers of each driver."""
    address: str | None = None
    """--address of each driver: a Ray cluster."""
    max_running: int = 1
    """Drivers that this server runs at a time."""
    restart_limit: int = 5
    """Times that a driver that died is started again."""
    backoff_s: float = 5.0
    """Seconds before the first restart; they double with each one, up to 5 minutes."""
    no_auth: bool = False
    behind_proxy: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    """Further names by which clients reach the server."""
    allow_code: bool = False
    """Whether a space may name Python files."""
    data_roots: tuple[Path, ...] = ()
    """Folders that the corpora of a space may lie in."""
    log: tuple[str, ...] = ()
    """--log of each driver."""
    requests_per_s: float = 50.0
    """Requests of a token a second, over a while."""
    burst: int = 200
    """Requests of a token at once."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def scheme(self) -> str:
        """The scheme that the server itself speaks."""
        return "https" if self.tls_cert is not None else "http"

    @property
    def hosts(self) -> frozenset[str]:
        """Host names that a request may be for, in lower case, without a port."""
        names = LOOPBACK if self.is_loopback else (*LOOPBACK, self.host)
        return frozenset(name.lower() for name in (*names, *self.allowed_hosts))

    def check(self, active_tokens: int) -> None:
        """Refuse loggers that cannot be, and to listen where strangers could use the server.

        Raises:
            InputError: naming the option that is missing or wrong.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key go together; give both")
        for flag, path in (("--tls-cert", self.tls_cert), ("--tls-key", self.tls_key)):
            if path is not None and not path.is_file():
                raise InputError(f"{flag} {path}: no such file")
        for path in self.data_roots:
            if not path.is_dir():
                raise InputError(f"--data-root {path}: no such folder")
        for text in self.log:
            check_logger(text)
        if self.is_loopback:
            return
        if self.no_auth:
            raise InputError(
                f"--no-auth with --host {self.host}: other machines reach this address; remove"
                " --no-auth, or listen on 127.0.0.1"
            )
        if not active_tokens:
            raise InputError(
                f"--host {self.host}: there is no active token, so nobody could log in; first run"
                " `moenas token create NAME --role admin`"
            )
        if self.tls_cert is None and not self.behind_proxy:
            raise InputError(
                f"--host {self.host}: tokens would be sent unencrypted; give --tls-cert and"
                " --tls-key, or --behind-proxy if a proxy adds TLS"
            )
