"""Pages for people: studies, the form, one study, its report, one trial, two compared."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import FileResponse, HTMLResponse, Response

from moenas.grammar.brief import brief
from moenas.grammar.summary import compact
from moenas.predict.level_effects import MIN_CANDIDATES
from moenas.report.seed_report import seed_lines
from moenas.resources import to_yaml
from moenas.service import schemas, study_views
from moenas.service.problems import Problem
from moenas.service.sessions import cookie_value
from moenas.service.state import Service, ServiceState, User
from moenas.service.study_routes import made_report
from moenas.store.submissions import STATES, StudyFilter

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self';"
    " img-src 'self' data: blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: nothing comes from another site, and no page has an inline script."""
ASSETS = {
    "pages.css": "text/css",
    "pages.js": "text/javascript",
    "plotly.min.js": "text/javascript",
}
PER_PAGE = 100
FAILURES = 50
"""Failed trials that the page of a study has before its script runs."""


@cache
def _templates() -> Environment:
    loader = PackageLoader("moenas.service", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["compact"] = compact
    environment.globals["asset"] = asset
    return environment


def asset_path(name: str) -> Path:
    """Return the file of an asset, which lies in a package."""
    package = "plotly.package_data" if name == "plotly.min.js" else "moenas.service.assets"
    folder = files(package.rpartition(".")[0]) / package.rpartition(".")[2]
    return Path(str(folder / name))


@cache
def asset(name: str) -> str:
    """Return the address of an asset; it changes with the content, which browsers keep."""
    return f"/assets/{name}?v={hashlib.sha256(asset_path(name).read_bytes()).hexdigest()[:12]}"


def html(template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page; every value is escaped."""
    text = _templates().get_template(template).render(**values)
    return HTMLResponse(text, status, {"Content-Security-Policy": POLICY})


def _page(
    template: str, service: ServiceState, request: Request, user: User, **values: Any
) -> HTMLResponse:
    cookie = cookie_value(request.headers.get("cookie", ""), service.sessions.cookie)
    return html(template, user=user, user_is_browser=cookie is not None, **values)


@router.get("/assets/{name}")
def get_asset(name: str) -> Response:
    """Return a style sheet or a script; plotly.js comes from the installed package."""
    if name not in ASSETS:
        raise Problem(404, f"no asset {name!r}")
    headers = {"Cache-Control": "max-age=3600"}
    return FileResponse(asset_path(name), media_type=ASSETS[name], headers=headers)


@router.get("/")
def studies_page(
    service: Service,
    user: User,
    request: Request,
    contains: Annotated[str, Query(max_length=100)] = "",
    state: Annotated[str, Query(max_length=20)] = "",
    cursor: str | None = None,
) -> Response:
    """Show the studies with their state, newest first."""
    known = next((each for each in STATES if each == state), None)
    wanted = StudyFilter(known, None, contains or None)
    after = study_views.read_cursor(cursor)
    page = study_views.study_page(service.store, wanted, after=after, limit=PER_PAGE)
    values = {"page": page, "states": STATES, "contains": contains, "state": known or ""}
    return _page("studies.html", service, request, user, **values)


@router.get("/submit")
def submit_page(service: Service, user: User, request: Request) -> Response:
    """Show a form that checks a space while it is written."""
    return _page("submit.html", service, request, user, example=schemas.EXAMPLE_SPACE)


@router.get("/studies/{name}")
def study_page(service: Service, user: User, request: Request, name: str) -> Response:
    """Show a study: its state, its front and its failures."""
    store = service.store
    study, front = study_views.study_detail(store, name, user), study_views.front(store, name)
    trials = study_views.trial_page(store, name, after=-1, limit=1000, with_params=False).trials
    failed = [row for row in trials if row.failure is not None][:FAILURES]
    seeds = {} if front.seeds is None else {each.trial: each for each in front.seeds.members}
    values = {"study": study, "front": front, "failed": failed, "seeds": seeds}
    return _page("study.html", service, request, user, **values)


@router.get("/studies/{name}/report")
async def report_page(service: Service, user: User, request: Request, name: str) -> Response:
    """Show what the study says of its space: importance of holes, effects of their values."""
    report = (await service.wait(made_report, service, name)).model_dump()
    begun = "space" in report
    lines = seed_lines(report["seeds"]) if begun and report["seeds"] else []
    values = {"name": name, "report": report if begun else None, "seeds": lines}
    return _page("report.html", service, request, user, **values, needed=MIN_CANDIDATES)


@router.get("/studies/{name}/trials/{trial}")
def trial_page(
    service: Service, user: User, request: Request, name: str, trial: schemas.TrialNumber
) -> Response:
    """Show a trial: its numbers and its architecture."""
    shown = study_views.trial(service.store, name, trial)
    text = _written(shown)
    return _page("trial.html", service, request, user, trial=shown, architecture=text)


def _written(shown: schemas.Trial) -> str:
    return to_yaml({"architecture": brief(shown.architecture)}).rstrip()


@router.get("/studies/{name}/compare")
def compare_page(
    service: Service,
    user: User,
    request: Request,
    name: str,
    trial: Annotated[list[schemas.TrialNumber], Query(min_length=2, max_length=2)],
) -> Response:
    """Show two trials side by side."""
    first, second = (study_views.trial(service.store, name, each) for each in trial)
    numbers = [
        (key, _number(first.values.get(key)), _number(second.values.get(key)))
        for key in first.values
    ]
    numbers += [
        (key, f"{first.cost[key]:,.0f}", f"{second.cost.get(key, 0):,.0f}")
        for key in first.cost
        if key not in first.values
    ]
    texts = (_written(first).splitlines(), _written(second).splitlines())
    values = {"name": name, "first": first, "second": second, "numbers": numbers}
    lines = list(zip_longest(*texts, fillvalue=""))
    return _page("compare.html", service, request, user, lines=lines, **values)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"
