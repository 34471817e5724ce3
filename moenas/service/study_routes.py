"""Routes that read: studies, trials, fronts, histories, reports, events, exports."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from starlette.responses import Response, StreamingResponse

from moenas.records import Plain
from moenas.service import event_stream, front_schemas, schemas, study_views, tasks
from moenas.service.state import KEPT, Service, ServiceState, User
from moenas.store import study_events
from moenas.store.submissions import State, StudyFilter

router = APIRouter(prefix="/v1", tags=["studies"])

EXPORT_S = 600.0
"""Seconds that an export or a report may take."""
CHUNK = 1 << 16
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events; the data of each is a JSON object.",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string"},
                        "event": {"type": "string"},
                        "data": {"type": "string"},
                    },
                }
            }
        },
    }
}
ZIP: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}
}
CSV: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/csv": {"schema": {"type": "string"}}}}
}


@router.get("/studies")
def list_studies(
    service: Service,
    *,
    state: State | None = None,
    user: Annotated[str | None, Query(max_length=100)] = None,
    contains: Annotated[str | None, Query(max_length=100)] = None,
    cursor: Annotated[str | None, Query(max_length=2000)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    summary: bool = False,
) -> schemas.StudyPage:
    """List studies, newest first; with `summary`, also the trials and the front of each."""
    wanted = StudyFilter(state, user, contains)
    after = study_views.read_cursor(cursor)
    return study_views.study_page(
        service.store, wanted, after=after, limit=limit, with_summary=summary
    )


@router.get("/studies/{name}")
def get_study(service: Service, user: User, name: str) -> schemas.StudyDetail:
    """Return one study: its state, its progress, its space, and what the user may do with it."""
    return study_views.study_detail(service.store, name, user)


@router.get("/studies/{name}/trials")
def list_trials(
    service: Service,
    name: str,
    after: Annotated[int, Query(ge=-1, le=2**31 - 1)] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    params: bool = False,
) -> schemas.TrialPage:
    """List the finished trials, in order of their numbers."""
    return study_views.trial_page(service.store, name, after=after, limit=limit, with_params=params)


@router.get("/studies/{name}/trials/{trial}")
def get_trial(service: Service, name: str, trial: schemas.TrialNumber) -> schemas.Trial:
    """Return everything that is stored of one trial."""
    return study_views.trial(service.store, name, trial)


@router.get("/studies/{name}/front", response_model=front_schemas.Front, responses=CSV)
def get_front(
    service: Service, name: str, format: Literal["json", "csv"] = "json"
) -> front_schemas.Front | Response:
    """Return the Pareto front, best first by the first objective."""
    front = study_views.front(service.store, name)
    if format == "json":
        return front
    rows = list(study_views.front_csv(front))
    text = io.StringIO()
    names = list(rows[0]) if rows else ["trial"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return Response(text.getvalue(), media_type="text/csv")


@router.get("/studies/{name}/history")
def get_history(service: Service, name: str) -> front_schemas.History:
    """Return the hypervolume and the front after each complete trial."""
    return study_views.history(service.store, name)


@router.get("/studies/{name}/figures")
async def get_figures(service: Service, name: str) -> schemas.Figures:
    """Return the figures of the study, as plotly.js takes them."""
    return await service.wait(_figures, service, name)


def _figures(service: ServiceState, name: str) -> schemas.Figures:
    """Return the figures of a study; they are drawn once for all between two events."""
    if not study_views.begun(service.store, name):
        return schemas.Figures(figures={})
    url = service.store.url
    figures = _kept(
        service,
        service.drawn,
        name,
        lambda: service.drawing.call(tasks.study_figures, name, storage=url),
    )
    return schemas.Figures(figures=figures)


def _kept(
    service: ServiceState,
    kept: dict[str, tuple[int, Plain]],
    name: str,
    make: Callable[[], Plain],
) -> Plain:
    """Return what was made of a study after its newest event; it is made now if it is missing."""
    newest = service.store.query(study_events.newest).get(name, 0)
    known = kept.get(name)
    if known is None or known[0] != newest or not newest:
        known = kept[name] = newest, make()
        while len(kept) > KEPT:
            kept.pop(next(iter(kept)), None)
    return known[1]


@router.get("/studies/{name}/report")
async def get_report(service: Service, name: str) -> schemas.Report:
    """Return the insights of a study: importance of holes, effects of their values."""
    return await service.wait(made_report, service, name)


def made_report(service: ServiceState, name: str) -> schemas.Report:
    """Return the report of a study, made once between two events; without trials it has the name.

    The process of the jobs makes it.
    """
    if not study_views.begun(service.store, name):
        return schemas.Report(study=name)
    url, allow_code = service.store.url, service.settings.allow_code
    report = _kept(
        service,
        service.reports,
        name,
        lambda: service.jobs.call(
            tasks.study_report, name, storage=url, allow_code=allow_code, timeout=EXPORT_S
        ),
    )
    return schemas.Report(**report)


@router.get("/studies/{name}/events", response_class=StreamingResponse, responses=STREAM)
def get_events(
    service: Service,
    name: str,
    last_event_id: Annotated[int, Header(ge=0, le=2**31 - 1)] = 0,
    after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    follow: bool = True,
) -> StreamingResponse:
    """Stream the events after `Last-Event-ID`, as server-sent events; `follow` waits for more.

    A browser cannot set the header for its first request, so `after` says the same.
    """
    study_views.listed(service.store, name)
    last = max(last_event_id, after)
    events = event_stream.stream(service.hub, service.store, name, last, follow=follow)
    return StreamingResponse(events, media_type="text/event-stream")


# --- export --------------------------------------------------------------------------------------


@router.get(
    "/studies/{name}/trials/{trial}/export", response_class=StreamingResponse, responses=ZIP
)
async def export_trial(
    service: Service,
    name: str,
    trial: schemas.TrialNumber,
    format: schemas.ExportFormat = "folder",
) -> StreamingResponse:
    """Return a trained model as a zip of the folder that `moenas export` writes in a format."""
    return await service.wait(_export, service, name, trial, format)


def _export(service: ServiceState, name: str, trial: int, format: str) -> StreamingResponse:
    """Let the process of the jobs export a trial; the answer zips the folder and removes it."""
    service.store.study(name)
    folder = Path(tempfile.mkdtemp(prefix="moenas-export-"))
    label = f"{name}-{trial}"
    try:
        service.jobs.call(
            tasks.export_trial,
            name,
            trial,
            str(folder / "export"),
            format,
            storage=service.store.url,
            allow_code=service.settings.allow_code,
            timeout=EXPORT_S,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shown = "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "_" for c in label)
    headers = {"Content-Disposition": f'attachment; filename="{shown}.zip"'}
    chunks = _zipped(folder, shown)
    return StreamingResponse(chunks, media_type="application/zip", headers=headers)


class _Sink(io.RawIOBase):
    """Takes what a zip file writes, which cannot be sought, and hands it on in pieces."""

    def __init__(self) -> None:
        self._held = bytearray()

    def writable(self) -> bool:
        """Return True: it is for writing alone."""
        return True

    def write(self, data: Any, /) -> int:
        """Hold some bytes."""
        self._held += data
        return len(data)

    def take(self) -> bytes:
        """Return the text that was written since the last call."""
        written = bytes(self._held)
        self._held.clear()
        return written


def _zipped(folder: Path, top: str) -> Iterator[bytes]:
    """Yield a zip of `folder`/export piece by piece; at the end, the folder is removed."""
    sink = _Sink()
    try:
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for path in sorted((folder / "export").iterdir()):
                entry = zipfile.ZipInfo.from_file(path, f"{top}/{path.name}")
                entry.compress_type = zipfile.ZIP_DEFLATED
                with path.open("rb") as source, archive.open(entry, "w") as target:
                    while piece := source.read(CHUNK):
                        target.write(piece)
                        yield sink.take()
        yield sink.take()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
