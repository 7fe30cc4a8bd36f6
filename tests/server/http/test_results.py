"""Images that are returned as URLs, fetched from a running server."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from openai.types import ImagesResponse
from starlette.testclient import TestClient

from server.http.app import create_app
from server.settings import Settings
from tests.server.conftest import Running
from tests.server.http.small_server import SmallServer, small_server

KEY = "correct horse battery staple"
KEYED = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[SmallServer]:
    with small_server(api_keys=[KEY]) as server:
        yield server


def test_a_url_leads_to_the_image(
    generate: Callable[..., httpx2.Response], client: httpx2.Client
) -> None:
    embedded = generate().json()["images"][0]
    answer = generate(response_format="url").json()
    (image,) = answer["images"]
    assert image["b64_json"] is None
    assert 3500 < image["expires_at"] - time.time() <= 3601
    fetched = client.get(image["url"])
    assert fetched.content == base64.b64decode(embedded["b64_json"])
    assert fetched.headers["content-type"] == "image/png"
    assert fetched.headers["x-content-type-options"] == "nosniff"
    assert fetched.headers["cache-control"].startswith("private, max-age=3")
    assert "response_format" not in answer["settings"]
    asked = client.head(image["url"])
    assert asked.status_code == 200
    assert asked.content == b""
    assert int(asked.headers["content-length"]) == len(fetched.content)
    guessed = client.get(image["url"][:-8] + "AAAA.png")
    assert guessed.status_code == 404
    assert guessed.json()["error"]["code"] == "result_not_found"


def test_the_last_event_of_a_stream_has_urls(client: httpx2.Client) -> None:
    body = {"prompt": "x", "steps": 1, "n": 2, "stream": True, "response_format": "url"}
    text = client.post("/v1/generate", json=body | {"output_format": "webp"}).text
    last = json.loads(text.split("event: completed\ndata: ")[1].partition("\n")[0])
    for image in last["images"]:
        assert client.get(image["url"]).headers["content-type"] == "image/webp"


def test_openai_s_client_gets_urls(running: Running, client: httpx2.Client) -> None:
    with OpenAI(base_url=f"{running.url}/v1", api_key="any") as openai:
        made = openai.images.generate(
            prompt="a red circle", n=2, response_format="url", extra_body={"steps": 1}
        )
    assert isinstance(made, ImagesResponse)
    assert made.data is not None
    for image in made.data:
        assert image.b64_json is None
        assert image.url is not None
        assert client.get(image.url).content.startswith(b"\x89PNG")


def test_a_url_works_without_a_key_and_asking_for_one_does_not(keyed: SmallServer) -> None:
    with httpx2.Client(base_url=f"http://127.0.0.1:{keyed.port}") as client:
        body: dict[str, Any] = {"prompt": "x", "steps": 1, "response_format": "url"}
        assert client.post("/v1/generate", json=body).status_code == 401
        url = client.post("/v1/generate", json=body, headers=KEYED).json()["images"][0]["url"]
        assert client.get(url).status_code == 200
        assert client.get(url, headers={"host": "evil.example"}).status_code == 403


def test_the_operator_says_what_urls_begin_with(tmp_path: Path) -> None:
    results = {"base_url": "https://images.example/", "place": str(tmp_path)}
    with small_server(results=results) as server:
        status, answer = server.post({"prompt": "x", "steps": 1, "response_format": "url"})
        assert status == 200
        (file,) = tmp_path.iterdir()
        assert answer["images"][0]["url"] == f"https://images.example/v1/results/{file.name}"


@pytest.mark.parametrize(
    ("path", "body", "accept", "words"),
    [
        ("/v1/generate", {}, "image/png", "is the image itself"),
        ("/v1/images/generations", {"stream": True}, "*/*", "set stream to false"),
    ],
)
def test_where_there_is_no_url_it_is_said(
    client: httpx2.Client, path: str, body: dict[str, Any], accept: str, words: str
) -> None:
    asked = {"prompt": "x", "response_format": "url"} | body
    answer = client.post(path, json=asked, headers={"accept": accept})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == "response_format"
    assert words in answer.json()["error"]["message"]


def test_a_server_whose_place_cannot_be_used_says_so(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings.model_validate({"results": {"place": __file__}}))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert client.get("/livez").status_code == 503
    assert "cannot be kept for URLs" in caplog.text
