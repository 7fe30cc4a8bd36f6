"""Whatever is sent, the answer is a sentence and never a crash."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from server.http.app import create_app
from server.requests.reading import SAME, SCALES
from server.requests.schema import CHOICES, GenerateRequest
from server.settings import Settings

CLIENT = TestClient(create_app(Settings()), base_url="http://127.0.0.1:8000")

NAMES = sorted({name for members in CHOICES.values() for name in members})
WORDS = sorted(
    {"name", "policy", "scale", "eta", "order"} | set(GenerateRequest.model_fields) | set(NAMES)
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(alphabet=st.characters(codec=None), max_size=20)
    | st.sampled_from(WORDS)
)
KEYS = st.sampled_from(WORDS) | st.text(alphabet=st.characters(codec=None), max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries({"prompt": st.just("x") | VALUES}) | st.dictionaries(KEYS, VALUES)


def assert_answered(content: bytes, content_type: str = "application/json") -> None:
    headers = {"content-type": content_type}
    answer = CLIENT.post("/v1/generate", content=content, headers=headers)
    error = answer.json()["error"]
    assert answer.status_code in (400, 406, 413, 415, 422, 503), answer.text
    # 503 would mean that the request was valid, since this application has no engine.
    assert answer.status_code != 503 or error["code"] == "not_ready"
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(BODIES)
def test_any_json_is_answered(body: dict[str, Any]) -> None:
    assert_answered(json.dumps(body).encode())


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted({*GenerateRequest.model_fields, *SAME, *SCALES, "size"})), VALUES)
def test_any_value_of_any_field_is_answered(field: str, value: Any) -> None:
    assert_answered(json.dumps({"prompt": "x"} | {field: value}).encode())


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["sampler", "spacing", "guidance"]), st.data())
def test_any_parameters_of_any_choice_are_answered(field: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CHOICES[field])))
    parameters = sorted({*CHOICES[field][name].model_fields, "policy"} - {"name"})
    drawn = data.draw(st.dictionaries(st.sampled_from(parameters), VALUES, max_size=4))
    assert_answered(json.dumps({"prompt": "x", field: {"name": name} | drawn}).encode())


@settings(max_examples=100)
@given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "", "a/b;c"]))
def test_any_bytes_are_answered(content: bytes, content_type: str) -> None:
    assert_answered(content, content_type)


@pytest.mark.parametrize("depth", [100, 5_000, 200_000])
def test_deep_nesting_is_answered(depth: int) -> None:
    assert_answered(b'{"prompt": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}")
    assert_answered(b'{"prompt": "x", "guidance": ' + b"[" * depth + b"]" * depth + b"}")
