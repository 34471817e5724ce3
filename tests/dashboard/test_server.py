"""The served dashboard: what is published, what is mended, who is let in, and how it looks."""

from __future__ import annotations

import inspect
import io
import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from wsgiref.util import setup_testing_defaults

import browser
import made_up_views
import optuna
import optuna_dashboard
import pytest
from optuna_dashboard import _app, _serializer
from PIL import Image
from stored_studies import add, shelve, study_of

from moenas.dashboard import server as dashboard
from moenas.dashboard.notes import trial_note
from moenas.errors import InputError, NotFoundError
from moenas.grammar.brief import brief
from moenas.report import figures, summary
from moenas.resources import parse_yaml
from moenas.store import replicates
from moenas.store.store import Store

pytestmark = pytest.mark.integration

SHOWN = [name for name in figures.ORDER if name != "rungs"]
"""Figures of a study without early stopping, in the order of reading."""
LOCAL = {"HTTP_HOST": "127.0.0.1:8080"}


VIEW = made_up_views.view(14, 3, n_failed=1)
"""A study of 14 complete trials, one failed and one infeasible that would beat them all."""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with a store of the study; making one is a hundred commits."""
    folder = tmp_path_factory.mktemp("template")
    shelve(folder, VIEW)
    return folder


@pytest.fixture(scope="module")
def published_template(template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    dashboard.publish(copied(template, folder), "made_up")
    return folder


def copied(template, folder):
    shutil.copytree(template, folder, dirs_exist_ok=True)
    return Store.open(f"sqlite:///{folder}/moenas.db")


@pytest.fixture
def store(tmp_path, template):
    """A store of the study."""
    return copied(template, tmp_path)


@pytest.fixture
def published(tmp_path, published_template):
    """A store of the study with its notes and figures."""
    return copied(published_template, tmp_path)


@pytest.fixture
def bare(tmp_path):
    """A store without a study."""
    return shelve(tmp_path)


def ask(app, path, method="GET", **environ):
    """Return status, headers and body of one request; keywords are WSGI variables."""
    seen = {}
    request = {**LOCAL, **environ}
    setup_testing_defaults(request)
    path, _, query = path.partition("?")
    request |= {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
    if "wsgi.input" not in environ:
        request["wsgi.input"] = io.BytesIO()

    def start(status, headers, *rest):
        seen.update(status=int(status.split()[0]), headers=dict(headers))

    answer = app(request, start)
    body = b"".join(answer)
    getattr(answer, "close", lambda: None)()
    return seen["status"], seen["headers"], body


def detail(app, after=0, study=1):
    status, _, body = ask(app, f"/api/studies/{study}?after={after}")
    assert status == 200, body
    return json.loads(body)


def study_note(store):
    return optuna_dashboard.get_note(study_of(store, "made_up"))


def trial_notes(store):
    """The notes of trials that the dashboard shows, by trial."""
    trials = detail(dashboard.application(store))["trials"]
    return {t["number"]: t["note"]["body"] for t in trials if t["note"]["body"]}


@pytest.fixture
def writes(monkeypatch):
    """The study attributes that are written, by key."""
    seen = []
    stock = optuna.storages.RDBStorage.set_study_system_attr

    def spy(self, study_id, key, value):
        seen.append(key)
        stock(self, study_id, key, value)

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_study_system_attr", spy)
    return seen


# --- publish -----------------------------------------------------------------------------------


def test_members_of_the_front_get_a_note_and_only_they(published):
    assert set(trial_notes(published)) == set(published.front("made_up"))


def test_a_trial_s_note_has_its_numbers_with_units_and_how_to_take_it_home(published):
    trial = published.front("made_up")[0]
    evaluation = published.evaluation("made_up", trial)
    note = trial_notes(published)[trial]
    assert f"| **val_loss** | **{evaluation.values['val_loss']:.4g}** | nats/token |" in note
    assert "ms/token | 1.1 of the reference, spread 2.0 %, n = 30 |" in note
    assert "| active_params | 346k | parameters |" in note
    assert f"`{evaluation.fingerprint}`" in note
    assert "Some CPU, float32, 1 thread" in note
    assert f"moenas export made_up {trial} " in note


def test_the_note_of_a_trial_without_weights_names_no_export(published):
    view = published.view("made_up")
    (member, *_) = (e for e in view.evaluations if e.trial == view.front[0])
    note = trial_note(view, replace(member, weights_sha256=None))
    assert "export" not in note
    assert f"moenas show made_up {member.trial}" in note


def test_the_yaml_of_a_note_is_the_architecture_as_show_prints_it(published):
    trial = published.front("made_up")[0]
    text = trial_notes(published)[trial].partition("```yaml\n")[2].partition("```")[0]
    whole = published.architecture("made_up", trial)
    assert parse_yaml(text, "note").plain == {"architecture": brief(whole)}
    report = summary.trial_report(published, "made_up", trial)
    assert summary.trial_text(report).endswith(text.rstrip())


def test_the_study_s_note_has_objectives_data_entropy_and_device(published):
    note = study_note(published)
    assert "of 14 complete candidates; 1 failed, 1 infeasible" in note
    assert "| `decode_ms` | minimize | ms/token |" in note
    assert "stdlib" in note
    assert "abababababababab" in note
    assert "Held-out bigram loss of the data: 2.4 nats/token" in note
    assert "Some CPU" in note


def test_publishing_again_writes_nothing(published, writes):
    dashboard.publish(published, "made_up")
    assert writes == []


def test_a_replicate_is_published(published, writes):
    member = next(e for e in VIEW.evaluations if e.trial == published.front("made_up")[0])
    for seed in (1, 2):
        loss = member.values["val_loss"] + 0.1 * seed
        again = replace(member, seed=seed, values=member.values | {"val_loss": loss})
        replicates.add(published, again)
    dashboard.publish(published, "made_up")
    study = study_of(published, "made_up")
    attributes = study._storage.get_study_system_attrs(study._study_id)
    figure = optuna_dashboard._custom_plot_data.get_plotly_graph_objects(attributes)
    assert "mean over seeds, 95 % interval" in figure["front"]


def test_a_replicate_in_place_of_another_is_published(published):
    trial = published.front("made_up")[0]
    member = next(e for e in VIEW.evaluations if e.trial == trial)

    def shown(gap):
        loss = member.values["val_loss"] + gap
        replicates.add(
            published, replace(member, seed=1, values={**member.values, "val_loss": loss})
        )
        dashboard.publish(published, "made_up")
        study = study_of(published, "made_up")
        attributes = study._storage.get_study_system_attrs(study._study_id)
        figure = optuna_dashboard._custom_plot_data.get_plotly_graph_objects(attributes)["front"]
        traces = [t for t in json.loads(figure)["data"] if t.get("legendgroup") == "seeds"]
        return traces[0]["hovertext"]

    first, second = shown(0.1), shown(0.5)  # the mean is over both seeds
    assert first != second
    assert f"val_loss {figures.quantity(member.values['val_loss'] + 0.25)}" in second[0]


def better(published):
    """Add a trial that dominates the front."""
    trial = len(VIEW.evaluations)
    fine = replace(
        VIEW.evaluations[0],
        trial=trial,
        values={"val_loss": 1.0, "decode_ms": 0.01, "flops_per_token": 1e4},
    )
    add(published, fine, VIEW.architectures[0])
    return trial


def test_a_trial_that_left_the_front_keeps_a_short_note_with_who_beat_it(published):
    former = published.front("made_up")
    trial = better(published)
    assert published.front("made_up") == [trial]
    dashboard.publish(published, "made_up")
    notes = trial_notes(published)
    assert set(notes) == {*former, trial}
    assert notes[trial].startswith("**On the Pareto front.**")
    for number in former:
        assert notes[number].startswith(
            f"No longer on the Pareto front: trial {trial} dominates it."
        )


def test_only_what_changed_is_written(published, writes):
    trial = len(VIEW.evaluations)
    worse = {"val_loss": 9.0, "decode_ms": 9.0, "flops_per_token": 1e9}
    add(published, replace(VIEW.evaluations[0], trial=trial, values=worse), VIEW.architectures[0])
    writes.clear()
    dashboard.publish(published, "made_up")
    assert any(key.startswith("dashboard:note_str") for key in writes)  # the study's own
    assert not any(":note_str" in key and key.split(":")[1].isdigit() for key in writes)
    assert not any(key.startswith("dashboard:plot_data:load") for key in writes)


def test_what_a_person_adds_to_a_note_stays(published):
    study = study_of(published, "made_up")
    optuna_dashboard.save_note(study, optuna_dashboard.get_note(study) + "Look at layer 3.")
    better(published)
    dashboard.publish(published, "made_up")
    note = study_note(published)
    assert note.startswith("**On the front: 1** of 15 complete")
    assert note.endswith("stay.*\nLook at layer 3.")
    assert note.count("Look at layer 3.") == 1


def test_a_note_that_was_there_before_stays(store):
    optuna_dashboard.save_note(study_of(store, "made_up"), "My plan.")
    dashboard.publish(store, "made_up")
    assert study_note(store).endswith("stay.*\nMy plan.")


def test_the_figures_reach_the_page_in_the_order_of_reading(published):
    objects = detail(dashboard.application(published))["plotly_graph_objects"]
    assert [o["id"] for o in objects] == SHOWN
    for figure in objects:
        plain = json.loads(figure["graph_object"])
        assert plain["data"]
        assert plain["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


def test_an_unknown_study_is_named(store):
    with pytest.raises(NotFoundError, match="nope"):
        dashboard.publish(store, "nope")


def test_an_empty_study_is_published_too(tmp_path):
    store = shelve(tmp_path, made_up_views.view(0, n_failed=0))
    dashboard.publish(store, "made_up")
    assert "**On the front: 0** of 0 complete" in study_note(store)
    assert len(detail(dashboard.application(store))["plotly_graph_objects"]) == len(SHOWN)


# --- what is mended ----------------------------------------------------------------------------


def test_constraints_are_shown_and_the_best_are_optuna_s(store):
    page = detail(dashboard.application(store))
    study = study_of(store, "made_up")
    assert [t["constraints"] for t in page["trials"]] == [
        list(t.constraints.values()) for t in study.trials
    ]
    assert page["trials"][-1]["constraints"] == [0.4]
    best = {t["number"] for t in page["best_trials"]}
    assert best == {t.number for t in study.best_trials} == set(store.front("made_up"))


def test_the_best_of_one_objective_is_feasible(tmp_path):
    store = shelve(tmp_path, made_up_views.view(6, 1, n_failed=0))
    best = detail(dashboard.application(store))["best_trials"]
    assert [t["number"] for t in best] == store.front("made_up")


def test_a_poll_reads_no_finished_trial_again(store, monkeypatch):
    read = []
    stock = optuna.storages.RDBStorage._get_trials

    def spy(self, *args, **kwargs):
        trials = stock(self, *args, **kwargs)
        read.append(len(trials))
        return trials

    monkeypatch.setattr(optuna.storages.RDBStorage, "_get_trials", spy)
    app = dashboard.application(store)
    inner = app._app

    def poll():
        inner._inmemory_cache._trials_last_fetched_at.clear()  # as ten seconds later
        read.clear()
        detail(app, after=len(VIEW.evaluations))
        return sum(read)

    assert poll() == len(VIEW.evaluations)
    assert poll() == 0
    study_of(store, "made_up").ask()
    assert poll() == 1


def test_a_poll_gathers_the_search_space_of_no_finished_trial_again(store, monkeypatch):
    gathered = []
    kind = optuna_dashboard._inmemory_cache._CachedExtraStudyProperty
    stock = kind._update_search_space

    def spy(self, trial):
        gathered.append(trial.number)
        stock(self, trial)

    monkeypatch.setattr(kind, "_update_search_space", spy)
    app = dashboard.application(store)
    detail(app)
    assert len(gathered) == 15  # all but the failed one
    running = study_of(store, "made_up").ask()
    study_of(store, "made_up").ask()
    for _ in range(2):
        gathered.clear()
        app._app._inmemory_cache._trials_last_fetched_at.clear()
        page = detail(app)
        assert set(gathered) == {running.number, running.number + 1}
    assert [p["name"] for p in page["union_search_space"]] == ["d_model"]


def test_the_stock_dashboard_still_needs_its_cure(store):
    """If this fails, upstream has mended it: take the replacement out of moenas.dashboard.server."""
    dashboard.patch_dashboard()
    stock = inspect.unwrap(_serializer.serialize_frozen_trial)
    infeasible = study_of(store, "made_up").trials[-1]
    assert infeasible.constraints
    assert stock(1, infeasible, {})["constraints"] == []
    best = optuna_dashboard._pareto_front.get_pareto_front_trials(
        study_of(store, "made_up").trials, study_of(store, "made_up").directions
    )
    assert [t.number for t in best] == [infeasible.number]


def test_curing_twice_is_curing_once():
    assert dashboard.patch_dashboard()
    before = _serializer.serialize_frozen_trial, _app.get_plotly_graph_objects
    assert dashboard.patch_dashboard()
    assert (_serializer.serialize_frozen_trial, _app.get_plotly_graph_objects) == before


def test_another_version_is_served_as_it_is_with_a_warning(store, monkeypatch):
    monkeypatch.setattr(dashboard, "version", lambda name: "0.30.1")
    with pytest.warns(RuntimeWarning, match="0.30.1 is served as it is"):
        app = dashboard.application(store)
    assert len(detail(app)["trials"]) == 16


# --- who may ask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.0.0.1:8080", "[::1]:80", "127.9.9.9"]
)
def test_names_of_this_machine_are_answered(store, host):
    assert ask(dashboard.application(store), "/api/studies", HTTP_HOST=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", "", "[::1", "@"],
)
def test_other_names_are_refused_so_that_a_rebound_dns_name_reads_nothing(store, host):
    status, _, body = ask(dashboard.application(store), "/api/studies", HTTP_HOST=host)
    assert status == 403
    assert b"made_up" not in body


def send_note(app, body, **environ):
    text = json.dumps({"version": 1, "body": body}).encode()
    content = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(text))}
    content["wsgi.input"] = io.BytesIO(text)
    return ask(app, "/api/studies/1/note", "PUT", **content, **environ)[0]


def test_a_note_can_be_edited_from_the_page_itself_and_from_nowhere_else(store):
    app = dashboard.application(store)
    foreign = [
        {"HTTP_ORIGIN": "http://evil.example"},
        {"HTTP_ORIGIN": "null"},
        {"HTTP_ORIGIN": "http://127.0.0.1:9999"},
        {"HTTP_SEC_FETCH_SITE": "cross-site"},
        {"HTTP_HOST": "evil.example", "HTTP_ORIGIN": "http://evil.example"},
    ]
    for environ in foreign:
        assert send_note(app, "bad", **environ) == 403
    assert study_note(store) == ""
    assert send_note(app, "good", HTTP_ORIGIN="http://127.0.0.1:8080") == 204
    assert study_note(store) == "good"


def test_of_all_that_changes_the_database_only_notes_are_let_through(store):
    app = dashboard.application(store)
    changing = {(r.method, r.rule) for r in app._app.routes if r.method not in ("GET", "HEAD")}
    assert len(changing) > 10
    let_through = set()
    for method, rule in changing:
        path = rule.replace("<study_id:int>", "1").replace("<trial_id:int>", "1")
        status, _, body = ask(app, path, method)
        if status != 403 or b"only notes" not in body:
            let_through.add(f"{method} {rule}")
    assert let_through == {
        "PUT /api/studies/<study_id:int>/note",
        "PUT /api/studies/<study_id:int>/<trial_id:int>/note",
    }
    assert store.studies()
    assert len(study_of(store, "made_up").trials) == 16


def test_answers_cannot_be_framed_or_sniffed_and_need_no_accept_encoding(store):
    app = dashboard.application(store)
    for path in ("/dashboard", "/api/studies", "/static/bundle.js", "/favicon.ico", "/nowhere"):
        status, headers, _ = ask(app, path)
        assert status == (404 if path == "/nowhere" else 200), path
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"


# --- the server --------------------------------------------------------------------------------


@pytest.fixture
def server(published):
    server = dashboard.serve(published, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_study_that_cannot_be_published_does_not_keep_the_others_from_being_served(store):
    optuna.delete_study(study_name="made_up", storage=store.optuna_storage())
    with (
        pytest.warns(RuntimeWarning, match="'made_up' were not updated"),
        dashboard.serve(store, port=0) as server,
    ):
        assert server.server_port


def test_a_study_that_runs_now_is_left_to_its_own_process(store, writes):
    store.claim("made_up")
    with dashboard.serve(store, port=0):
        assert writes == []
    store.release("made_up")
    with dashboard.serve(store, port=0):
        assert writes


def test_a_server_publishes_and_answers_at_its_url(server):
    with urllib.request.urlopen(server.url + "api/studies/1?after=0") as answer:
        body = json.load(answer)
    assert body["name"] == "made_up"
    assert len(body["plotly_graph_objects"]) == len(SHOWN)
    assert body["objective_names"] == ["val_loss", "decode_ms", "flops_per_token"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(server.url, headers={"Host": "evil.example"}))


def test_a_page_is_whole_and_never_an_older_copy(server):
    for headers in ({}, {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}):
        asked = urllib.request.Request(f"{server.url}dashboard", headers=headers)
        with urllib.request.urlopen(asked) as answer:
            page = answer.read()
            assert answer.status == 200
            assert int(answer.headers["Content-Length"]) == len(page)
            assert answer.headers["Etag"] is None
        assert page.index(dashboard.HIDDEN) < page.index(b"</head>")


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "", "localhost.evil"]
)
def test_a_host_that_others_can_reach_is_refused(bare, host):
    with pytest.raises(InputError, match=r"--host .*no login"):
        dashboard.serve(bare, host=host, port=0)


def test_a_taken_port_is_named_with_the_way_out(bare):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: .*0 for a free one"):
            dashboard.serve(bare, port=port)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_url_names_the_host_and_the_port_that_was_taken(bare, host):
    with dashboard.serve(bare, host=host, port=0) as server:
        assert server.url == f"http://{host}:{server.server_port}/"
        assert server.server_port > 0


@pytest.mark.parametrize(
    "request_",
    [
        b"\0\1\2\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"PUT /api/studies/1/note HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"PUT /api/studies/1/note HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"PUT /api/studies/1/note HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 3\r\n\r\n{]}",
        b"GET /api/studies/99999999999999999999 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /api/studies/1?after=x HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
def test_a_malformed_request_prints_no_traceback(server, request_, capfd):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as asking:
        asking.sendall(request_)
        asking.shutdown(socket.SHUT_WR)
        while asking.recv(65536):
            pass
    assert capfd.readouterr().err == ""


# --- how it looks ------------------------------------------------------------------------------


def colours(png):
    """Return the share of pixels of each colour."""
    with Image.open(io.BytesIO(png)) as image:
        counts = image.convert("RGB").getcolors(maxcolors=1 << 24)
        return {colour: n / (image.width * image.height) for n, colour in counts}


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_the_study_its_notes_and_figures_in_light_and_dark(
    server, published, tmp_path
):
    trial = published.front("made_up")[0]
    study = f"{server.url}dashboard/studies/1"
    with browser.chromium(tmp_path / "profile") as page:
        for dark in (False, True):
            page.open(study, dark=dark)
            page.wait(
                "document.querySelectorAll('[id^=\"user-defined-plot\"] .main-svg').length >= 6"
            )
            page.wait_for("Domains by expert")
            text = page.text()
            for words in ("made_up", "val_loss", "decode_ms", "flops_per_token", "Hypervolume"):
                assert words in text
            assert "val_loss (nats/token)" in text
            background = (30, 30, 30) if dark else (255, 255, 255)
            for name in SHOWN:
                n_colours = colours(page.picture(f'[id="user-defined-plot:{name}"]'))
                assert 0.3 < n_colours.pop(background) < 0.99, (name, dark)
                assert len(n_colours) > 50, (name, dark)
        page.open(f"{study}/note")
        page.wait_for("Held-out bigram loss")
        assert "nats/token" in page.text()
        page.open(f"{study}/trials?numbers={trial}")
        page.wait_for("On the Pareto front.")
        assert "n_kv_heads" in page.text()
        assert f"moenas export made_up {trial}" in page.text()
        assert page.errors == []


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_no_button_of_what_is_refused(server, published, tmp_path):
    with browser.chromium(tmp_path / "profile") as page:
        page.open(f"{server.url}dashboard", size=(1400, 1200))
        page.wait_for("made_up")
        for button in ('[aria-label="rename study"]', '[aria-label="delete study"]'):
            page.wait(f"document.querySelector('button{button}')")  # the page still has it
        buttons = "[...document.querySelectorAll('button, a')]"
        shown = page.run(f"{buttons}.filter(b => b.offsetParent).map(b => b.innerText).join()")
        assert "RELOAD" in shown
        assert "CREATE" not in shown
        assert "CREATE" in page.run(f"{buttons}.map(b => b.textContent).join().toUpperCase()")
        hidden = "getComputedStyle(document.querySelector('[aria-label=\"{} study\"]')).display"
        assert page.run(hidden.format("rename")) == page.run(hidden.format("delete")) == "none"
        assert page.errors == []
