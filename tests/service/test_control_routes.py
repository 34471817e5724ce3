"""Routes that change: the checks before, the roles, and the rows of the audit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import made_up_views
import pytest
import stored_studies
from served import SMALL, Served, served
from sqlalchemy import update

from moenas.service.space_rules import is_below
from moenas.store import audit, study_events, submissions, tables
from moenas.store.submissions import Submission
from moenas.store.weights import weights_path

NEW = Submission("x", "submitter", SMALL, [], trials=2, priority=0, state="queued")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("control")
    stored_studies.shelve(folder, made_up_views.view(3, 2))
    root = folder / "data"
    root.mkdir()
    (root / "text.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(2000)))
    limits = {"requests_per_s": 1e6, "burst": 10**6}
    with served(folder, data_roots=(root,), **limits) as server:
        yield server


def put(one: Served, name: str, user: str = "submitter", **changes: Any) -> None:
    new = replace(NEW, study=name, user_name=user, **changes)
    one.service.store.transact(
        lambda c: submissions.submit(c, new, key=None, request_sha256="0" * 64)
    )


def test_a_valid_space_is_described(one: Served) -> None:
    reply = one.send("POST", "/v1/spaces/check", json={"space": SMALL, "draws": 5})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["name"], body["points"], body["drawn"]) == ("small", 6, 5)
    assert body["estimate"]["candidates"] == 2
    with_override = {"space": SMALL, "overrides": ["search.trials=7"], "draws": 5}
    body = one.send("POST", "/v1/spaces/check", json=with_override).json()
    assert body["estimate"]["candidates"] == 7


BROKEN = {
    "unknown kind": (SMALL.replace("kind: dense", "kind: dens"), 8, 19, "Did you mean 'dense'"),
    "not YAML": (SMALL.replace("[32, 64]}", "[32, 64}"), 4, 28, "not valid YAML"),
    "no code": (SMALL + "use: [/etc/evil.py]\n", 13, 6, "--allow-code"),
    "objective": (SMALL.replace("[val_loss,", "[val_loss, /tmp/x.py,"), 9, 24, "--allow-code"),
    "sampler": (SMALL.replace("random", "'mine.py:Mine'"), 12, 19, "--allow-code"),
    "data": (SMALL.replace("data: pydoc", "data: {files: /etc/passwd}"), 10, 15, "--data-root"),
    "start": (
        SMALL.replace("trials: 2", "trials: 2, start_from: [/etc/passwd]"), 12, 51, "no shipped",
    ),
    "empty": ("", 1, 1, "empty"),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/spaces/check", "/v1/studies"])
@pytest.mark.parametrize(("text", "line", "column", "says"), BROKEN.values(), ids=BROKEN)
def test_an_error_has_its_place_as_fields(
    one: Served, path: str, text: str, line: int, column: int, says: str
) -> None:
    reply = one.send("POST", path, json={"space": text})
    assert reply.status_code == 422, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    (error,) = reply.json()["errors"]
    assert (error["line"], error["column"]) == (line, column), error
    assert says in error["message"]
    assert one.service.store.query(lambda c: submissions.find(c, "small")) is None


@pytest.mark.parametrize(
    "override",
    [
        "use=[/etc/evil.py]",
        "data.files=[/etc/passwd]",
        "data.tokenizer=/etc/passwd",
        "search.sampler='x.py:X'",
    ],
)
def test_an_override_is_held_to_the_same_rules(one: Served, override: str) -> None:
    text = SMALL.replace("data: pydoc", "data: {kind: pydoc}")
    reply = one.send("POST", "/v1/studies", json={"space": text, "overrides": [override]})
    assert reply.status_code == 422, reply.text
    assert "server" in reply.json()["detail"] or "--data-root" in reply.json()["detail"]


def test_a_path_with_a_null_byte_is_below_no_folder(tmp_path: Path) -> None:
    assert is_below(str(tmp_path / "a"), (str(tmp_path),))
    assert not is_below(f"{tmp_path}/a\0b", (str(tmp_path),))


def test_a_link_out_of_the_data_root_is_not_followed(one: Served) -> None:
    (root,) = one.service.settings.data_roots
    (root / "link.txt").symlink_to("/etc/passwd")
    for name in ("/link.txt", "/*.txt", ""):
        text = SMALL.replace("data: pydoc", f"data: {{files: ['{root}{name}']}}")
        reply = one.send("POST", "/v1/spaces/check", json={"space": text, "draws": 2})
        assert reply.status_code == 422, name
        assert "--data-root" in reply.json()["detail"]
    (root / "link.txt").unlink()
    text = SMALL.replace("data: pydoc", f"data: {{files: ['{root}/*.txt']}}")
    reply = one.send("POST", "/v1/spaces/check", json={"space": text, "draws": 2})
    assert reply.status_code == 200, reply.text


def test_a_study_is_submitted_once_for_each_key(one: Served) -> None:
    asked = {"space": SMALL, "overrides": ["name=keyed"], "priority": 3}
    headers = {"Idempotency-Key": "k1"}
    first = one.send("POST", "/v1/studies", json=asked, headers=headers)
    assert first.status_code == 201, first.text
    assert first.headers["location"] == "/v1/studies/keyed"
    body = first.json()
    assert (body["state"], body["user"], body["trials"]) == ("queued", "submitter", 2)
    again = one.send("POST", "/v1/studies", json=asked, headers=headers)
    assert again.status_code == 200
    assert again.json() == body
    other = one.send("POST", "/v1/studies", json=asked | {"priority": 4}, headers=headers)
    assert other.status_code == 409
    assert one.send("POST", "/v1/studies", json=asked).status_code == 409
    strange = one.send("POST", "/v1/studies", json=asked | {"overrides": ["name=../../x"]})
    assert strange.status_code == 422
    assert "study name" in strange.json()["detail"]


def test_only_the_user_and_admins_change_a_study(one: Served) -> None:
    put(one, "mine", "somebody")
    for verb in ("pause", "cancel", "resume"):
        refused = one.send("POST", f"/v1/studies/mine/{verb}")
        assert refused.status_code == 403
        assert "somebody" in refused.json()["detail"]
    assert one.send("POST", "/v1/studies/mine/extend", json={"trials": 9}).status_code == 403
    assert one.send("DELETE", "/v1/studies/mine").status_code == 403
    assert one.send("POST", "/v1/studies/mine/pause", "admin").json()["state"] == "paused"
    rows = one.send("GET", "/v1/audit?limit=2", "admin").json()["entries"]
    assert (rows[0]["user"], rows[0]["action"], rows[0]["study"]) == ("admin", "paused", "mine")


def test_verbs_change_the_state(one: Served) -> None:
    put(one, "verbs")
    base = "/v1/studies/verbs"
    assert one.send("POST", f"{base}/pause").json()["state"] == "paused"
    assert one.send("POST", f"{base}/resume").json()["state"] == "queued"
    assert one.send("POST", f"{base}/extend", json={"trials": 5}).json()["trials"] == 5
    assert one.send("POST", f"{base}/extend", json={"trials": 4}).status_code == 409
    assert one.send("POST", f"{base}/cancel").json()["state"] == "cancelled"
    assert one.send("POST", f"{base}/pause").status_code == 409
    early = one.send("POST", f"{base}/enqueue", json={"references": ["study:x"]})
    assert early.status_code == 409
    assert one.send("POST", "/v1/studies/made_up/pause").status_code == 409


def in_state(one: Served, name: str, state: submissions.State, runner: str | None) -> None:
    """Put a study that has rows of its own into a state."""
    store = one.service.store
    put(one, name)
    store.create_study(replace(made_up_views.view(0).study, name=name, reference_point={}))
    row = update(tables.submission).where(tables.submission.c.study == name)
    store.transact(lambda c: c.execute(row.values(state=state, runner=runner)))


def is_done(one: Served, name: str, action: submissions.Action) -> bool:
    """Ask for an action; say whether the server did it, or asked for the confirmation."""
    before = one.send("GET", f"/v1/studies/{name}").json()
    if action == "delete":
        return bool(one.send("DELETE", f"/v1/studies/{name}").status_code == 428)
    if action == "enqueue":  # the references are looked up after the state
        reply = one.send("POST", f"/v1/studies/{name}/enqueue", json={"references": []})
        assert reply.status_code in (409, 422)
        return bool(reply.status_code == 422)
    body = {"json": {"trials": before["trials"] + 1}} if action == "extend" else {}
    reply = one.send("POST", f"/v1/studies/{name}/{action}", **body)
    after = reply.json()
    changed = ("state", "trials")
    return reply.status_code == 200 and any(after[key] != before[key] for key in changed)


@pytest.mark.parametrize("runner", [None, "a server"])
@pytest.mark.parametrize("state", submissions.STATES)
def test_a_study_lists_what_the_server_does_and_no_more(
    one: Served, state: submissions.State, runner: str | None
) -> None:
    for action in get_args(submissions.Action):
        name = f"{state}-{'driven' if runner else 'free'}-{action}"
        in_state(one, name, state, runner)
        allowed = one.send("GET", f"/v1/studies/{name}").json()["actions"]
        assert is_done(one, name, action) == (action in allowed), (action, allowed)


def test_actions_are_those_of_the_user_who_asks(one: Served) -> None:
    def actions(name: str, who: str) -> Any:
        return one.send("GET", f"/v1/studies/{name}", who).json()["actions"]

    put(one, "asked")
    own = ["pause", "cancel", "extend", "delete"]
    assert actions("asked", "submitter") == actions("asked", "admin") == own
    stranger = one.token("somebody", "submitter")
    assert actions("asked", "viewer") == actions("asked", stranger) == []
    assert actions("made_up", "submitter") == []
    assert actions("made_up", "admin") == ["delete"]
    page = one.send("GET", "/studies/asked", "viewer").text
    assert page.count(" disabled>") >= 5
    page = one.send("GET", "/studies/asked").text
    assert '<button data-action="pause">' in page
    assert '<button data-action="resume" disabled>' in page


def test_a_study_is_deleted_only_when_it_is_confirmed(one: Served) -> None:
    store = one.service.store
    put(one, "gone")
    store.create_study(replace(made_up_views.view(0).study, name="gone", reference_point={}))
    weights = weights_path(store.runs, "gone", 0)
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x")
    first = one.send("DELETE", "/v1/studies/gone")
    assert first.status_code == 428
    confirm = first.json()["confirmation"]
    assert one.send("DELETE", "/v1/studies/gone?confirm=wrong").status_code == 428
    assert store.knows("gone")
    done = one.send("DELETE", f"/v1/studies/gone?confirm={confirm}")
    assert done.status_code == 200, done.text
    assert done.json() == {"deleted": "gone", "trials": 0}
    assert not store.knows("gone")
    assert not weights.parent.parent.exists()
    assert one.send("GET", "/v1/studies/gone").status_code == 404
    left = store.query(lambda c: study_events.after(c, "gone", 0))
    assert [event.kind for event in left] == ["deleted"]
    assert store.query(lambda c: audit.entries(c, before=None, limit=1))[0].action == "deleted"


def test_a_study_of_a_command_is_deleted_by_an_admin_with_all_its_rows(one: Served) -> None:
    assert one.send("DELETE", "/v1/studies/made_up").status_code == 403
    confirm = one.send("DELETE", "/v1/studies/made_up", "admin").json()["confirmation"]
    done = one.send("DELETE", f"/v1/studies/made_up?confirm={confirm}", "admin")
    assert done.json()["trials"] == 7
    store = one.service.store
    assert not store.holds_optuna_study("made_up")
    with store.engine.connect() as connection:
        for table in ("candidate", "evaluation", "value", "front", "hypervolume"):
            rows = f"SELECT count(*) FROM moenas_{table} WHERE study = 'made_up'"
            assert connection.exec_driver_sql(rows).scalar() == 0, table


def test_a_running_study_is_not_deleted(one: Served) -> None:
    put(one, "runs")
    from moenas.store import leases

    runner = one.service.runner.id
    one.service.store.transact(lambda c: submissions.claim_next(c, runner, leases.clock(c)))
    running = [s.study for s in one.service.store.query(lambda c: submissions.held(c, runner))]
    assert len(running) == 1
    refused = one.send("DELETE", f"/v1/studies/{running[0]}", "admin")
    assert refused.status_code == 409
    assert "cancel it" in refused.json()["detail"]


def test_bodies_of_other_shapes_are_problems(one: Served, tmp_path: Path) -> None:
    for body in ({}, {"space": 3}, {"space": SMALL, "extra": 1}, [], {"space": SMALL, "draws": 0}):
        reply = one.send("POST", "/v1/spaces/check", json=body)
        assert reply.status_code == 422
        assert reply.json()["errors"][0]["path"].startswith("body")
    reply = one.send("POST", "/v1/spaces/check", content=b"\xff\xfe{")
    assert reply.status_code == 422
