"""Every route conforms to its schema, however it is called; `make contract` runs this.

Schemathesis draws the cases from the application's own OpenAPI document: some that the schema
allows, some that it does not, and some of the first kind that are made plausible enough to give
images.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, cast

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode

from server.http.app import create_app
from server.http.errors import AUTOMATIC1111
from server.settings import Settings
from tests.server.http.small_server import small_server

EXAMPLES: Final = int(os.environ["CONTRACT_EXAMPLES"])
"""Cases of each kind, for each route that takes input."""

PATIENCE_S: Final = 60
LIMITS: Final = {"steps": 4, "images": 2, "pixels": 64 * 64}


def _operations() -> dict[str, Any]:
    document = create_app(Settings.model_validate({"limits": LIMITS})).openapi()
    schema = schemathesis.openapi.from_dict(document)
    found: Any = (cast("Any", result).ok() for result in schema.get_all_operations())
    return {operation.label: operation for operation in found}


OPERATIONS: Final = _operations()
VARIED: Final = [
    label
    for label, operation in OPERATIONS.items()
    if operation.body or operation.query or operation.path_parameters
]

SERVED: Counter[int] = Counter()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    # Each case makes a job, and all of them may wait.
    jobs = {"folder": tmp_path_factory.mktemp("jobs"), "waiting": 10**6}
    with small_server(limits=LIMITS, jobs=jobs) as server:
        url = f"http://127.0.0.1:{server.port}"
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as made:
            yield made
    sys.stderr.write(f"{sum(SERVED.values())} calls: {dict(sorted(SERVED.items()))}\n")
    # Of thousands of cases, some were valid and most were not.
    assert SERVED[200]
    assert SERVED[422]


def _png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURE: Final = _png()
PLAUSIBLE: Final[dict[str, Any]] = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "image": PICTURE,
    "init_images": [PICTURE],
    "mask": PICTURE,
    "reference": PICTURE,
}
LEFT_OUT: Final = (
    "model",
    "width",
    "height",
    "size",
    "adapters",
    "controls",
    "image_prompts",
    "override_settings",
    "infotext",
    "webhook",
)
NOT_OF_JOBS: Final = ("response_format", "stream")


def made_plausible(body: Any) -> Any:
    """The body with valid texts and pictures, at the model's own size."""
    if not isinstance(body, dict):
        return body
    fields = {name: PLAUSIBLE.get(name, value) for name, value in body.items()}
    if "input" in fields:
        given = made_plausible(fields["input"])
        if isinstance(given, dict):
            given = {name: value for name, value in given.items() if name not in NOT_OF_JOBS}
        fields["input"] = given
    return {name: value for name, value in fields.items() if name not in LEFT_OUT}


def job_of(client: httpx2.Client) -> str:
    """The identifier of a job that has succeeded."""
    body = {"input": {"prompt": "a cat", "steps": 1}}
    return client.post("/v1/predictions", json=body, headers={"prefer": "wait"}).json()["id"]


def sent(client: httpx2.Client, case: Any) -> tuple[int, bytes]:
    """Status and the beginning of the answer, whose rest may never end."""
    told = case.as_transport_kwargs(base_url=str(client.base_url))
    kept = ("headers", "params", "json", "data", "files", "content")
    named = {name: value for name, value in told.items() if name in kept}
    if isinstance(named.get("data"), bytes | str | int | float):
        named["content"] = str(named.pop("data")).encode()
    if isinstance(files := named.get("files"), list):
        named["files"] = [(name, _part(value)) for name, value in files]
    with client.stream(told["method"], told["url"], **named) as answer:
        failed = answer.status_code >= 400
        return answer.status_code, answer.read() if failed else next(answer.iter_raw(), b"")


def _part(value: Any) -> Any:
    """A field of a form as httpx takes it, with numbers as texts."""
    if isinstance(value, tuple):
        name, content, *rest = value
        return name, content if isinstance(content, bytes) else str(content), *rest
    return None, value if isinstance(value, bytes) else str(value)


def check(client: httpx2.Client, case: Any) -> None:
    status, content = sent(client, case)
    SERVED[status] += 1
    assert status < 500, (status, content)
    if status >= 400:
        form = b'"detail":' if case.path.startswith(AUTOMATIC1111) else b'"message":'
        assert form in content, (status, content)


UNDER: Final = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
        HealthCheck.too_slow,
    ],
)


@pytest.mark.parametrize("label", OPERATIONS)
def test_a_plain_call_is_answered(client: httpx2.Client, label: str) -> None:
    @settings(UNDER, max_examples=1)
    @given(case=OPERATIONS[label].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def call(case: Any) -> None:
        check(client, case)

    call()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("label", VARIED)
def test_any_call_is_answered(client: httpx2.Client, label: str, mode: GenerationMode) -> None:
    job = job_of(client)

    @UNDER
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode), plausible=st.booleans())
    def call(case: Any, plausible: bool) -> None:
        if plausible and mode is GenerationMode.POSITIVE:
            case.body = made_plausible(case.body)
            if "/predictions/" in label:
                case.path_parameters["identifier"] = job
        check(client, case)

    call()
