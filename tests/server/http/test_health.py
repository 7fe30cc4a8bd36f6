import re
from collections.abc import Callable, Iterator
from threading import Event
from time import sleep
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.http.app import create_app
from server.service.hosting import Hosted
from server.settings import Settings
from tests.server.toy_model import Toy, started

Unloaded = Callable[..., TestClient]


def samples(client: Any) -> dict[tuple[str, str], float]:
    """Values by name and label value."""
    text = client.get("/metrics").text
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_loading_server_is_alive_and_not_ready(unloaded: Unloaded) -> None:
    client = unloaded()
    assert client.get("/livez").json() == {"status": "alive"}
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert int(ready.headers["retry-after"]) >= 1
    answer = client.post("/v1/generate", json={"prompt": "x"})
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "The model is still loading."
    assert samples(client)["weft_ready", ""] == 0
    assert samples(client)["weft_requests_total", "unavailable"] == 1


def test_a_server_without_its_model_is_not_worth_keeping(tmp_path: Any) -> None:
    given_up: list[bool] = []
    settings = Settings(models=(str(tmp_path / "none"),))
    app = create_app(settings, on_failure=lambda: given_up.append(True))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        while not given_up:
            client.get("/livez")
        answer = client.get("/livez")
        assert answer.status_code == 503
        assert answer.json()["reason"].startswith("The models could not be loaded;")
        assert str(tmp_path) not in answer.text + client.get("/readyz").text
        assert client.get("/readyz").status_code == 503


def test_a_load_that_ends_in_something_else_than_an_error_is_said_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(*_: Any) -> None:
        raise SystemExit(0)

    given_up = Event()
    monkeypatch.setattr("server.http.app.host", end)
    app = create_app(Settings(), on_failure=given_up.set)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert given_up.wait(60)
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 503


@pytest.fixture
def breakable(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TestClient, Callable[[], None]]]:
    """A client of a server, and a function that makes its engine fail."""
    engine, failing = started(Toy(), 8), list[Callable[[], None]]()
    nowhere: Any = None

    def host(_: Settings, on_failure: Callable[[], None]) -> Hosted:
        failing.append(on_failure)
        return Hosted(engine, {"toy": Toy()}, nowhere)

    def fail() -> None:
        engine.failure = RuntimeError("broken")
        failing[0]()

    monkeypatch.setattr("server.http.app.host", host)
    with TestClient(create_app(Settings()), base_url="http://127.0.0.1:8000") as client:
        while client.get("/readyz").status_code == 503:
            sleep(0.01)
        yield client, fail
    engine.stop(0)


def test_requests_under_way_hear_of_an_engine_that_fails(
    breakable: tuple[TestClient, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, fail = breakable
    app: Any = client.app
    abandoned = Event()
    monkeypatch.setattr(app.state.service, "abandon", abandoned.set)
    fail()
    assert abandoned.wait(60)


def test_a_live_stream_without_frames_hears_of_an_engine_that_fails(
    breakable: tuple[TestClient, Callable[[], None]],
) -> None:
    client, fail = breakable
    with client.websocket_connect("ws://127.0.0.1:8000/v1/stream") as stream:
        fail()
        said = stream.receive_json()
        assert (said["error"]["code"], said["error"]["message"]) == (
            "not_ready",
            "The engine stopped: RuntimeError.",
        )
        assert stream.receive()["type"] == "websocket.close"


def test_a_loaded_server_is_ready(client: httpx2.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_metrics_follow_the_work(client: httpx2.Client, generate: Callable[..., Any]) -> None:
    before = samples(client)
    guidance = {"name": "cfg", "policy": {"name": "interval", "start": 0.5}}
    assert generate(n=2, steps=2, guidance=guidance).status_code == 200
    assert generate(width=100).status_code == 422
    assert generate(width="wide").status_code == 422
    after = samples(client)

    def grown(name: str, label: str = "") -> float:
        return after[name, label] - before.get((name, label), 0)

    assert grown("weft_requests_total", "completed") == 1
    assert grown("weft_requests_total", "invalid") == 2
    assert grown("weft_images_total", "finished") == 2
    assert grown("weft_image_seconds_count", "interactive") == 2
    assert grown("weft_image_seconds_sum", "interactive") > 0
    assert grown("weft_image_seconds_count", "live") == 0
    assert grown("weft_evaluations_total") + grown(
        "weft_evaluations_saved_total", "interval"
    ) == pytest.approx(8)
    assert grown("weft_tick_rows_sum") == grown("weft_evaluations_total")
    assert grown("weft_tick_rows_count") >= 2
    assert grown("weft_engine_seconds_total", "denoise") > 0
    assert grown("weft_engine_seconds_total", "weave") > 0
    assert after["weft_queue_images", ""] == 0
    assert after["weft_row_budget", ""] == 8
    assert after["weft_tick_seconds_estimate", "16x16"] > 0


def test_the_metrics_say_where_images_spent_their_time(
    client: httpx2.Client, generate: Callable[..., Any]
) -> None:
    assert generate().status_code == 200
    families = text_string_to_metric_families(client.get("/metrics").text)
    (stages,) = (family for family in families if family.name == "weft_image_stage_seconds")
    spent = {
        (sample.labels["stage"], sample.name.rpartition("_")[2]): sample.value
        for sample in stages.samples
        if sample.labels["priority"] == "interactive" and "le" not in sample.labels
    }
    assert {stage for stage, _ in spent} == {"queue", "denoise", "decode"}
    assert all(value > 0 for value in spent.values())


def test_a_batch_request_runs_at_its_priority(
    client: httpx2.Client, generate: Callable[..., Any]
) -> None:
    counted = "weft_image_seconds_count", "batch"
    before = samples(client)[counted]
    answer = generate(priority="batch")
    assert answer.status_code == 200
    assert "priority" not in answer.json()["settings"], "it does not change the image"
    assert samples(client)[counted] == before + 1
    assert "batch" in generate(priority="live").json()["error"]["message"]


def test_the_page_is_served(client: httpx2.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "Weft" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_the_page_takes_nothing_from_elsewhere(client: httpx2.Client) -> None:
    assert re.findall(r"""(?:src|href)=["']?+(?!/[^/]|data:)""", client.get("/").text) == []
    assert "://" not in client.get("/").text


def test_openapi_states_the_operator_s_limits(unloaded: Unloaded) -> None:
    client = unloaded(limits={"steps": 7, "images": 3})
    fields = client.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]
    assert fields["properties"]["n"]["maximum"] == 3
    assert fields["properties"]["steps"]["anyOf"][0]["maximum"] == 7
