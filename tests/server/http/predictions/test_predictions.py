"""Durable jobs over HTTP, on a real server."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import hmac
import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from server.blobs import Blobs
from server.engine.tick.stage import Stage, run_stage
from server.http.predictions.prefer import waiting_s
from server.jobs import deliveries, store
from server.jobs.database import of_folder
from server.jobs.job import ENDED, Job
from server.models.folder import embedded_folders
from server.settings import JobSettings, Settings
from tests.server.conftest import PATIENCE_S, Running, slow_down
from tests.server.models.controls.tiny_controls import put_depth
from tests.server.process import Forks, served

STRAY = "0123456789abcdef" * 2
MINE, OTHER = "correct horse battery staple", "0123456789abcdef"
MODEL = f"embedded={embedded_folders()['embedded']}"
"""One model is enough."""
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
INPUT = {"prompt": "a red circle", "steps": 2, "seed": 5, "width": 64, "height": 64}
LONG = INPUT | {"steps": 200, "guidance": "none"}
THREE_FORWARDS = (
    "changed.calls = getattr(changed, 'calls', 0) + 1; changed.calls > 3 and time.sleep(3600)"
)
"""After three forwards of at most two images of two steps, one is finished and others are not. They
stay so, since the fourth forward does not end."""


def adapted() -> dict[str, Any]:
    """Fields of a request with a picture and an adapter, which change its image."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(file, "png")
    picture = base64.b64encode(file.getvalue()).decode()
    adapters = [{"name": "embedded-lcm-lora", "weight": 0.7}]
    return {"image": picture, "strength": 0.9, "adapters": adapters, "guidance": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs folder of all servers here."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def accepted(forks: Forks, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Jobs accepted by a server that was killed when some had ended and some were in progress."""
    given = {"WEFT_JOBS__FOLDER": str(folder), "WEFT_JOBS__RUNNING": "2", "WEFT_API_KEYS": MINE}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in given.items():
            environment.setenv(name, value)
        place = tmp_path_factory.mktemp("killed")
        with served(forks, place, THREE_FORWARDS) as server:
            server.wait_for("/readyz", 200)
            server.disturb()
            identifiers: list[str] = []
            for seed in range(8):
                body = {"input": INPUT | {"seed": seed} | (adapted() if seed == 7 else {})}
                status, text = server.ask("/v1/predictions", body, MINE)
                assert status == 202
                identifiers.append(json.loads(text)["id"])

            def statuses() -> set[str]:
                page = json.loads(server.ask("/v1/predictions", key=MINE)[1])
                return {job["status"] for job in page["results"]}

            until(lambda: statuses() == {"succeeded", "processing", "starting"})
            server.process.send_signal(signal.SIGKILL)
            server.ended()
    for name in (STRAY, "holidays"):
        (folder / "pictures" / name).mkdir()
    return identifiers


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the server's ControlNets."""
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="module")
def server(folder: Path, controls: Path, accepted: list[str]) -> Iterator[Running]:
    jobs = {
        "folder": folder,
        "running": 2,
        "webhook_secret": SECRET,
        "webhook_private": True,
    }
    settings = Settings.model_validate(
        {
            "api_keys": [MINE, OTHER],
            "models": [MODEL],
            "controls": controls,
            "row_budget": 8,
            "deterministic": True,
            "jobs": JobSettings.model_validate(jobs),
        }
    )
    running = Running(settings)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def slow(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(server, monkeypatch)


@pytest.fixture(scope="module")
def mine(server: Running) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {MINE}"}
    with httpx2.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def other(server: Running) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {OTHER}"}
    with httpx2.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers) as client:
        yield client


def post(client: httpx2.Client, given: dict[str, Any] = INPUT, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/v1/predictions", json={"input": given}, headers=named)


def all_ended(client: httpx2.Client) -> bool:
    found = client.get("/v1/predictions").json()["results"]
    return all(job["status"] in ENDED for job in found)


def until(happened: Callable[[], Any]) -> None:
    last = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < last
        time.sleep(0.02)


def test_what_a_killed_server_accepted_ends_once(
    mine: httpx2.Client, accepted: list[str], folder: Path
) -> None:
    """This must be the first test, since others add to the list."""
    until(lambda: all_ended(mine))
    jobs = mine.get("/v1/predictions").json()["results"]
    assert [job["id"] for job in jobs] == accepted[::-1]
    assert {job["status"] for job in jobs} == {"succeeded"}
    assert {job["attempts"] for job in jobs} == {1, 2}
    pictures = [path for path in (folder / "pictures").rglob("*") if path.is_file()]
    assert sorted(path.parts[-3] for path in pictures) == sorted(accepted)
    assert not (folder / "pictures" / STRAY).exists()
    # The operator's own files stay.
    assert (folder / "pictures" / "holidays").exists()


def test_a_job_of_a_killed_server_has_its_adapter_and_its_picture(
    mine: httpx2.Client, accepted: list[str]
) -> None:
    job = mine.get(f"/v1/predictions/{accepted[7]}").json()
    assert job["settings"]["adapters"][0]["name"] == "embedded-lcm-lora"
    picture = mine.get(job["output"][0])
    given, headers = INPUT | {"seed": 7} | adapted(), {"accept": "image/png"}
    assert mine.post("/v1/generate", json=given, headers=headers).content == picture.content
    for left_out in ({"image", "strength"}, {"adapters"}):
        others = {name: value for name, value in given.items() if name not in left_out}
        other = mine.post("/v1/generate", json=others, headers=headers)
        assert other.status_code == 200
        assert other.content != picture.content


def test_a_job_makes_the_image_that_a_request_makes(mine: httpx2.Client) -> None:
    answer = post(mine, prefer="wait")
    assert answer.status_code == 201
    job = answer.json()
    assert (job["status"], job["seeds"], job["attempts"]) == ("succeeded", [5], 1)
    assert answer.headers["location"] == job["urls"]["get"]
    assert mine.get(job["urls"]["get"]).json() == job
    picture = mine.get(job["output"][0])
    assert picture.headers["content-type"] == "image/png"
    asked = mine.head(job["output"][0])
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-length"] == picture.headers["content-length"]
    assert mine.head(job["urls"]["get"]).status_code == 200
    headers = {"accept": "image/png"}
    assert mine.post("/v1/generate", json=INPUT, headers=headers).content == picture.content
    for nothing in ("output/1", "output/%00"):
        assert mine.get(f"{job['urls']['get']}/{nothing}").status_code in (404, 422)
    assert mine.get("/v1/predictions/%00").status_code == 404


def test_a_job_has_the_pictures_that_came_with_it(
    server: Running, mine: httpx2.Client, controls: Path
) -> None:
    model = server.app.state.service.ready_shelf().loaded()[0]
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(file, "png")
    blue = base64.b64encode(file.getvalue()).decode()
    steered = [{"name": put_depth(model, controls), "image": blue}]
    given = INPUT | {"image": blue, "strength": 0.5, "controls": steered}
    job = post(mine, given, prefer="wait").json()
    assert "image" not in job["input"]
    assert job["input"]["controls"] == [{"name": "depth"}]
    picture = mine.get(job["output"][0])
    headers = {"accept": "image/png"}
    assert mine.post("/v1/generate", json=given, headers=headers).content == picture.content


def test_a_job_is_of_the_key_that_made_it(mine: httpx2.Client, other: httpx2.Client) -> None:
    jobs = [post(mine).json()["id"] for _ in range(3)]
    theirs = post(other).json()["id"]
    for method, suffix in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/output/0"),
        ("POST", "/cancel"),
    ):
        path = f"/v1/predictions/{jobs[0]}{suffix}"
        answer = other.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "prediction_not_found")
    page = mine.get("/v1/predictions", params={"limit": 2}).json()
    assert [job["id"] for job in page["results"]] == jobs[:0:-1]
    assert mine.get(page["next"]).json()["results"][0]["id"] == jobs[0]
    assert [job["id"] for job in other.get("/v1/predictions").json()["results"]] == [theirs]
    assert other.get("/v1/predictions", params={"cursor": jobs[0]}).status_code == 422


def test_a_hundred_posts_with_one_key_are_one_job(mine: httpx2.Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(mine, idempotency_key="k"), range(100)))
    assert {answer.status_code for answer in answers} <= {201, 202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    changed = post(mine, INPUT | {"seed": 6}, idempotency_key="k")
    assert (changed.status_code, changed.json()["error"]["param"]) == (422, "idempotency-key")


@pytest.mark.usefixtures("slow")
def test_events_tell_of_the_queue_and_cancel_ends_the_work(
    mine: httpx2.Client, server: Running
) -> None:
    until(lambda: all_ended(mine))
    first, second, third = (post(mine, LONG | {"seed": seed}).json() for seed in (1, 2, 3))
    told: list[tuple[str, dict[str, Any]]] = []
    with mine.stream("GET", third["urls"]["stream"]) as stream:
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if not line.startswith("data: "):
                continue
            told.append((name, json.loads(line.removeprefix("data: "))))
            if len(told) == 1:
                for job in (first, second):
                    assert mine.post(job["urls"]["cancel"]).json()["status"] == "canceled"
            if name == "progress":
                mine.post(third["urls"]["cancel"])
    assert (told[0][1]["status"], told[0][1]["queue_position"]) == ("starting", 0)
    assert (told[-1][0], told[-1][1]["status"]) == ("status", "canceled")
    assert any(name == "progress" and 0 < data["step"] <= 200 for name, data in told)
    server.settle()
    assert mine.post(third["urls"]["cancel"]).json()["status"] == "canceled"


def test_a_webhook_tells_of_the_end_in_a_way_that_can_be_verified(
    mine: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "AGAIN_S", (0.1, 0.1))
    heard: list[tuple[dict[str, str], bytes]] = []
    statuses = iter((500, 204))

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            heard.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(next(statuses, 204))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    receiver = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever).start()
    body = {
        "input": INPUT,
        "webhook": f"http://127.0.0.1:{receiver.server_port}/hook",
        "webhook_events_filter": ["completed"],
    }
    job = mine.post("/v1/predictions", json=body, headers={"prefer": "wait"}).json()
    until(lambda: len(heard) == 2)
    receiver.shutdown()
    receiver.server_close()
    for headers, content in heard:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + content
        mac = hmac.new(bytes(range(32)), signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == "v1," + base64.b64encode(mac).decode()
        assert json.loads(content)["id"] == job["id"]
        assert json.loads(content)["output"] == job["output"]
    assert heard[0][0]["webhook-id"] == heard[1][0]["webhook-id"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": INPUT | {"steps": 9999}}, "input.steps"),
        ({"input": INPUT | {"stepz": 1}}, "input.stepz"),
        ({"input": INPUT | {"model": "none"}}, "model"),
        ({"input": INPUT | {"stream": True}}, "input.stream"),
        ({"input": INPUT | {"response_format": "url"}}, "input.response_format"),
        ({"input": INPUT, "webhook": "ftp://x.example"}, "webhook"),
        ({"input": INPUT, "webhook_events_filter": ["logs"]}, "webhook_events_filter.0"),
        ({}, "input"),
    ],
)
def test_what_could_never_be_made_is_refused_at_once(
    mine: httpx2.Client, body: dict[str, Any], param: str
) -> None:
    answer = mine.post("/v1/predictions", json=body)
    assert answer.status_code in (404, 422)
    assert answer.json()["error"]["param"] == param


def test_without_a_folder_there_are_no_jobs(unloaded: Callable[..., TestClient]) -> None:
    client = unloaded()
    for answer in (
        client.get("/v1/predictions"),
        client.post("/v1/predictions", json={"input": INPUT}),
    ):
        assert answer.status_code == 404
        assert "WEFT_JOBS__FOLDER" in answer.json()["error"]["message"]


def test_a_server_without_a_secret_takes_no_webhooks(
    unloaded: Callable[..., TestClient], tmp_path: Path
) -> None:
    client = unloaded(jobs=JobSettings(folder=tmp_path))
    body = {"input": INPUT, "webhook": "https://x.example/"}
    answer = client.post("/v1/predictions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "webhook")


def test_what_cannot_be_stored_is_not_accepted(mine: httpx2.Client, server: Running) -> None:
    jobs = server.app.state.jobs
    before = mine.get("/v1/predictions").json()["results"]
    given = INPUT | {"image": base64.b64encode(bytes(9)).decode(), "width": 64, "height": 64}
    with pytest.MonkeyPatch.context() as patch:
        # A file takes the place of its folder, since root may write into every folder.
        patch.setattr(jobs, "_blobs", Blobs(__file__))
        answer = post(mine, given)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert len(mine.get("/v1/predictions").json()["results"]) == len(before)


def test_prefer_says_how_long_to_wait() -> None:
    waits = ("", "respond-async", "wait", "wait=5", "wait=500", "return=minimal, wait=2; x=y")
    assert [waiting_s(one) for one in waits] == [0, 0, 60, 5, 60, 2]


def test_a_job_as_large_as_what_lately_did_not_fit_waits_until_it_is_tried_again(
    mine: httpx2.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is the second run that does not fit, and the refusal says so."""
    monkeypatch.setattr("server.engine.state.overflows.OVERFLOW_EXPIRY_S", 0.5)
    overflows = server.app.state.service.engine._overflows
    overflows.note("embedded", 96, 96, None, free=0)
    given = INPUT | {"width": 64, "height": 64, "hires": {"scale": 1.5, "strength": 1}}
    job = post(mine, given, prefer="wait").json()
    assert job["status"] == "succeeded", job


@pytest.mark.parametrize(("failing", "status"), [(2, "succeeded"), (3, "failed")])
def test_a_job_that_ran_out_of_memory_is_begun_again_as_often_as_one_that_was_interrupted(
    failing: int, status: str, mine: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = iter(range(failing))

    def short(*given: Any) -> Stage:
        if next(attempts, None) is not None:
            raise torch.OutOfMemoryError("others have it")
        return run_stage(*given)

    monkeypatch.setattr("server.engine.stages.run_stage", short)
    monkeypatch.setattr("server.engine.state.overflows.OVERFLOW_EXPIRY_S", 0.1)
    monkeypatch.setattr("server.jobs.runner.LOOK_S", 0.2)
    job = post(mine, prefer="wait").json()
    assert (job["status"], next(attempts, None)) == (status, None), job
    if status == "failed":
        assert job["attempts"] == 3
        assert job["error"].startswith("There was not enough memory for this image")


@pytest.mark.parametrize(("failing", "status"), [(2, "succeeded"), (3, "failed")])
def test_a_job_whose_images_cannot_be_stored_is_begun_again(
    failing: int, status: str, mine: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts, write = iter(range(failing)), Blobs.write

    async def full(blobs: Blobs, name: str, data: bytes) -> None:
        if next(attempts, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(blobs, name, data)

    monkeypatch.setattr(Blobs, "write", full)
    for wait in ("LOOK_S", "LONGEST_WAIT_S"):
        monkeypatch.setattr(f"server.jobs.runner.{wait}", 0.2)
    job = post(mine, prefer="wait").json()
    assert job["status"] == status, job
    if status == "failed":
        assert job["error"] == "The images could not be stored; the server's log has the details."


@pytest.mark.usefixtures("slow")
def test_a_server_that_stops_lets_its_jobs_wait(
    mine: httpx2.Client, server: Running, folder: Path
) -> None:
    """This must be the last test, since it stops the server."""
    accepted = [post(mine, LONG | {"seed": seed}).json()["id"] for seed in (1, 2, 3)]
    until(lambda: mine.get(f"/v1/predictions/{accepted[1]}").json()["status"] == "processing")
    server.stop()
    database = of_folder(folder)

    async def found() -> list[Job]:
        return await database.run(store.page, hashlib.sha256(MINE.encode()).hexdigest(), None, 3)

    jobs = asyncio.run(found())
    database.close()
    assert [job.id for job in jobs] == accepted[::-1]
    assert {job.status for job in jobs} == {"starting"}
    assert all(job.attempt == job.spared for job in jobs)
