"""HEAD, as load balancers and monitors send it, to a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx2
import pytest
from fastapi.routing import iter_route_contexts

from server.http.app import create_app
from server.settings import Settings
from tests.server.http.small_server import PATIENCE_S, SmallServer, small_server

CHANGING = {"date", "x-request-id", "transfer-encoding"}
MEASURED = {"/metrics", "/sdapi/v1/memory"}
"""Paths whose bodies, and so their lengths, change between two requests."""

KEY = "correct horse battery staple"


def paths() -> list[str]:
    """Paths of all routes that answer GET."""
    routes = iter_route_contexts(create_app(Settings()).routes)
    found = {route.path or "" for route in routes if "GET" in (route.methods or ())}
    assert found > {"/", "/livez", "/metrics", "/v1/models", "/sdapi/v1/options"}
    return sorted(re.sub(r"\{[\w:]+\}", "abc", path) for path in found)


@pytest.fixture(scope="module")
def server() -> Iterator[SmallServer]:
    with small_server(api_keys=[KEY], allowed_hosts=["weft.example"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: SmallServer) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {KEY}", "host": "weft.example"}
    url = f"http://127.0.0.1:{server.port}"
    with httpx2.Client(base_url=url, timeout=PATIENCE_S, headers=headers) as made:
        yield made


def test_head_is_get_without_the_body_on_every_route(client: httpx2.Client) -> None:
    wrong: list[str] = []
    for path in paths():
        with client.stream("GET", path) as got:
            pass
        head = client.head(path)
        if head.content or told(path, head) != told(path, got):
            wrong.append(path)
    assert wrong == []


def told(path: str, answer: httpx2.Response) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer, without headers that differ between any two requests."""
    changing = CHANGING | ({"content-length"} if path in MEASURED else set())
    headers = {name: value for name, value in answer.headers.items() if name not in changing}
    return answer.status_code, headers


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_load_balancer_may_probe_without_host_and_key(server: SmallServer, path: str) -> None:
    """HAProxy's `http-check send meth HEAD` sends this by default."""
    with server.connect() as client:
        client.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.endswith(b"\r\n\r\n")


def test_head_of_a_stream_of_events_ends_it(server: SmallServer, client: httpx2.Client) -> None:
    head = client.head("/v1/rows")
    assert (head.status_code, head.headers["content-type"].partition(";")[0]) == (
        200,
        "text/event-stream",
    )
    server.wait(lambda: server.engine.row_watch.watchers == 0)


def test_head_of_a_route_that_takes_only_post_is_refused(client: httpx2.Client) -> None:
    refused = client.head("/v1/generate")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
