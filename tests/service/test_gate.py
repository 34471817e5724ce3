"""The gate: who reaches which route, from where, how often, and with how much."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from served import HOST, Served, served

from moenas.service import server
from moenas.service.gate import PUBLIC, RateLimit, required_role
from moenas.service.settings import MAX_BODY
from moenas.store import access_tokens
from moenas.store.access_tokens import ROLES

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("gate"), requests_per_s=1e6, burst=10**6) as server:
        yield server


def routes_of(each: Any) -> Iterator[Any]:
    """Every route of an application, and of the routers that it includes."""
    for route in each.routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from routes_of(included)
        else:
            yield route


def routes(served: Served) -> list[tuple[str, str]]:
    """Every method and path of the application, with values in place of parameters."""
    listed = []
    for route in routes_of(server.create_api(served.service)):
        filled = re.sub(r"\{trial[^}]*\}", "0", route.path)
        filled = re.sub(r"\{[^}]*\}", "x", filled)
        methods = getattr(route, "methods", None)
        listed += [(method, filled) for method in sorted(methods or {"GET"})]
    # The dashboard is an application of its own behind the same gate.
    others = [("GET", "/dashboard"), ("GET", "/api/studies"), ("PUT", "/api/studies/1/note")]
    return [*listed, *others]


def assert_problem(response: Any, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert {"type", "title", "status", "detail", "instance"} <= set(body)
    assert body["status"] == status


def test_the_routes_are_those_of_the_api(one: Served) -> None:
    paths = routes(one)
    assert len(paths) > 25
    assert ("DELETE", "/v1/studies/x") in paths
    assert ("GET", "/v1/studies/x/trials/0/export") in paths
    typed = 0
    for route in routes_of(server.create_api(one.service)):
        if isinstance(route, APIRoute) and route.include_in_schema:
            untyped = route.path == "/metrics" or route.path.endswith(("/events", "/export"))
            assert untyped or route.response_model is not None, route.path
            typed += not untyped
    assert typed > 18


def test_every_route_refuses_who_has_no_token(one: Served) -> None:
    for method, path in routes(one):
        if path in PUBLIC or path.startswith("/assets"):
            continue
        for who in (None, "moenas_0123456789abcdef_x", "", "nonsense"):
            one.service.runner.wake()
            gate = one.client.app
            gate._failures = RateLimit(1e6, 10**6)
            response = one.send(method, path, who)
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"].startswith("Bearer")
            if method != "HEAD":
                assert_problem(response, 401)


def test_every_route_refuses_a_role_that_may_do_less(one: Served) -> None:
    checked = 0
    for method, path in routes(one):
        needed = required_role(method, path)
        if needed is None:
            assert path in PUBLIC or path.startswith("/assets")
            continue
        for role in ROLES[: ROLES.index(needed)]:
            assert_problem(one.send(method, path, role), 403)
            checked += 1
    assert checked > 8


def test_who_may_change_something_is_no_viewer() -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert required_role(method, "/v1/studies/x/whatever") == "submitter"
    assert required_role("GET", "/v1/audit") == "admin"
    assert required_role("GET", "/v1/auditing") == "admin"


def test_every_route_refuses_another_host(one: Served) -> None:
    for method, path in routes(one):
        for host in ("evil.example", "127.0.0.1.evil.example:8321", "", "[::1", "evil@127.0.0.2"):
            response = one.send(method, path, "admin", headers={"Host": host})
            assert response.status_code == 421, (method, path, host)


def test_every_route_refuses_a_page_of_another_origin(one: Served) -> None:
    origins = ("https://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1:8321", "")
    for method, path in routes(one):
        for origin in origins:
            response = one.send(method, path, "admin", headers={"Origin": origin})
            assert response.status_code == 403, (method, path, origin)
        cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert one.send(method, path, "admin", headers=cross).status_code == 403, (method, path)


def test_every_route_refuses_a_wrong_method(one: Served) -> None:
    paths = routes(one)
    for path in sorted({path for _, path in paths}):
        allowed = {method for method, each in paths if each == path} | {"HEAD", "OPTIONS"}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - allowed:
            if path.startswith(("/dashboard", "/api", "/static", "/assets")):
                continue  # another application answers below these
            response = one.send(method, path, "admin")
            assert_problem(response, 405)
            assert response.headers["allow"], (method, path)


def test_the_own_origin_is_let_through(one: Served) -> None:
    response = one.send("GET", "/v1/studies", "viewer", headers={"Origin": HOST})
    assert response.status_code == 200


def test_an_unknown_path_is_a_problem(one: Served) -> None:
    assert_problem(one.send("GET", "/v1/nothing", "viewer"), 404)


def test_a_large_body_is_refused_whether_or_not_its_length_is_said(one: Served) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 2**16 + 2):
            yield b"x" * 2**16

    assert_problem(one.send("POST", "/v1/studies", content=b"x" * (MAX_BODY + 1)), 413)
    assert_problem(one.send("POST", "/v1/studies", content=pieces()), 413)
    almost = one.send("POST", "/v1/studies", content=b"x" * MAX_BODY)
    assert almost.status_code == 422


def test_a_token_ends_when_it_is_revoked_or_expires(one: Served) -> None:
    text, store = one.token("zoe", "viewer"), one.service.store
    assert one.send("GET", "/v1/studies", text).status_code == 200
    assert store.transact(lambda c: access_tokens.revoke(c, "zoe")) == 1
    assert one.send("GET", "/v1/studies", text).status_code == 401
    past = "2020-01-01T00:00:00.000+00:00"
    old = store.transact(lambda c: access_tokens.create(c, "old", "viewer", past))
    assert one.send("GET", "/v1/studies", old).status_code == 401


def test_a_link_logs_a_browser_in_once(one: Served) -> None:
    reply = one.send("POST", "/v1/login-links", "submitter")
    assert reply.status_code == 201
    path = reply.json()["path"]
    first = one.send("GET", path, None)
    assert first.status_code == 303
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    one.client.cookies.clear()
    assert one.send("GET", path, None).status_code == 403
    value = {"Cookie": cookie.partition(";")[0]}
    assert one.send("GET", "/v1/studies", None, headers=value).status_code == 200
    assert one.send("GET", "/v1/audit", None, headers=value).status_code == 403
    one.client.cookies.clear()
    # A change by a cookie needs the Origin, which no page of another site can forge.
    pause = ("POST", "/v1/studies/x/pause")
    assert one.send(*pause, None, headers=value).status_code == 403
    assert one.send(*pause, None, headers={**value, "Origin": HOST}).status_code == 404
    out = one.send("POST", "/logout", None, headers={**value, "Origin": HOST})
    assert out.status_code == 303
    one.client.cookies.clear()
    assert one.send("GET", "/v1/studies", None, headers=value).status_code == 401


def test_a_session_ends_with_its_token(one: Served) -> None:
    text = one.token("kim", "submitter")
    reply = one.send("POST", "/login", None, data={"token": text}, headers={"Origin": HOST})
    assert reply.status_code == 303
    value = {"Cookie": reply.headers["set-cookie"].partition(";")[0]}
    one.client.cookies.clear()
    assert one.send("GET", "/v1/studies", None, headers=value).status_code == 200
    one.client.cookies.clear()
    one.service.store.transact(lambda c: access_tokens.revoke(c, "kim"))
    assert one.send("GET", "/v1/studies", None, headers=value).status_code == 401
    wrong = one.send("POST", "/login", None, data={"token": text}, headers={"Origin": HOST})
    assert wrong.status_code == 403


def test_answers_say_that_nothing_may_be_framed_or_kept(one: Served) -> None:
    headers = one.send("GET", "/v1/studies").headers
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"


def test_a_rate_is_kept_per_key() -> None:
    limit = RateLimit(per_s=1000.0, burst=3)
    assert [limit.wait("a") for _ in range(3)] == [0.0, 0.0, 0.0]
    assert 0 < limit.wait("a") <= 0.001
    assert limit.wait("b") == 0.0
    time.sleep(0.005)
    assert limit.wait("a") == 0.0


def test_too_many_requests_are_told_when_to_come_back(tmp_path: Path) -> None:
    with served(tmp_path, requests_per_s=0.001, burst=2) as one:
        assert one.send("GET", "/v1/studies", "viewer").status_code == 200
        assert one.send("GET", "/v1/studies", "viewer").status_code == 200
        refused = one.send("GET", "/v1/studies", "viewer")
        assert_problem(refused, 429)
        assert int(refused.headers["retry-after"]) > 0
        assert one.send("GET", "/v1/studies", "admin").status_code == 200
        codes = {one.send("GET", "/v1/studies", "guess").status_code for _ in range(30)}
        assert codes == {401, 429}


def test_without_auth_only_pages_of_the_own_origin_are_let_in(tmp_path: Path) -> None:
    with served(tmp_path, no_auth=True) as one:
        assert one.send("GET", "/v1/studies", None).status_code == 200
        assert one.send("GET", "/v1/audit", None).status_code == 200
        evil = {"Origin": "https://evil.example"}
        assert one.send("POST", "/v1/studies/x/pause", None, headers=evil).status_code == 403
        rebound = {"Host": "evil.example"}
        assert one.send("GET", "/v1/studies", None, headers=rebound).status_code == 421
