"""Multipart forms, read as if they were JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from server.errors import InvalidRequest, MalformedBody, TooLarge, WeftError
from server.http.forms import MAX_PARTS, FormPart, fields_of, parts_of
from tests.server.http.small_server import small_server


def texts(*pairs: tuple[str, str]) -> list[FormPart]:
    return [FormPart(name, value.encode(), is_file=False) for name, value in pairs]


def form(fields: Mapping[str, Any], files: Any) -> tuple[bytes, bytes]:
    """A body and its boundary, as httpx writes them."""
    request = httpx2.Request("POST", "http://x/", data=fields, files=files)
    boundary = request.headers["content-type"].partition("boundary=")[2]
    return request.read(), boundary.encode()


def test_a_form_has_the_parts_that_a_client_sent() -> None:
    picture = b"\x89PNG\r\n--\r\n\r\n\x00"
    sent = form({"prompt": "a é", "n": ["1", "2"]}, {"image": ("a.png", picture, "image/png")})
    assert parts_of(*sent) == [
        FormPart("prompt", "a é".encode(), is_file=False),
        FormPart("n", b"1", is_file=False),
        FormPart("n", b"2", is_file=False),
        FormPart("image", picture, is_file=True),
    ]


def test_texts_become_the_values_that_json_has() -> None:
    parts = texts(
        ("prompt", "7"),
        ("n", "2"),
        ("strength", "0.5"),
        ("stream", "true"),
        ("seed", "null"),
        ("sampler", "unipc"),
        ("guidance[name]", "cfg"),
        ("guidance[policy][name]", "reuse"),
        ("guidance[scale]", "3"),
        ("adapters[]", "pastel"),
        ("adapters[]", '{"name": "ink", "weight": 0.5}'),
    )
    assert fields_of(parts) == {
        "prompt": "7",
        "n": 2,
        "strength": 0.5,
        "stream": True,
        "seed": None,
        "sampler": "unipc",
        "guidance": {"name": "cfg", "policy": {"name": "reuse"}, "scale": 3},
        "adapters": ["pastel", {"name": "ink", "weight": 0.5}],
    }


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (texts(("a", "1"), ("a[b]", "2")), "a is both a value and an object"),
        (texts(("a[][b][]", "2")), "a\\[\\]\\[b\\]\\[\\] is a list within a list; send a as JSON"),
        (
            texts(("a[][b]", "1"), ("a[][b]", "2"), ("a[][c]", "3")),
            r"number them, as in a\[0\]\[b\]",
        ),
        (texts(("a" + "[b]" * 20, "1")), "nested deeper"),
        ([FormPart("prompt", b"\xff", is_file=False)], "prompt is not UTF-8"),
    ],
)
def test_fields_that_say_two_things_are_refused(parts: list[FormPart], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        fields_of(parts)


def test_objects_of_a_list_have_the_fields_that_openai_s_clients_send_for_them() -> None:
    """Fields of one name are sent together, after entries that are not objects."""
    parts = texts(
        ("adapters[]", "pastel"),
        ("adapters[][name]", "ink"),
        ("adapters[][name]", "oil"),
        ("adapters[][weight]", "0.5"),
        ("adapters[][weight]", "2"),
        ("guidance[perturbed][][name]", "pag"),
    )
    assert fields_of(parts) == {
        "adapters": ["pastel", {"name": "ink", "weight": 0.5}, {"name": "oil", "weight": 2}],
        "guidance": {"perturbed": [{"name": "pag"}]},
    }


def test_json_in_a_field_may_be_as_long_as_its_pictures() -> None:
    controls = [{"name": "depth", "image": "A" * 10**6}]
    assert fields_of(texts(("controls", json.dumps(controls)))) == {"controls": controls}
    began = time.process_time()
    with pytest.raises(TooLarge, match="more than a request needs"):
        fields_of(texts(("controls", json.dumps([{}] * 10**6))))
    assert time.process_time() - began < 1


HEAD = b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n'
BROKEN = {
    "no boundary": (b"--b--", b""),
    "nothing": (b"", b"b"),
    "no end": (HEAD + b"1", b"b"),
    "no name": (b"--b\r\ncontent-type: text/plain\r\n\r\n1\r\n--b--", b"b"),
    "no head": (b"--b\r\n1\r\n--b--", b"b"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_form_is_refused(name: str) -> None:
    with pytest.raises(MalformedBody):
        parts_of(*BROKEN[name])


@pytest.mark.parametrize(
    "filling", [b"\r\n--b\r\n", b"\r\n--", b"\r", b"\r\n--b\r\n" + HEAD[5:] + b"1"]
)
def test_no_content_makes_a_form_slow(filling: bytes) -> None:
    body = HEAD + filling * (16 * 2**20 // len(filling)) + b"\r\n--b--"
    began = time.process_time()
    with suppress(WeftError):
        assert len(parts_of(body, b"b")) <= MAX_PARTS
    assert time.process_time() - began < 1


def test_a_form_is_bounded_and_its_uploads_are_counted() -> None:
    with small_server(limits={"body_bytes": 2**20}) as server:
        url = f"http://127.0.0.1:{server.port}/v1/images/edits"
        bodies = server.app.state.bodies
        large = {"image": ("a.png", bytes(2**20), "image/png")}
        assert httpx2.post(url, data={"prompt": "x"}, files=large).status_code == 413
        broken = {"image": ("a.png", bytes(2**19), "image/png")}
        answer = httpx2.post(url, data={"prompt": "x"}, files=broken)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "image"
        assert bodies.held == 0
        misplaced = httpx2.post(url, files={"prompt": ("a.txt", b"a", "text/plain")})
        assert "prompt is a file" in misplaced.json()["error"]["message"]
