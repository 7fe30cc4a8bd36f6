"""`/docs` and the headers that every answer has."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.http.app import create_app
from server.http.documents import PATHS
from server.service.service import Service
from server.settings import Settings

Unloaded = Callable[..., TestClient]

KEY = "a-key-of-the-test-suite"


def client_of(**settings: Any) -> TestClient:
    app = create_app(Settings.model_validate(settings))
    return TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="module")
def locked() -> TestClient:
    """A client of an application with a key, which makes its schema once."""
    return client_of(api_keys=[KEY])


@pytest.fixture(scope="module")
def unlocked() -> TestClient:
    """A client of an application without keys, which makes its schema once."""
    return client_of()


def test_a_document_needs_no_key_and_has_a_head(locked: TestClient) -> None:
    for path in sorted(PATHS):
        answer, head = locked.get(path), locked.head(path)
        assert answer.status_code == head.status_code == 200, path
        assert head.headers["content-length"] == str(len(answer.content)), path
        assert head.content == b"", path


def test_the_api_s_page_takes_everything_from_this_server(locked: TestClient) -> None:
    page = locked.get("/docs").text
    taken = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert set(taken) - {"data:,"} <= PATHS
    assert "/openapi.json" in locked.get("/docs/start.js").text
    assert locked.get("/openapi.json").status_code == 200
    assert locked.get("/redoc", headers={"authorization": f"Bearer {KEY}"}).status_code == 404


def test_the_schema_says_which_routes_need_a_key(locked: TestClient, unlocked: TestClient) -> None:
    schema = locked.get("/openapi.json").json()
    scheme = {"type": "http", "scheme": "bearer"}
    assert schema["components"]["securitySchemes"] == {"key": scheme}
    assert schema["security"] == [{"key": []}]
    assert schema["paths"]["/livez"]["get"]["security"] == []
    assert "security" not in unlocked.get("/openapi.json").json()


def test_metrics_are_documented_as_the_text_that_they_are(unlocked: TestClient) -> None:
    answered = unlocked.get("/openapi.json").json()["paths"]["/metrics"]["get"]["responses"]["200"]
    (media,) = answered["content"]
    assert unlocked.get("/metrics").headers["content-type"].startswith(media)


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        *(("GET", path, {}) for path in ("/", "/docs", "/livez", "/readyz", "/v1/catalog")),
        ("GET", "/none", {}),
        ("GET", "/", {"host": "evil.example"}),
        ("POST", "/v1/generate", {}),
    ],
)
def test_no_answer_is_guessed_at_or_framed(
    unlocked: TestClient, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = unlocked.request(method, path, headers=headers)
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src ")
    assert "frame-ancestors 'none'" in policy
    assert "{" not in policy


@pytest.mark.parametrize("path", ["/", "/page/generate.js"])
def test_browsers_ask_for_the_page_whenever_it_is_opened(unlocked: TestClient, path: str) -> None:
    first = unlocked.get(path)
    assert first.headers["cache-control"] == "no-cache"
    kept = {"if-none-match": first.headers["etag"]}
    again = unlocked.get(path, headers=kept)
    assert (again.status_code, again.content) == (304, b"")
    told = ("etag", "cache-control", "content-security-policy")
    assert [again.headers[name] for name in told] == [first.headers[name] for name in told]


def test_a_page_that_is_kept_is_sent_again_with_another_policy(unlocked: TestClient) -> None:
    kept = {"if-none-match": unlocked.get("/").headers["etag"]}
    other = client_of(results={"base_url": "https://images.example.org"})
    answer = other.get("/", headers=kept)
    assert answer.status_code == 200
    assert "https://images.example.org" in answer.headers["content-security-policy"]


def test_an_unforeseen_error_is_no_exception(
    unloaded: Unloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Service) -> None:
        raise RuntimeError

    monkeypatch.setattr(Service, "models", fail)
    app: Any = unloaded().app
    quiet = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
    answer = quiet.get("/v1/catalog")
    assert answer.status_code == 500
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
