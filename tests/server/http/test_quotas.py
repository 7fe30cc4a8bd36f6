"""How much of the server an API key may use, checked over a socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.engine.client import Client
from server.http.body import SMALL_BYTES
from tests.server.http.small_server import SmallServer, answer_of, send, small_server

FEW, MANY = "a-key-that-may-have-few-images", "a-key-that-may-have-many-images"
REQUEST = {"prompt": "x", "steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def server() -> Iterator[SmallServer]:
    few = {"key": FEW, "name": "few", "images": 2, "device_s": 20}
    with small_server(api_keys=(few, {"key": MANY, "unload": True})) as made:
        yield made


@pytest.fixture
def few(server: SmallServer) -> Client:
    return server.app.state.settings.api_keys[0].client


def post(server: SmallServer, key: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    status, body = server.post(REQUEST | fields, authorization=f"Bearer {key}")
    return status, body.get("error", body)


def metrics(server: SmallServer) -> str:
    with server.connect() as client:
        client.sendall(server.head("GET", 0, path="/metrics", authorization=f"Bearer {MANY}"))
        received = b""
        while chunk := client.recv(65536):
            received += chunk
    return received.decode()


def test_more_images_than_the_key_may_ever_have_are_refused_for_good(server: SmallServer) -> None:
    status, error = post(server, FEW, n=3)
    assert (status, error["param"]) == (422, "n")
    assert error["message"] == "n is 3; at most 2 images of this key may wait or run at once."
    assert post(server, MANY, n=3)[0] == 200


def test_of_several_keys_only_those_with_the_right_unload_models(server: SmallServer) -> None:
    answers = [
        server.post({}, path="/sdapi/v1/unload-checkpoint", authorization=f"Bearer {key}")
        for key in (FEW, MANY)
    ]
    assert [status for status, _ in answers] == [403, 503]
    sentences = [body["errors"] for _, body in answers]
    assert sentences[0].startswith("This key may not unload models, which other keys use; ")
    assert sentences[1] == "No models are loaded on demand here."


def test_more_work_than_the_key_may_ever_have_is_refused_for_good(server: SmallServer) -> None:
    status, error = post(server, FEW, n=2, steps=200, width=1024, height=1024)
    assert (status, error["param"]) == (422, "n")
    assert "s of device time; at most 20 s of this key may wait or run" in error["message"]


def test_a_key_whose_quota_is_used_up_waits_and_others_do_not(
    server: SmallServer, few: Client
) -> None:
    with server.engine.reserve(2, client=few):
        status, error = post(server, FEW)
        assert (status, error["code"]) == (429, "overloaded")
        assert "has 2 images waiting or running; at most 2 are allowed" in error["message"]
        assert post(server, MANY)[0] == 200
    assert post(server, FEW)[0] == 200


def test_a_large_body_is_refused_before_it_is_read_if_its_key_has_no_room(
    server: SmallServer, few: Client
) -> None:
    with server.engine.reserve(2, client=few), server.connect() as client:
        length = SMALL_BYTES + 1
        client.sendall(server.head("POST", length, authorization=f"Bearer {FEW}"))
        assert answer_of(client)[0] == 429
        with server.connect() as other:
            other.sendall(server.head("POST", length, authorization=f"Bearer {MANY}"))
            send(other, b" " * length)
            assert answer_of(other)[0] == 400


def test_every_face_charges_the_key_and_the_metrics_name_it(server: SmallServer) -> None:
    faces = {
        "/v1/generate": REQUEST,
        "/v1/images/generations": {"prompt": "x", "size": "32x32"},
        "/sdapi/v1/txt2img": REQUEST,
    }
    for path, content in faces.items():
        before = server.engine.spent()
        assert server.post(content, path=path, authorization=f"Bearer {FEW}")[0] == 200
        after = server.engine.spent()
        assert [one.name for one in after if after[one] > before.get(one, 0)] == ["few"], path
    text = metrics(server)
    assert 'weft_device_seconds_total{key="few"}' in text
    digests = [key.digest.hex() for key in server.app.state.settings.api_keys]
    assert not any(secret[:8] in text for secret in (FEW, MANY, *digests))
