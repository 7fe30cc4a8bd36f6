import re
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.testclient import TestClient

from server.http.app import create_app
from server.http.documents import PATHS
from server.http.errors import AUTOMATIC1111, CHALLENGE
from server.http.gate import PROBES, PUBLIC, RESULTS
from server.service.service import Service
from server.settings import Settings
from tests.covering import EVERY_CELL

Unloaded = Callable[..., TestClient]

KEY = "correct horse battery staple"
OTHER = "0123456789abcdef"


def routes() -> list[tuple[str, str]]:
    """Every method and path of the application, documentation included."""
    served = {
        (method, with_parameters(route.path or ""))
        for route in iter_route_contexts(create_app(Settings()).routes)
        if isinstance(route.original_route, APIRoute)
        for method in route.methods or ()
    }
    # All documents are one kind of route, and test_documents requests each of them.
    alike = set[str]() if EVERY_CELL else PATHS - {"/", "/docs"}
    found = {*served, ("GET", "/openapi.json")}
    return sorted((method, path) for method, path in found if path not in alike)


def with_parameters(path: str) -> str:
    return re.sub(r"\{[\w:]+\}", "abc", path)


ROUTES = routes()


@cache
def client_of(*keys: str) -> TestClient:
    """A client of an application that is made once for all routes."""
    settings = Settings.model_validate({"api_keys": keys})
    return TestClient(create_app(settings), base_url="http://127.0.0.1:8000")


def call(client: TestClient, method: str, path: str, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request(method, path, headers=named, json={} if method == "POST" else None)


def test_the_list_of_routes_has_all_that_the_schema_has() -> None:
    paths = client_of().get("/openapi.json").json()["paths"]
    documented = {(method.upper(), path) for path, item in paths.items() for method in item}
    assert ("POST", "/v1/generate") in documented
    assert {(method, with_parameters(path)) for method, path in documented} <= {*ROUTES}


def names_the_field(path: str, body: dict[str, Any], field: str) -> bool:
    if path.startswith(AUTOMATIC1111):
        return f"{field} " in body["detail"].lower()
    return body["error"]["param"] == field


FOREIGN_HOSTS = [
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "127.0.0.1@evil.example",
    "evil.example#127.0.0.1",
    "",
    "127.0.0.1:port",
    "[::1",
    "0.0.0.0",  # noqa: S104
    "127.0.0.2",
]
FOREIGN_ORIGINS = [
    "null",
    "http://evil.example",
    "https://evil.example:8000",
    "http://127.0.0.1:9999",
    "http://127.0.0.1",
    "http://127.0.0.1:8000.evil.example",
    "http://localhost.evil.example:8000",
    "http://user@127.0.0.1:8000",
    "http://127.0.0.1:8000/",
    "http://127.0.0.1:99999",
    "file://",
    "",
]


FOREIGN = [("host", host) for host in FOREIGN_HOSTS] + [
    ("origin", origin) for origin in FOREIGN_ORIGINS
]


def test_a_foreign_host_or_page_is_refused() -> None:
    routes = ("POST", "/v1/generate"), ("GET", "/")
    for (header, value), (method, path) in product(FOREIGN, routes):
        answer = call(client_of(), method, path, **{header: value})
        assert answer.status_code == 403, (header, value)
        assert names_the_field(path, answer.json(), header), (header, value)


def test_every_route_but_the_probes_refuses_them() -> None:
    foreign = FOREIGN if EVERY_CELL else (FOREIGN[0], FOREIGN[-2])
    for (method, path), (header, value) in product(ROUTES, foreign):
        answer = call(client_of(), method, path, **{header: value})
        assert (answer.status_code == 403) == (path not in PROBES), (method, path, value)
        if path not in PROBES and method != "HEAD":
            assert names_the_field(path, answer.json(), header), (method, path)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
def test_loopback_names_are_allowed(unloaded: Unloaded, host: str) -> None:
    assert call(unloaded(), "GET", "/v1/catalog", host=host).status_code == 200


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "http://localhost:8000"])
def test_the_server_s_own_page_is_allowed(unloaded: Unloaded, origin: str) -> None:
    assert call(unloaded(), "GET", "/v1/catalog", origin=origin).status_code == 200


def test_two_hosts_are_refused(unloaded: Unloaded) -> None:
    headers = [("host", "127.0.0.1"), ("host", "evil.example")]
    assert unloaded().get("/v1/catalog", headers=headers).status_code == 403


def test_named_hosts_and_origins_are_allowed(unloaded: Unloaded) -> None:
    page = "https://app.example"
    client = unloaded(allowed_hosts="weft.example", allowed_origins=page)
    answer = call(client, "GET", "/v1/catalog", host="weft.example", origin=page)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == page
    assert call(client, "GET", "/v1/catalog", host="localhost").status_code == 403


def test_a_preflight_needs_no_key_and_a_call_does(unloaded: Unloaded) -> None:
    page = "https://app.example"
    client = unloaded(api_keys=[KEY], allowed_origins=page)
    headers = {
        "origin": page,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    assert client.options("/v1/generate", headers=headers).status_code == 200
    assert call(client, "GET", "/v1/catalog", origin=page).status_code == 401


def test_pages_that_are_allowed_may_send_whatever_headers_their_client_has(
    unloaded: Unloaded,
) -> None:
    """OpenAI's SDK (Node 6.49.0) asks for these in a browser, and fails if one is not allowed."""
    page = "https://app.example"
    asked = (
        "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
        "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
        "x-stainless-runtime-version"
    )
    headers = {"access-control-request-method": "POST", "access-control-request-headers": asked}
    client = unloaded(allowed_origins=page)
    answer = client.options("/v1/images/generations", headers=headers | {"origin": page})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-headers"] == asked
    foreign = client.options(
        "/v1/images/generations", headers=headers | {"origin": "https://other.example"}
    )
    assert "access-control-allow-origin" not in foreign.headers


WRONG_KEYS = ("Bearer wrong", "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x")


@pytest.mark.parametrize("wrong", WRONG_KEYS)
def test_a_wrong_key_is_refused(wrong: str) -> None:
    for method, path in (("POST", "/v1/generate"), ("GET", "/v1/catalog")):
        answer = call(client_of(KEY, OTHER), method, path, authorization=wrong)
        assert answer.status_code == 401


def test_every_route_needs_a_key_where_there_are_keys() -> None:
    wrong = WRONG_KEYS if EVERY_CELL else WRONG_KEYS[:1]
    sent = [{}, *({"authorization": key} for key in wrong)]
    for (method, path), headers in product(ROUTES, sent):
        answer = call(client_of(KEY, OTHER), method, path, **headers)
        spared = path in PUBLIC or path.startswith(RESULTS)
        assert (answer.status_code == 401) != spared, (method, path, headers)
        if answer.status_code != 401:
            continue
        automatic = path.startswith(AUTOMATIC1111)
        challenge = CHALLENGE if automatic else "Bearer"
        assert answer.headers["www-authenticate"] == challenge, path
        if method != "HEAD":
            error = answer.json()["error"]
            assert (error if automatic else error["code"]) == "invalid_api_key", path


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_any_of_the_keys_opens(unloaded: Unloaded, key: str) -> None:
    client = unloaded(api_keys=[KEY, OTHER])
    assert call(client, "GET", "/v1/catalog", authorization=f"Bearer {key}").status_code == 200
    assert call(client, "GET", "/v1/catalog", authorization=f"bearer {key}").status_code == 200


def test_clients_of_automatic1111_send_a_key_as_a_password(unloaded: Unloaded) -> None:
    client = unloaded(api_keys=[KEY])
    path = "/sdapi/v1/samplers"
    assert client.get(path, auth=("anybody", KEY)).status_code == 200
    assert call(client, "GET", path, authorization=f"Bearer {KEY}").status_code == 200
    for refused in (("anybody", "wrong"), (KEY, ""), ("", "")):
        assert client.get(path, auth=refused).status_code == 401
    assert client.get("/v1/catalog", auth=("anybody", KEY)).status_code == 401
    assert call(unloaded(), "GET", path, authorization="Basic ").status_code == 200


def test_a_body_announced_as_too_large_is_refused_unread(unloaded: Unloaded) -> None:
    client = unloaded(limits={"body_bytes": 2000})
    answer = client.post("/v1/generate", json={"prompt": "x" * 2000})
    assert answer.status_code == 413
    message = "The body is too large; at most 2000 bytes are allowed."
    assert answer.json()["error"]["message"] == message


def test_a_body_that_grows_too_large_is_refused(unloaded: Unloaded) -> None:
    client = unloaded(limits={"body_bytes": 2000})
    chunks = (b'{"prompt": "' if i == 0 else b"x" * 500 for i in range(8))
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/generate", content=chunks, headers=headers)
    assert answer.status_code == 413
    message = "The body is too large; at most 2000 bytes are allowed."
    assert answer.json()["error"]["message"] == message


@pytest.mark.parametrize("chosen", ["a", "job-7.b_c", "0" * 64])
def test_a_valid_request_id_is_kept(unloaded: Unloaded, chosen: str) -> None:
    answer = call(unloaded(), "GET", "/livez", x_request_id=chosen)
    assert answer.headers["x-request-id"] == chosen


@pytest.mark.parametrize("chosen", ["", "a b", "../x", "0" * 65, "-a", 'x"y'])
def test_an_invalid_request_id_is_replaced(unloaded: Unloaded, chosen: str) -> None:
    made = call(unloaded(), "GET", "/livez", x_request_id=chosen).headers["x-request-id"]
    assert made.startswith("gen-")


def test_every_answer_has_a_request_id() -> None:
    for method, path in (*ROUTES, ("GET", "/none"), ("PUT", "/v1/generate")):
        for headers in ({}, {"host": "evil.example"}):
            assert call(client_of(), method, path, **headers).headers.get("x-request-id"), path


def test_an_unforeseen_error_tells_nothing_but_its_id(
    unloaded: Unloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Service) -> None:
        raise RuntimeError("a secret prompt")

    monkeypatch.setattr(Service, "models", fail)
    client = unloaded()
    quiet = TestClient(client.app, base_url=str(client.base_url), raise_server_exceptions=False)
    answer = quiet.get("/v1/catalog", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
