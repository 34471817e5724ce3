"""The pages: what they hold without a script, and what a real browser makes of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser
import made_up_views
import pytest
import stored_studies
from served import SMALL, Served, listening, served

from moenas.grammar.summary import compact
from moenas.predict.level_effects import MIN_CANDIDATES
from moenas.report.front_report import front_report, front_rows
from moenas.service.sessions import Identity
from moenas.store import replicates, submissions
from moenas.store.submissions import Submission

pytestmark = pytest.mark.integration

VIEW = made_up_views.view(12, 3, n_failed=2)
EVIL = "<img src=x onerror=alert(1)>"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("pages")
    stored_studies.shelve(folder, VIEW)
    with served(folder, requests_per_s=1e6, burst=10**6) as server:
        new = Submission("waits", "ann", SMALL, [], trials=2, priority=3, state="queued")
        server.service.store.transact(
            lambda c: submissions.submit(c, new, key=None, request_sha256="0" * 64)
        )
        yield server


def page(one: Served, path: str) -> str:
    response = one.send("GET", path, "viewer")
    assert response.status_code == 200, response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "http://" not in response.text
    assert "https://" not in response.text
    return str(response.text)


def test_pages_hold_what_the_store_says_before_any_script(one: Served) -> None:
    listed = page(one, "/")
    assert "made_up" in listed
    assert "waits" in listed
    assert "<td>15</td>\n<td>15</td>" in listed  # trials, evaluations
    study = page(one, "/studies/made_up")
    for trial in VIEW.front:
        assert f'href="/studies/made_up/trials/{trial}"' in study
    assert "loss is nan" in study
    trial = page(one, f"/studies/made_up/trials/{VIEW.front[0]}")
    assert "of the reference" in trial
    assert "d_model" in trial
    first, second = VIEW.front[:2]
    compared = page(one, f"/studies/made_up/compare?trial={first}&trial={second}")
    assert f"Trial {second}" in compared
    assert one.send("GET", "/studies/made_up/compare?trial=1", "viewer").status_code == 422
    assert one.send("GET", "/studies/nothing", "viewer").status_code == 404
    assert "waits" not in page(one, "/?contains=made")
    assert "made_up" not in page(one, "/?state=queued")


def test_the_front_has_the_intervals_that_the_command_line_prints(tmp_path: Path) -> None:
    """The front in a page against the rows of `moenas front`, with two further seeds of a member."""
    store = stored_studies.shelve(tmp_path, VIEW)
    first = VIEW.front[0]
    own = next(e for e in VIEW.evaluations if e.trial == first)
    for seed, more in ((own.seed + 1, 0.02), (own.seed + 2, 0.05)):
        noisy = {name: value + more for name, value in own.values.items()}
        replicates.add(store, replace(own, seed=seed, values=noisy))
    with served(tmp_path, requests_per_s=1e6, burst=10**6) as server:
        text = page(server, "/studies/made_up")
    report = front_report(store, "made_up")
    rows = front_rows(report, short_form=True)
    row = next(r for r in rows if r["trial"] == first)
    cells = re.findall("<td>([^<]*)</td>", text)
    for name in store.study("made_up").directions:
        assert "+-" in row[name]
        assert row[name] in cells
    assert '<th class="seeds">P(front)</th>' in text
    assert f"<td>3</td><td>{row['P(front)']}</td>" in text
    store.engine.dispose()


def test_the_page_of_a_report_has_the_numbers_of_the_command(one: Served) -> None:
    text = page(one, "/studies/made_up/report")
    report = one.send("GET", "/v1/studies/made_up/report", "viewer").json()
    assert report["objectives"]
    for objective, told in report["objectives"].items():
        section = text.partition(f"<h2>{objective}</h2>")[2].partition("<h2>")[0]
        cells = re.findall("<td>([^<]*)</td>", section)
        for row in told["importance"]:
            at = cells.index(row["hole"])
            assert cells[at + 1] == ("" if row["ped_anova"] is None else compact(row["ped_anova"]))
        for row in told["effects"]:
            assert compact(row["effect"]) in section
    assert f"<td>{compact(report['front'][-1]['hypervolume'])}</td>" in text
    assert 'href="/studies/made_up/report"' in page(one, "/studies/made_up")
    assert one.send("GET", "/studies/nothing/report", "viewer").status_code == 404
    assert "No candidate is finished" in page(one, "/studies/waits/report")


def test_a_report_of_few_candidates_says_how_many_it_needs(tmp_path: Path) -> None:
    stored_studies.shelve(tmp_path, made_up_views.view(3, 3))
    with served(tmp_path, requests_per_s=1e6, burst=10**6) as server:
        assert f"need {MIN_CANDIDATES} complete candidates" in page(
            server, "/studies/made_up/report"
        )


def test_what_users_write_is_escaped(one: Served) -> None:
    text = SMALL.replace("data: pydoc", f"data: pydoc # {EVIL}")
    new = Submission("evil", EVIL, text, [], 2, 0, "failed", reason=EVIL)
    one.service.store.transact(
        lambda c: submissions.submit(c, replace(new), key=None, request_sha256="0" * 64)
    )
    for path in ("/", "/studies/evil"):
        html = page(one, path)
        assert EVIL not in html
        assert "&lt;img src=x" in html
    assert EVIL not in page(one, f"/?contains={EVIL}")


def test_assets_are_those_of_installed_packages(one: Served) -> None:
    script = one.send("GET", "/assets/plotly.min.js", None)
    assert script.status_code == 200
    assert "plotly.js v" in script.text[:200]
    assert one.send("GET", "/assets/pages.js", None).headers["content-type"].startswith("text/java")
    # An address names the content, so that no page of a new version runs a kept script.
    digest = hashlib.sha256(one.send("GET", "/assets/pages.js", None).content).hexdigest()
    assert f"/assets/pages.js?v={digest[:12]}" in page(one, "/")
    for name in ("nothing.js", "..%2Fserver.py", "..%2F..%2F__init__.py"):
        assert one.send("GET", f"/assets/{name}", None).status_code in (404, 401)


def test_a_browser_without_a_login_is_sent_to_it(one: Served) -> None:
    asked = {"Accept": "text/html,application/xhtml+xml"}
    reply = one.send("GET", "/studies/made_up", None, headers=asked)
    assert (reply.status_code, reply.headers["location"]) == (303, "/login")
    assert "<form" in one.send("GET", "/login", None).text


def test_the_dashboard_is_behind_the_gate_and_changes_no_study(one: Served) -> None:
    assert one.send("GET", "/api/studies", None).status_code == 401
    answer = one.send("GET", "/api/studies", "viewer").json()
    assert [study["study_name"] for study in answer["study_summaries"]] == ["made_up"]
    assert one.send("GET", "/dashboard", "viewer").status_code == 200
    number = answer["study_summaries"][0]["study_id"]
    note = {"body": "mine", "version": 1}
    assert one.send("PUT", f"/api/studies/{number}/note", "viewer", json=note).status_code == 403
    assert one.send("PUT", f"/api/studies/{number}/note", "submitter", json=note).status_code == 204
    assert one.send("DELETE", f"/api/studies/{number}", "admin").status_code == 403
    assert one.send("POST", "/api/studies", "admin", json={"study_name": "x"}).status_code == 403


# --- in a browser --------------------------------------------------------------------------------

chromium = pytest.mark.skipif(
    browser.PROGRAM is None, reason="no Chromium: apt-get install chromium"
)


@pytest.fixture(scope="module")
def address(one: Served) -> Iterator[str]:
    from moenas.service.event_stream import EventHub

    state = replace(one.service, hub=EventHub(one.service.store))
    with listening(state) as url:
        yield url


@pytest.fixture(scope="module")
def tab(
    one: Served, address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[browser.Browser]:
    """A browser that is logged in as an admin."""
    with browser.chromium(tmp_path_factory.mktemp("profile")) as opened:
        link = one.service.sessions.new_link(Identity("local", "admin", None))
        opened.open(address + link, size=(1280, 900))
        opened.wait_for("Optuna dashboard")
        yield opened


@chromium
def test_the_front_lives_and_leads_to_trials(
    one: Served, address: str, tab: browser.Browser
) -> None:
    tab.open(f"{address}/studies/made_up", size=(1280, 2400))
    tab.wait("document.querySelectorAll('#front-plot .point').length === 12")
    tab.wait("document.querySelectorAll('#figures .main-svg').length >= 4")
    assert tab.run("document.querySelectorAll('#front tbody tr').length") == len(VIEW.front)
    # One more trial of the study appears without a reload.
    better = replace(
        VIEW.evaluations[0],
        trial=40,
        values={name: value / 2 for name, value in VIEW.evaluations[0].values.items()},
        fingerprint="new",
    )
    tab.run("window.mark = 1")
    store = one.service.store
    store.add_candidate("made_up", 40, "new", VIEW.architectures[0], better.cost)
    store.start_attempt("made_up", 40)
    store.record(better)
    tab.wait("document.querySelectorAll('#front-plot .point').length === 13")
    tab.wait("document.querySelector('#front a[href$=\"/trials/40\"]')")
    assert tab.run("window.mark") == 1
    # Two members are compared.
    assert tab.run("document.getElementById('compare').disabled")
    tab.run("[...document.querySelectorAll('#front input')].slice(0, 2).forEach(i => i.click())")
    tab.wait("!document.getElementById('compare').disabled")
    tab.run("document.getElementById('compare').click()")
    tab.wait_for("Architectures")
    assert "/compare?trial=" in tab.run("location.href")
    # A click on a point opens its trial.
    tab.open(f"{address}/studies/made_up", size=(1280, 2400))
    tab.wait("document.querySelectorAll('#front-plot .point').length === 13")
    place = tab.run(
        "(() => {const b = [...document.querySelectorAll('#front-plot .point')].at(-1)"
        ".getBoundingClientRect(); return {x: b.x + b.width / 2, y: b.y + b.height / 2}})()"
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        tab.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
    tab.wait("location.pathname.includes('/trials/')")
    tab.wait("document.querySelector('#curve-plot .main-svg')")
    tab.wait_for("Download the model")
    assert tab.errors == []


@chromium
def test_the_form_checks_while_one_types_and_submits(
    one: Served, address: str, tab: browser.Browser
) -> None:
    tab.open(f"{address}/submit", size=(1280, 900))
    tab.wait_for("is valid.")
    assert "Training FLOPs" in tab.text()
    assert re.search(r"Duration\s+(unknown: |\d+ (s|min|h) )", tab.text())

    def write(text: str) -> None:
        tab.run(
            "(() => {const box = document.getElementById('space');"
            f" box.value = {json.dumps(text)}; box.dispatchEvent(new Event('input'))}})()"
        )

    write(SMALL.replace("kind: dense", "kind: dens"))
    tab.wait_for("line 8, column 19: architecture.blocks.0.ffn.kind")
    assert tab.run("document.getElementById('send').disabled")
    write(SMALL.replace("name: small", "name: typed"))
    tab.wait_for("typed is valid.")
    tab.wait("!document.getElementById('send').disabled")
    tab.run("document.getElementById('send').click()")
    tab.wait("location.pathname === '/studies/typed'")
    tab.wait_for("queued")
    tab.wait("document.querySelector('[data-action=resume]').disabled")
    tab.run("document.querySelector('[data-action=pause]').click()")
    tab.wait_for("The study is paused.")
    assert one.service.store.query(lambda c: submissions.require(c, "typed")).state == "paused"
    tab.wait("document.getElementById('state').textContent === 'paused'")
    tab.wait("document.querySelector('[data-action=pause]').disabled")
    assert not tab.run("document.querySelector('[data-action=resume]').disabled")
    assert tab.errors == []


@chromium
def test_the_dashboard_opens_from_the_pages(
    one: Served, address: str, tab: browser.Browser
) -> None:
    tab.open(f"{address}/dashboard", size=(1280, 900))
    tab.wait_for("made_up")
    assert tab.errors == []


@chromium
def test_pages_fit_a_narrow_screen_and_a_keyboard(
    one: Served, address: str, tab: browser.Browser
) -> None:
    trial = VIEW.front[0]
    for path in ("/", "/submit", "/studies/made_up", f"/studies/made_up/trials/{trial}"):
        for dark in (False, True):
            tab.open(address + path, size=(360, 800), dark=dark)
            tab.wait("document.readyState === 'complete' && document.querySelector('h1')")
            wide = tab.run("document.documentElement.scrollWidth")
            assert wide <= 360, (path, wide)
        unnamed = tab.run(
            "[...document.querySelectorAll('input, select, textarea, button')].filter(e => !("
            "e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).length"
        )
        assert unnamed == 0, path
    tab.open(f"{address}/", size=(1280, 900))
    tab.wait_for("made_up")
    tab.call(
        "Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9
    )
    assert tab.run("document.activeElement.textContent") == "Skip to content"
    assert tab.errors == []
