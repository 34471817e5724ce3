"""The client of a server: studies over HTTP that read like local ones."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from moenas.errors import (
    ConflictError,
    InputError,
    MoenasError,
    NotFoundError,
    SourceLocation,
    SpaceError,
    StorageLostError,
    StudyStoppedError,
)
from moenas.records import Evaluation, FrontPoint, Plain
from moenas.resources import find, read_text
from moenas.store.study_events import StudyEvent

if TYPE_CHECKING:
    import pandas

    from moenas.model.architecture import Architecture
    from moenas.study.launch import Front

PATIENCE_S = 300.0
"""Seconds for which a client waits for a server that does not answer."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
READ_S = 60.0
"""Seconds without a byte after which a connection is lost; streams have a comment every 15 s."""
SLOW_S = 900.0
"""The same for exports and reports, whose first byte takes long."""
PASSING = (429, 502, 503, 504)
"""Statuses after which the same request may succeed."""
PAGE = 1000


def connect(url: str | None = None, token: str | None = None) -> Server:
    """Return a server; without arguments, that of $MOENAS_SERVER with the token $MOENAS_TOKEN.

    Raises:
        InputError: if there is no URL, no server answers there, or it refuses the token.
    """
    address = url or os.environ.get("MOENAS_SERVER")
    if not address:
        raise InputError("no server: give its URL, such as http://127.0.0.1:8321, or MOENAS_SERVER")
    if not address.startswith(("http://", "https://")):
        raise InputError(f"{address}: the URL of a server begins with http:// or https://")
    server = Server(address.rstrip("/"), token or os.environ.get("MOENAS_TOKEN"))
    try:
        server.request("GET", "/v1/studies", params={"limit": 1}, patience_s=0.0)
    except StorageLostError as error:
        server.close()
        raise InputError(str(error)) from None
    except BaseException:
        server.close()
        raise
    return server


class Server:
    """A server of moenas. A request that is lost on the way is sent again; none counts twice."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=READ_S)

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check(self, space: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Plain:
        """Return what the server says of a space, by name or path; see `moenas check -o json`.

        Raises:
            SpaceError: with line and column of what is wrong.
        """
        text, source = _space_text(space)
        body = {"space": text, "overrides": list(overrides)}
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
        cursor: str | None = None
        while True:
            params = {**wanted, "limit": "500"} | ({"cursor": cursor} if cursor else {})
            page = self.request("GET", "/v1/studies", params=params)
            rows += page["studies"]
            cursor = page["next"]
            if cursor is None:
                return rows

    def devices(self) -> list[Plain]:
        """Return the devices of the server's machine; `nodes` gives those of its Ray cluster."""
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

    # --- requests --------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        *,
        source: str | None = None,
        patience_s: float = PATIENCE_S,
        timeout: float = READ_S,
        **more: Any,
    ) -> Any:
        """Send a request until it is answered, and return the JSON of the answer.

        Every request of the API can be repeated without harm. `source` names the space in errors.

        Raises:
            StorageLostError: if the server does not answer for `patience_s` seconds.
            MoenasError: the error that the server tells.
        """
        waits = Waits(patience_s)
        while True:
            try:
                response = self._http.request(method, path, timeout=timeout, **more)
            except httpx.TransportError as error:
                waits.wait(f"{self.url}: {_said(error)}")
                continue
            if response.status_code in PASSING and waits.is_left:
                waits.wait(f"{self.url}: status {response.status_code}", _retry_after(response))
                continue
            if response.is_success:
                return response.json()
            raise error_of(response, source)

    @contextlib.contextmanager
    def stream(self, path: str, *, timeout: float, **more: Any) -> Iterator[httpx.Response]:
        """Yield an answer whose body is read piece by piece.

        Raises:
            httpx.TransportError: if the connection is lost.
            MoenasError: the error that the server tells.
        """
        with self._http.stream("GET", path, timeout=timeout, **more) as response:
            if not response.is_success:
                response.read()
                raise error_of(response, None)
            yield response


def _space_text(space: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text of a space file and its name for errors."""
    path = find("spaces", ".yaml", os.fspath(space))
    text = read_text(path)
    if not any(line.startswith("name:") for line in text.splitlines()):
        text += f"\nname: {json.dumps(path.stem)}\n"  # a study is named after its file
    return text, str(path)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


class Waits:
    """Growing pauses between attempts, for a limited time."""

    def __init__(self, patience_s: float) -> None:
        self._end = time.monotonic() + patience_s
        self._next = FIRST_WAIT_S

    @property
    def is_left(self) -> bool:
        """Whether there is time for one more attempt."""
        return time.monotonic() < self._end

    def wait(self, reason: str, least: float = 0.0) -> None:
        """Sleep before the next attempt.

        Raises:
            StorageLostError: if the time is over.
        """
        if not self.is_left:
            raise StorageLostError(reason)
        time.sleep(max(least, self._next * random.uniform(0.5, 1.0)))
        self._next = min(LONGEST_WAIT_S, 2 * self._next)


def error_of(response: httpx.Response, source: str | None) -> MoenasError:
    """Return the error that a problem document tells."""
    try:
        problem: Mapping[str, Any] = response.json()
    except ValueError:
        problem = {}
    detail = str(problem.get("detail", f"{response.url}: status {response.status_code}"))
    places = problem.get("errors") or [{}]
    if response.status_code == 422 and places[0].get("line"):
        place = places[0]
        location = SourceLocation(source or place["file"], place["line"], place["column"])
        return SpaceError(place["message"], location=location, path=place["path"])
    kinds: dict[int, type[MoenasError]] = {404: NotFoundError, 409: ConflictError}
    kinds |= dict.fromkeys((400, 401, 403, 413, 421, 422, 428), InputError)
    kinds |= dict.fromkeys(PASSING, StorageLostError)
    return kinds.get(response.status_code, MoenasError)(detail)


# --- a study -------------------------------------------------------------------------------------


class RemoteStudy:
    """One study of a server; everything is read when it is asked for, as of a local `Study`."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self._path = f"/v1/studies/{quote(name, safe='')}"

    def __repr__(self) -> str:
        return f"RemoteStudy({self.name!r}, {self.server.url!r})"

    def _get(self, below: str, **more: Any) -> Any:
        return self.server.request("GET", self._path + below, **more)

    def _post(self, below: str, **more: Any) -> Any:
        return self.server.request("POST", self._path + below, **more)

    def detail(self) -> Plain:
        """Return state, progress and space."""
        return dict(self._get(""))

    @property
    def state(self) -> str:
        """Such as queued, running or finished."""
        return str(self.detail()["state"])

    @property
    def finished(self) -> str | None:
        """Why the study is over, as of a local study; None if it is not."""
        reason = self.detail()["progress"]["ended"]
        return None if reason is None else str(reason)

    def front(self) -> Front:
        """Return the Pareto front."""
        from moenas.study.launch import Front, Member

        front = self._get("/front")
        members = tuple(
            Member(m["trial"], m["values"], m["architecture"]) for m in front["members"]
        )
        directions, corner = front["directions"], front["reference_point"]
        return Front(members, directions, front["hypervolume"], corner)

    def history(self) -> list[FrontPoint]:
        """Return the front after each complete trial."""
        return [FrontPoint.parse(point) for point in self._get("/history")["points"]]

    def report(self) -> Plain:
        """Return what the study shows of its space; see `moenas report -o json`."""
        return dict(self._get("/report", timeout=SLOW_S))

    def evaluation(self, trial: int) -> Evaluation:
        """Return the evaluation of a trial.

        Raises:
            NotFoundError: if the trial does not exist or is not finished.
        """
        return Evaluation.parse(self._get(f"/trials/{int(trial)}"))

    def architecture(self, trial: int) -> Architecture:
        """Return the architecture of a trial; its components must be those of moenas."""
        from moenas.model.architecture import Architecture

        return Architecture.parse(self._get(f"/trials/{int(trial)}")["architecture"])

    def trials(self) -> list[Plain]:
        """Return a row for each finished trial, in order."""
        rows: list[Plain] = []
        after: int | None = -1
        while after is not None:
            page = self._get("/trials", params={"after": after, "limit": PAGE, "params": True})
            rows += page["trials"]
            after = page["next"]
        return rows

    def dataframe(self) -> pandas.DataFrame:
        """Return the rows and the columns of the local `Study.dataframe`."""
        import pandas

        rows = [
            {
                "trial": row["trial"],
                "state": row["status"],
                **row["values"],
                **{f"cost.{name}": value for name, value in row["cost"].items()},
                "failure": row["failure"],
                "seconds": row["seconds"],
                **{f"params.{name}": value for name, value in row["params"].items()},
            }
            for row in self.trials()
        ]
        return pandas.DataFrame(rows)

    # --- events ----------------------------------------------------------------------------------

    def events(self, after: int = 0) -> Iterator[StudyEvent]:
        """Yield each event newer than `after` once, and wait for more, until the study is deleted.

        A connection that is lost is made again.

        Raises:
            StorageLostError: if the server does not answer for PATIENCE_S seconds.
        """
        waits = Waits(PATIENCE_S)
        while True:
            try:
                for event in self._stream(after):
                    waits, after = Waits(PATIENCE_S), event.id
                    yield event
                    if event.kind == "deleted":
                        return
                reason = "the stream ended"
            except (httpx.TransportError, StorageLostError) as error:
                reason = _said(error)
            waits.wait(f"{self.server.url}: {reason}")

    def _stream(self, after: int) -> Iterator[StudyEvent]:
        headers = {"Last-Event-ID": str(after)}
        path = f"{self._path}/events"
        with self.server.stream(path, timeout=READ_S, headers=headers) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield StudyEvent(**json.loads(line.removeprefix("data: ")))

    def wait(self, progress: Callable[[StudyEvent], None] | None = None) -> RemoteStudy:
        """Wait until the study is over; `progress` gets each event. Returns the study.

        Raises:
            StudyStoppedError: if it failed or was cancelled.
        """
        detail = self.detail()
        if _is_over(detail):
            return self._ended(detail)
        for event in self.events(detail["last_event"]):
            if progress is not None:
                progress(event)
            if event.kind in ("finished", "failed", "cancelled", "study_ended", "deleted"):
                detail = self.detail()  # raises NotFoundError if it was deleted
                if _is_over(detail):
                    break
        return self._ended(detail)

    def _ended(self, detail: Plain) -> RemoteStudy:
        if detail["state"] in ("failed", "cancelled"):
            reason = detail["reason"] or "a user cancelled it"
            raise StudyStoppedError(f"study '{self.name}' is {detail['state']}: {reason}")
        return self

    # --- changes ---------------------------------------------------------------------------------

    def pause(self) -> None:
        """Let the study stop until `resume`."""
        self._post("/pause")

    def resume(self) -> None:
        """Put a paused, failed or cancelled study back into the queue."""
        self._post("/resume")

    def cancel(self) -> None:
        """End the study; its trials stay."""
        self._post("/cancel")

    def extend(self, trials: int) -> None:
        """Raise how many candidates the study evaluates in total."""
        self._post("/extend", json={"trials": trials})

    def enqueue(self, *references: str, architecture: str | None = None) -> list[Plain]:
        """Let the study evaluate architectures next; see `POST /v1/studies/{name}/enqueue`."""
        body = {"references": list(references), "architecture": architecture}
        return list(self._post("/enqueue", json=body))

    def delete(self) -> None:
        """Delete the study with its trials and weights."""
        http = self.server._http
        first = http.request("DELETE", self._path)
        if first.status_code != 428:
            raise error_of(first, None)
        params = {"confirm": first.json()["confirmation"]}
        with contextlib.suppress(NotFoundError):  # the answer to the first of two was lost
            self.server.request("DELETE", self._path, params=params)

    def export(self, trial: int, out: str | os.PathLike[str], *, format: str = "folder") -> Path:
        """Write a trial's trained model into the new folder `out`; see `moenas export`.

        Raises:
            InputError: if `out` is in use, the trial has no trained weights, or the format is
                unknown or cannot hold its architecture.
        """
        target = Path(out)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target}: is in use; name a folder that does not exist yet")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as draft:
            archive = Path(draft, "export.zip")
            path = f"{self._path}/trials/{int(trial)}/export?format={quote(format)}"
            self._download(path, archive)
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(Path(draft, "export"))
            (folder,) = Path(draft, "export").iterdir()
            os.rename(folder, target)
        return target

    def _download(self, path: str, to: Path) -> None:
        """Write the body of an answer to a file; one that is cut off is fetched again."""
        waits = Waits(PATIENCE_S)
        while True:
            try:
                with self.server.stream(path, timeout=SLOW_S) as response, to.open("wb") as file:
                    for piece in response.iter_bytes():
                        file.write(piece)
                return
            except (httpx.TransportError, StorageLostError) as error:
                waits.wait(f"{self.server.url}: {_said(error)}")


def _is_over(detail: Plain) -> bool:
    """Whether a study has ended; one that a command runs has when its end is stored."""
    if detail["submitted"]:
        return detail["state"] in ("finished", "failed", "cancelled")
    return detail["progress"]["ended"] is not None
