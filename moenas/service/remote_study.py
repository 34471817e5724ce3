"""One study of a server: it is read, followed and changed over HTTP like a local one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from moenas.errors import InputError, NotFoundError, StorageLostError, StudyStoppedError
from moenas.passwords import shown_address
from moenas.records import Evaluation, FrontPoint, Plain
from moenas.resources import find, read_text
from moenas.service.connection import PATIENCE_S, READ_S, ServerConnection, Waits, error_text
from moenas.store.study_events import StudyEvent

if TYPE_CHECKING:
    import pandas

    from moenas.model.architecture import Architecture
    from moenas.study.front import Front

SLOW_S = 900.0
"""Seconds without a byte for exports and reports, whose first byte takes long."""
PAGE = 1000


class RemoteStudy:
    """One study of a server; everything is read when it is asked for, as of a local `Study`."""

    def __init__(self, server: ServerConnection, name: str) -> None:
        self.server, self.name = server, name
        self._path = f"/v1/studies/{quote(name, safe='')}"

    def __repr__(self) -> str:
        return f"RemoteStudy({self.name!r}, {shown_address(self.server.url)!r})"

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
        detail = self.detail()
        reason = detail["progress"]["ended"]
        if reason is None:  # a study that has all its trials, whose end was not stored
            return "trials" if detail["state"] == "finished" else None
        return str(reason)

    def status(self) -> Plain:
        """Return how far the study is; see `moenas status -o json`."""
        detail = self.detail()
        progress, trials = detail["progress"], detail["trials"]
        report = {"study": self.name, "state": detail["state"], "trials": trials, **progress}
        return report | {"left": max(0, trials - progress["evaluated"])}

    def front(self) -> Front:
        """Return the Pareto front."""
        from moenas.study.front import Front, Member, seed_fields

        front = self.front_report()
        seeds = front["seeds"] or {"members": []}
        replicated = {member["trial"]: member for member in seeds["members"]}
        members = tuple(
            Member(
                m["trial"],
                m["values"],
                m["architecture"],
                **seed_fields(replicated.get(m["trial"])),
            )
            for m in front["members"]
        )
        directions, corner = front["directions"], front["reference_point"]
        return Front(members, directions, front["hypervolume"], corner)

    def front_report(self) -> Plain:
        """Return the front as `report.front_report` does."""
        front = dict(self._get("/front"))
        for member in front["members"]:
            del member["summary"]  # one line that follows from the architecture
        return front

    def history(self) -> list[FrontPoint]:
        """Return the front after each complete trial."""
        return [FrontPoint.parse(point) for point in self._get("/history")["points"]]

    def report(self) -> Plain:
        """Return the insights of a study; see `moenas report -o json`."""
        return dict(self._get("/report", timeout=SLOW_S))

    def evaluation(self, trial: int) -> Evaluation:
        """Return the evaluation of a trial.

        Raises:
            NotFoundError: if the trial does not exist or is not finished.
        """
        return Evaluation.parse(self.trial(trial))

    def trial(self, trial: int) -> Plain:
        """Return everything that is stored of a trial; see `moenas show -o json`.

        Raises:
            NotFoundError: if the trial does not exist or is not finished.
        """
        report = dict(self._get(f"/trials/{int(trial)}"))
        del report["summary"]
        for key in ("values", "metrics", "violations"):
            numbers = report[key].items()  # JSON has null for a number that is not finite
            report[key] = {n: math.nan if value is None else value for n, value in numbers}
        return report

    def architecture(self, trial: int) -> Architecture:
        """Return the architecture of a trial; all its components must belong to moenas."""
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
        waits = self._waits()
        while True:
            try:
                for event in self._stream(after):
                    waits, after = self._waits(), event.id
                    yield event
                    if event.kind == "deleted":
                        return
                reason = "the stream ended"
            except (httpx.TransportError, StorageLostError) as error:
                reason = error_text(error)
            waits.wait(f"{shown_address(self.server.url)}: {reason}")

    def _waits(self) -> Waits:
        return Waits(PATIENCE_S, self.server.listener)

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

    def pause(self) -> Plain:
        """Let the study stop until `resume`; return its detail."""
        return dict(self._post("/pause"))

    def resume(self) -> Plain:
        """Put a paused, failed or cancelled study back into the queue; return its detail."""
        return dict(self._post("/resume"))

    def cancel(self) -> Plain:
        """End the study, whose trials stay; return its detail."""
        return dict(self._post("/cancel"))

    def extend(self, trials: int) -> Plain:
        """Raise how many candidates the study evaluates in total; return its detail."""
        return dict(self._post("/extend", json={"trials": trials}))

    def enqueue(self, *references: str, architecture: str | None = None) -> list[Plain]:
        """Let the study evaluate architectures next; see `moenas enqueue`.

        The text of a file of this machine is sent. `architecture` is the text of one.
        """
        body = {"references": list(map(_reference, references)), "architecture": architecture}
        return list(self._post("/enqueue", json=body))

    def delete(self) -> int:
        """Delete the study with its trials and weights; return how many trials it had."""
        trials = int(self.detail()["evaluations"])
        first = self.server.request("DELETE", self._path, accepted=(428,))
        params = {"confirm": first["confirmation"]}
        with contextlib.suppress(NotFoundError):  # the answer to the first of two was lost
            self.server.request("DELETE", self._path, params=params)
        return trials

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
        waits = self._waits()
        while True:
            try:
                with self.server.stream(path, timeout=SLOW_S) as response, to.open("wb") as file:
                    for piece in response.iter_bytes():
                        file.write(piece)
                return
            except (httpx.TransportError, StorageLostError) as error:
                waits.wait(f"{shown_address(self.server.url)}: {error_text(error)}")


def _reference(text: str) -> str | Plain:
    """Return what the server gets for an architecture: a name, or the text of a file."""
    if text.startswith("study:"):
        return text
    folder = Path(text).expanduser()
    try:
        path = folder / "config.json" if folder.is_dir() else find("spaces", ".yaml", text)
        return {"name": text, "text": read_text(path)}
    except NotFoundError:
        return text  # the server may know it


def _is_over(detail: Plain) -> bool:
    """Whether a study has ended."""
    return detail["state"] in ("finished", "failed", "cancelled")
