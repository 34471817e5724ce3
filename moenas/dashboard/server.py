"""The Optuna dashboard over the store: notes and figures put in, its gaps closed, and served."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from importlib.metadata import version
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna
import optuna_dashboard
from optuna.storages._cached_storage import _CachedStorage
from optuna.study import StudyDirection
from optuna.study._multi_objective import _get_pareto_front_trials_by_trials
from optuna.trial import FrozenTrial

import moenas
from moenas.dashboard.notes import REMARKS, former_note, study_note, trial_note
from moenas.errors import InputError
from moenas.failures import error_line
from moenas.records import Plain, View
from moenas.report import figures

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from moenas.store.store import Store


PUBLISHED = "moenas:published"
"""System attribute of the study: name of a note or figure -> digest, so that it is written once."""
STATE, MEMBERS = "state", "members"
"""Keys of the state and the front that were written: what shows only these is not drawn again."""


def publish(store: Store, name: str) -> None:
    """Write the notes and figures of a study to where the Optuna dashboard shows them.

    Only what changed is written: the dashboard keeps texts in pieces of 2 kB, each a transaction.

    Raises:
        NotFoundError: if there is no such study.
    """
    now, version = store.summary(name), f"{moenas.__version__}:{figures.digest()}"
    seeds = store.replicates_version(name)
    state = json.dumps([version, now.study.trials, now.counts, now.hypervolume, now.front, *seeds])
    storage = store.optuna_storage()
    sampler = optuna.samplers.RandomSampler()  # the default one would look at every trial
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    study_id = study._study_id
    before: dict[str, str] = study._storage.get_study_system_attrs(study_id).get(PUBLISHED, {})
    if before.get(STATE) == state:
        return
    known = before if before.get(STATE, "").startswith(f'["{version}"') else {}
    view = store.view(name)
    after = before | {STATE: state, MEMBERS: json.dumps(view.front)}
    same_front = known.get(MEMBERS) == after[MEMBERS]

    def changed(key: str, text: str) -> bool:
        after[key] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return after[key] != before.get(key)

    for key, text in _notes(view, before, known).items():
        if changed(key, text):
            _save_note(study, key.removeprefix("note:"), text)
    for figure_name, figure in figures.figures(view, same_front=same_front).items():
        figure.update_layout(**ON_THE_PAGE)
        if changed(f"figure:{figure_name}", figure.to_json()):
            optuna_dashboard.save_plotly_graph_object(study, figure, graph_object_id=figure_name)
    if after != before:
        study._storage.set_study_system_attr(study_id, PUBLISHED, after)


ON_THE_PAGE: Plain = {
    "font_color": "#868D95",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
}
"""The dashboard shows one figure in its light and its dark mode. Its background is transparent. The
grey of the texts has a contrast of about 4 to 1 on both."""


def _notes(view: View, before: dict[str, str], known: dict[str, str]) -> dict[str, str]:
    """Return key -> text of the notes to write: `note:` for the study, `note:12` for trial 12.

    The note of a member of the front never changes, so one that is `known` is not made again.
    """
    notes = {"note:": study_note(view)}
    members = {f"note:{e.trial}": e for e in figures.members(view)}
    notes |= {key: trial_note(view, e) for key, e in members.items() if key not in known}
    for key in before.keys() - notes.keys() - members.keys():
        kind, _, trial = key.partition(":")
        if kind == "note":
            notes[key] = former_note(view, int(trial))
    return notes


def _save_note(study: optuna.Study, trial: str, text: str) -> None:
    """Replace our part of a note and keep what a person wrote, before or below it."""
    target: optuna.Study | optuna.Trial = study
    if trial:
        storage, study_id = study._storage, study._study_id
        target = optuna.Trial(
            study, storage.get_trial_id_from_study_id_trial_number(study_id, int(trial))
        )
    there = optuna_dashboard.get_note(target)
    ours, mark, theirs = there.partition(REMARKS)
    optuna_dashboard.save_note(target, text + REMARKS + (theirs if mark else ours))


# --- the application ---------------------------------------------------------------------------

PATCHED_VERSION = "0.21."
"""The versions of optuna-dashboard that `patch_dashboard` was written for and is tested with."""


def patch_dashboard() -> bool:
    """Close four gaps of optuna-dashboard under Optuna 5, for this process; say whether it did.

    - It reads constraints where Optuna 4 kept them, so constraints of `Trial.set_constraint` do not
      show. Here a trial is sent with the values of `FrozenTrial.constraints`.
    - Its best trials ignore constraints. With three objectives it compares all pairs in Python at
      every poll: 16 s at 5,000 trials. Here Optuna's own function finds them.
    - It collects the search space from all trials at every poll, unless one is running. Here
      it goes on from the first that was not finished.
    - Figures come in the order of a set, another in each process. Here they are in reading order.

    Another version of the dashboard is left as it is, with a warning.
    """
    installed = version("optuna-dashboard")
    if not installed.startswith(PATCHED_VERSION):
        warnings.warn(
            f"optuna-dashboard {installed} is served as it is: it may show infeasible trials as the"
            f" best, and be slow; moenas mends {PATCHED_VERSION}*",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    from optuna_dashboard import _app, _inmemory_cache, _serializer

    if not hasattr(_serializer.serialize_frozen_trial, "__wrapped__"):
        _serializer.serialize_frozen_trial = _with_constraints(_serializer.serialize_frozen_trial)
        _app.get_plotly_graph_objects = _in_order(_app.get_plotly_graph_objects)
        _app.get_pareto_front_trials = best_trials
        gathered = _inmemory_cache._CachedExtraStudyProperty
        gathered.update = _going_on(gathered.update)
    return True


def _with_constraints(stock: Callable[..., Plain]) -> Callable[..., Plain]:
    @wraps(stock)
    def serialize(study_id: int, trial: FrozenTrial, system_attrs: Plain) -> Plain:
        return stock(study_id, trial, system_attrs) | {
            "constraints": list(trial.constraints.values())
        }

    return serialize


def _going_on(stock: Callable[..., None]) -> Callable[..., None]:
    @wraps(stock)
    def update(self: Any, trials: Sequence[FrozenTrial]) -> None:
        stock(self, trials)
        unfinished = (trial.number for trial in trials if not trial.state.is_finished())
        self._cursor = next(unfinished, len(trials))

    return update


def _in_order(stock: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    @wraps(stock)
    def graph_objects(system_attrs: Plain) -> dict[str, str]:
        names = stock(system_attrs)
        rank = {name: i for i, name in enumerate(figures.ORDER)}
        return {n: names[n] for n in sorted(names, key=lambda n: (rank.get(n, len(rank)), n))}

    return graph_objects


def best_trials(
    trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """Return the feasible trials that no other dominates, as `Study.best_trials` has them."""
    return _get_pareto_front_trials_by_trials(trials, directions, consider_constraint=True)


class CachedStorage(_CachedStorage):
    """Optuna's storage for a server: a finished trial is read from the database once."""

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Return the best feasible trial of a study with one objective, or else the best."""
        trials = best_trials(
            self.get_all_trials(study_id, deepcopy=False), self.get_study_directions(study_id)
        )
        return trials[0] if trials else super().get_best_trial(study_id)


def application(store: Store) -> WSGIApplication:
    """Return the Optuna dashboard over a store: its gaps closed, and guarded by `LoopbackGuard`."""
    patch_dashboard()
    return LoopbackGuard(optuna_dashboard.wsgi(CachedStorage(store.optuna_storage(serving=True))))


# --- who may ask -------------------------------------------------------------------------------

NOTE_PATH = re.compile(r"/api/studies/\d+(/\d+)?/note/?\Z")
HEADERS = [
    ("X-Frame-Options", "DENY"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "same-origin"),
]
PAGES = "/dashboard"
HIDDEN = b"""\
<style>
button[aria-label="rename study"],
button[aria-label="delete study"],
button:has([data-testid="AddBoxIcon"]) { display: none; }
</style>
"""
"""Hides the buttons of the list of studies whose requests are refused: rename, delete, create."""
CONDITIONS = ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE")


class LoopbackGuard:
    """Stands before an application that has no login, and answers only this machine's user.

    Listening on loopback keeps other machines out, but not the web pages in the user's browser. A
    page can let its own name point to 127.0.0.1 (then `Host` names it), or send requests across
    (then `Origin` does). Of the requests that change the database only notes are allowed. Trials
    and studies have their record in moenas' own tables, which the dashboard does not know.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, or refuse it with a reason."""
        reason = _refusal(environ)
        if reason:
            start_response("403 Forbidden", [("Content-Type", "application/json"), *HEADERS])
            return [json.dumps({"reason": reason}).encode()]
        # The dashboard looks this header up without asking whether it is there.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")

        if environ["REQUEST_METHOD"] == "GET" and environ.get("PATH_INFO", "").startswith(PAGES):
            return self._page(environ, start_response)

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start_response(status, [*headers, *HEADERS], *rest)

        return self._app(environ, start)

    def _page(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer with a page of the dashboard without the buttons of what is refused."""
        said: list[Any] = []
        asked = {key: value for key, value in environ.items() if key not in CONDITIONS}
        asked["HTTP_ACCEPT_ENCODING"] = "identity"
        parts = self._app(asked, lambda *answer: said.extend(answer[:2]))  # type: ignore[arg-type]
        try:
            page = b"".join(parts).replace(b"</head>", HIDDEN + b"</head>", 1)
        finally:
            getattr(parts, "close", lambda: None)()
        dropped = ("content-length", "etag", "last-modified", "accept-ranges")
        headers = [(name, value) for name, value in said[1] if name.lower() not in dropped]
        start_response(said[0], [*headers, ("Content-Length", str(len(page))), *HEADERS])
        return [page]


def _refusal(environ: WSGIEnvironment) -> str | None:
    """Return why a request is refused, or None."""
    host = environ.get("HTTP_HOST", "")
    if not is_loopback(_hostname(host)):
        return f"this dashboard answers to localhost and 127.0.0.1, not to '{host}'"
    if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        return None
    origin = environ.get("HTTP_ORIGIN", f"http://{host}")
    if origin != f"http://{host}" or environ.get("HTTP_SEC_FETCH_SITE") == "cross-site":
        return f"a page of '{origin}' may not change anything here"
    if environ["REQUEST_METHOD"] != "PUT" or not NOTE_PATH.match(environ.get("PATH_INFO", "")):
        return "only notes can be edited here; studies and trials belong to moenas"
    return None


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    """Return whether a host name or address means this machine alone, whatever a DNS says."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# --- the server --------------------------------------------------------------------------------


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: an open page polls every ten seconds."""


class Server(ThreadingMixIn, WSGIServer):
    """A listening server; `serve_forever()` answers until it is interrupted."""

    daemon_threads = True

    def __init__(self, host: str, port: int, app: WSGIApplication) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._host = host
        super().__init__((host, port), _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Bind without looking up the machine's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a request that cannot be read, or a page that has gone, is no fault."""

    @property
    def url(self) -> str:
        """The address to open in a browser."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.server_port}/"


def serve(store: Store, host: str = "127.0.0.1", port: int = 8080) -> Server:
    """Publish every study of a store and return a server of its dashboard; port 0 takes a free one.

    A study that cannot be published is served as it is, with a warning. One that runs now is left
    to its own process, which publishes it.

    Raises:
        InputError: if the host is not a loopback address, or the port cannot be had.
    """
    if not is_loopback(host):
        raise InputError(
            f"--host {host}: the dashboard has no login, so it listens on this machine only; give"
            " 127.0.0.1, and from elsewhere reach it by `ssh -L 8080:127.0.0.1:8080`"
        )
    names = [record.name for record in store.studies()]
    try:
        server = Server(host, port, application(store))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"--port {port}: cannot listen on {host}:{port} ({reason}); give another, or 0 for a"
            " free one"
        ) from None
    for name in names:
        try:
            if store.driver(name) is None:
                publish(store, name)
        except Exception as error:  # the rest can be looked at all the same
            reason = error_line(error)
            message = f"the notes and figures of '{name}' were not updated: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    return server
