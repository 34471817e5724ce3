"""Routes that read, over a made-up study of the store: each answer is what the store says."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_views
import pytest
import stored_studies
from served import Served, served

from moenas.records import Evaluation
from moenas.store import study_events
from moenas.store.store import Store

VIEW = made_up_views.view(12, 3, n_failed=2)
NAME = "/v1/studies/made_up"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("routes")
    stored_studies.shelve(folder, VIEW)
    with served(folder, requests_per_s=1e6, burst=10**6) as server:
        yield server


@pytest.fixture
def store(one: Served) -> Store:
    return one.service.store


def get(one: Served, path: str) -> Any:
    response = one.send("GET", path, "viewer")
    assert response.status_code == 200, response.text
    return response.json()


def test_a_study_is_what_the_store_says(one: Served, store: Store) -> None:
    answer = get(one, NAME)
    assert (answer["state"], answer["submitted"], answer["user"]) == ("stopped", False, None)
    assert answer["evaluations"] == store.count("made_up") == 15
    assert answer["progress"]["complete"] == 12
    assert answer["progress"]["failures"] == {"diverged": 2}
    assert answer["progress"]["front"] == len(VIEW.front)
    assert [o["name"] for o in answer["objectives"]] == list(VIEW.study.directions)
    assert answer["last_event"] == store.query(study_events.newest)["made_up"]


def test_the_front_is_that_of_the_store_in_json_and_csv(one: Served, store: Store) -> None:
    answer = get(one, f"{NAME}/front")
    assert [m["trial"] for m in answer["members"]] == store.front("made_up")
    by_trial = {e.trial: e for e in VIEW.evaluations}
    for member in answer["members"]:
        assert member["values"] == by_trial[member["trial"]].values
        assert member["architecture"] == VIEW.architectures[member["trial"]]
    text = one.send("GET", f"{NAME}/front?format=csv", "viewer")
    assert text.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(text.text)))
    assert [int(row["trial"]) for row in rows] == store.front("made_up")
    assert float(rows[0]["val_loss"]) == answer["members"][0]["values"]["val_loss"]


def test_the_history_ends_at_the_front(one: Served, store: Store) -> None:
    points = get(one, f"{NAME}/history")["points"]
    assert [p["trial"] for p in points] == [p.trial for p in store.history("made_up")]
    assert points[-1]["hypervolume"] == store.front_summary("made_up").hypervolume


def test_trials_come_in_pages_that_hold_each_once(one: Served) -> None:
    seen: list[dict[str, Any]] = []
    after = -1
    while True:
        page = get(one, f"{NAME}/trials?limit=4&after={after}&params=true")
        seen += page["trials"]
        if page["next"] is None:
            break
        after = page["next"]
    assert [row["trial"] for row in seen] == list(range(15))
    states = [row["status"] for row in seen]
    assert states == ["complete"] * 12 + ["failed"] * 2 + ["infeasible"]
    assert [row["trial"] for row in seen if row["on_front"]] == sorted(VIEW.front)
    assert all(set(row["params"]) == {"d_model"} for row in seen)
    assert seen[12]["failure"] == "diverged"


def test_a_trial_has_no_number_that_json_does_not_have(one: Served) -> None:
    reply = one.send("GET", f"{NAME}/trials/12", "viewer")
    body = json.loads(reply.text, parse_constant=lambda word: pytest.fail(word))
    assert body["failure"]["message"] == "loss is nan"
    assert body["curve"][-1].get("train_loss") is None
    whole = get(one, f"{NAME}/trials/0")
    assert whole["architecture"] == VIEW.architectures[0]
    assert whole["values"] == VIEW.evaluations[0].values
    assert whole["summary"].startswith(f"{VIEW.architectures[0]['d_model']}d ")


def test_what_is_not_there_is_a_problem(one: Served) -> None:
    for path in ("/v1/studies/made_ip", f"{NAME}/trials/99", "/v1/studies/x/front"):
        response = one.send("GET", path, "viewer")
        assert response.status_code == 404
        assert response.json()["type"] == "urn:moenas:problem:not-found"
    assert "Did you mean 'made_up'" in one.send("GET", "/v1/studies/made_ip").json()["detail"]
    for query in ("limit=0", "limit=x", "cursor=abc", "state=nope"):
        response = one.send("GET", f"/v1/studies?{query}", "viewer")
        assert response.status_code == 422, query


def events(text: str) -> list[dict[str, Any]]:
    """Read server-sent events, as the HTML standard has them."""
    parsed = []
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines() if line[0] != ":")
        if "data" in fields:
            data = json.loads(fields["data"])
            assert (fields["id"], fields["event"]) == (str(data["id"]), data["kind"])
            parsed.append(data)
    return parsed


def test_events_resume_after_the_last_id(one: Served, store: Store) -> None:
    path = f"{NAME}/events?follow=false"
    whole = events(one.send("GET", path, "viewer").text)
    assert [event["id"] for event in whole] == list(range(1, len(whole) + 1))
    assert sum(event["kind"] == "trial_finished" for event in whole) == 15
    middle = len(whole) // 2
    headers = {"Last-Event-ID": str(middle)}
    assert events(one.send("GET", path, "viewer", headers=headers).text) == whole[middle:]
    end = {"Last-Event-ID": str(len(whole))}
    assert events(one.send("GET", path, "viewer", headers=end).text) == []


def test_more_events_than_one_query_reads(one: Served, store: Store, tmp_path: Path) -> None:
    more = replace(VIEW.evaluations[12], study="long")
    assert isinstance(more, Evaluation)
    store.create_study(replace(VIEW.study, name="long", reference_point={}))

    def add(connection: Any) -> None:
        for i in range(1100):
            study_events.append(connection, "long", "tick", {"i": i})

    store.transact(add)
    parsed = events(one.send("GET", "/v1/studies/long/events?follow=false", "viewer").text)
    assert [event["data"].get("i") for event in parsed] == [None, *range(1100)]


def test_the_list_has_pages_and_filters(one: Served) -> None:
    first = get(one, "/v1/studies?limit=1")
    second = get(one, f"/v1/studies?limit=1&cursor={first['next']}")
    names = [first["studies"][0]["name"], second["studies"][0]["name"]]
    assert len(set(names)) == 2
    assert get(one, "/v1/studies?contains=MADE")["studies"][0]["name"] == "made_up"
    assert get(one, "/v1/studies?state=queued")["studies"] == []


def test_figures_are_drawn_again_after_an_event(one: Served, store: Store) -> None:
    first = get(one, f"{NAME}/figures")["figures"]
    assert {"front", "hypervolume", "curves"} <= set(first)
    assert first["front"]["data"]
    known = one.service.drawn["made_up"]
    assert get(one, f"{NAME}/figures")["figures"] == first
    assert one.service.drawn["made_up"] is known
    store.transact(lambda c: study_events.append(c, "made_up", "tick", {}))
    get(one, f"{NAME}/figures")
    assert one.service.drawn["made_up"] is not known


def test_a_report_is_made_again_after_an_event(one: Served, store: Store) -> None:
    first = get(one, f"{NAME}/report")
    assert first["objectives"]
    known = one.service.reports["made_up"]
    assert get(one, f"{NAME}/report") == first
    assert one.service.reports["made_up"] is known
    store.transact(lambda c: study_events.append(c, "made_up", "tick", {}))
    assert get(one, f"{NAME}/report") == first
    assert one.service.reports["made_up"] is not known


def test_metrics_are_in_the_form_of_prometheus(one: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    response = one.send("GET", "/metrics", "viewer")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    states = {s.labels["state"]: s.value for s in families["moenas_studies"].samples}
    assert states["queued"] == 0.0
    assert set(states) >= {"running", "failed", "finished"}
    assert families["moenas_drivers_limit"].samples[0].value == 1.0


def test_health_says_nothing_of_the_server(one: Served) -> None:
    for path in ("/healthz", "/readyz"):
        assert one.send("GET", path, None).json() == {"status": "ok"}
