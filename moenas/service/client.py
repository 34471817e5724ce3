"""The client of a server: studies over HTTP that read like local ones."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence

import httpx

from moenas.errors import ConflictError, InputError, StorageLostError
from moenas.passwords import shown_address
from moenas.records import Plain
from moenas.resources import find, read_text
from moenas.service.connection import ServerConnection
from moenas.service.remote_study import RemoteStudy


def connect(url: str | None = None, token: str | None = None) -> Server:
    """Return a server; without arguments, the server $MOENAS_SERVER with the token $MOENAS_TOKEN.

    Raises:
        InputError: if there is no URL, no server answers there, or it refuses the token.
    """
    address = url or os.environ.get("MOENAS_SERVER")
    if not address:
        raise InputError("no server: give its URL, such as http://127.0.0.1:8321, or MOENAS_SERVER")
    if not address.startswith(("http://", "https://")):
        raise InputError(f"{address}: the URL of a server begins with http:// or https://")
    secret = token or os.environ.get("MOENAS_TOKEN")
    if secret is not None and not (secret.isascii() and secret.isprintable()):
        raise InputError("the token has characters that no token has; copy it again")
    try:
        server = Server(address.rstrip("/"), secret)
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(f"{address}: no URL: {error}") from None
    try:
        server.request("GET", "/v1/studies", params={"limit": 1}, patience_s=0.0)
    except StorageLostError as error:
        server.close()
        raise InputError(str(error)) from None
    except BaseException:
        server.close()
        raise
    return server


class Server(ServerConnection):
    """A server of moenas. A request that is lost on the way is sent again; none counts twice."""

    def __repr__(self) -> str:
        return f"Server({shown_address(self.url)!r})"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check(
        self,
        space: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        *,
        draws: int | None = None,
    ) -> Plain:
        """Return what the server says of a space, by name or path; see `moenas check -o json`.

        `draws` is the number of random architectures to look at.

        Raises:
            SpaceError: with line and column of what is wrong.
        """
        text, source = _space_text(space)
        body = {"space": text, "overrides": list(overrides), "draws": draws}
        return dict(self.request("POST", "/v1/spaces/check", json=body, source=source))

    def submit(
        self,
        space: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        *,
        trials: int | None = None,
        priority: int = 0,
        key: str | None = None,
    ) -> RemoteStudy:
        """Put a study into the queue: a space by name or path.

        A second call with the same `key` and arguments returns the study of the first one.

        Raises:
            SpaceError: with line and column of what is wrong.
            ConflictError: if a study of this name is there.
        """
        text, source = _space_text(space)
        body: Plain = {"space": text, "overrides": list(overrides), "priority": priority}
        body |= {"trials": trials} if trials is not None else {}
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        detail = self.request("POST", "/v1/studies", json=body, headers=headers, source=source)
        return RemoteStudy(self, detail["name"])

    def run(
        self,
        space: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        *,
        trials: int | None = None,
    ) -> RemoteStudy:
        """Put a study into the queue, or continue the one of the same space and overrides.

        A paused, failed or cancelled study is resumed. One with fewer trials is extended.

        Raises:
            SpaceError: with line and column of what is wrong.
            ConflictError: if a study of this name has another space or other overrides.
        """
        try:
            return self.submit(space, overrides, trials=trials)
        except ConflictError:
            study = RemoteStudy(self, self.check(space, overrides, draws=1)["name"])
            detail = study.detail()
            text, _ = _space_text(space)
            if not detail["submitted"]:
                raise
            if (detail["space"], detail["overrides"]) != (text, list(overrides)):
                raise ConflictError(
                    f"study '{study.name}' on the server has another space or other overrides;"
                    " give the space another `name`"
                ) from None
        if trials is not None and trials > detail["trials"]:
            study.extend(trials)
        if detail["state"] in ("paused", "failed", "cancelled"):
            study.resume()
        return study

    def study(self, name: str) -> RemoteStudy:
        """Return a study.

        Raises:
            NotFoundError: if there is none of this name.
        """
        study = RemoteStudy(self, name)
        study.detail()
        return study

    def studies(self, **wanted: str) -> list[Plain]:
        """Return all studies, newest first; `wanted` are state, user or contains."""
        rows: list[Plain] = []
        limit = "50" if "summary" in wanted else "500"
        cursor: str | None = None
        while True:
            params = {**wanted, "limit": limit} | ({"cursor": cursor} if cursor else {})
            page = self.request("GET", "/v1/studies", params=params)
            rows += page["studies"]
            cursor = page["next"]
            if cursor is None:
                return rows

    def summaries(self) -> list[Plain]:
        """Return a row for each study, oldest first; see `moenas list -o json`.

        Studies that wait in the queue and have not begun come last; they have no `created`.
        """
        rows = [row["summary"] for row in self.studies(summary="true")]
        return sorted(rows, key=_age)

    def devices(self) -> list[Plain]:
        """Return the devices of the server's machine; `nodes` gives the nodes of its Ray
        cluster."""
        return list(self.request("GET", "/v1/devices")["devices"])

    def nodes(self) -> list[Plain]:
        """Return the nodes of the server's Ray cluster; none if it has no cluster.

        Raises:
            InputError: if the cluster cannot be asked.
        """
        answer = self.request("GET", "/v1/devices")
        if answer["nodes_error"] is not None:
            raise InputError(answer["nodes_error"])
        return list(answer["nodes"])


def _age(row: Plain) -> tuple[bool, str, str]:
    """Return the place of a study in the list of a database."""
    has_begun = row["created"] is not None
    return not has_begun, row["created"] if has_begun else row["last_activity"], row["study"]


def _space_text(space: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text of a space file and its name for errors."""
    path = find("spaces", ".yaml", os.fspath(space))
    text = read_text(path)
    if not any(line.startswith("name:") for line in text.splitlines()):
        text += f"\nname: {json.dumps(path.stem)}\n"  # a study is named after its file
    return text, str(path)
