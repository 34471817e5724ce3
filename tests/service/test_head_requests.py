"""HEAD requests: status and headers of GET, no body, and no work that GET would go on with."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import made_up_views
import pytest
import stored_studies
from served import Served, listening, served

from moenas.service.sessions import Identity

VIEW = made_up_views.view(5, 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("head")
    stored_studies.shelve(folder, VIEW)
    with served(folder, requests_per_s=1e6, burst=10**6) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/healthz", 200),
        ("/readyz", 200),
        ("/v1/studies", 200),
        ("/v1/studies/made_up", 200),
        ("/v1/studies/made_up/front?format=csv", 200),
        ("/v1/studies/made_up/trials/0", 200),
        ("/v1/openapi.json", 200),
        ("/", 200),
        ("/studies/made_up", 200),
        ("/v1/studies/nothing", 404),
        ("/v1/nothing", 404),
    ],
)
def test_head_is_get_without_a_body(one: Served, path: str, status: int) -> None:
    get, head = one.send("GET", path), one.send("HEAD", path)
    assert (get.status_code, head.status_code) == (status, status)
    assert (len(get.content) > 0, head.content) == (True, b"")
    assert dict(head.headers) == dict(get.headers)


def test_head_of_a_path_without_get_names_the_methods(one: Served) -> None:
    refused = one.send("HEAD", "/v1/studies/made_up/pause")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert one.send("PUT", "/v1/studies").headers["allow"] == "GET, HEAD, POST"


def test_head_starts_no_export(one: Served) -> None:
    refused = one.send("HEAD", "/v1/studies/made_up/trials/0/export")
    assert (refused.status_code, refused.content) == (405, b"")


def test_head_uses_up_no_link(one: Served) -> None:
    link = one.service.sessions.new_link(Identity("local", "admin", None))
    assert one.send("HEAD", link, None).status_code == 405
    assert one.send("GET", link, None).status_code == 303


def test_a_stream_ends_and_its_connection_serves_the_next_request(one: Served) -> None:
    headers = {"Authorization": f"Bearer {one.tokens['viewer']}"}
    with (
        listening(one.service) as address,
        httpx.Client(base_url=address, headers=headers, timeout=10) as http,
    ):
        for _ in range(3):
            head = http.head("/v1/studies/made_up/events")
            assert head.status_code == 200
            assert head.headers["content-type"].startswith("text/event-stream")
            assert http.get("/v1/studies").json()["studies"]
