"""A real server of the embedded model, reached over a socket, and a server without an engine."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.http.app import create_app
from server.http.connection import connections
from server.http.live.websockets import websocket_options
from server.models.folder import embedded_folders
from server.settings import Limits, Settings
from tests.server.full_ticks import full_ticks
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes
from tests.server.thin_model import save_thin_model

PATIENCE_S = 120
MAX_IMAGES = 8


class Running:
    """A server in a thread, and the application that it serves."""

    def __init__(self, settings: Settings) -> None:
        self.app: FastAPI = create_app(settings)
        config = uvicorn.Config(
            self.app,
            http=connections(settings),
            port=0,
            log_level="warning",
            access_log=False,
            **websocket_options(settings.streams),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="uvicorn")

    @property
    def address(self) -> tuple[str, int]:
        return self._server.servers[0].sockets[0].getsockname()[:2]

    @property
    def url(self) -> str:
        host, port = self.address
        return f"http://{host}:{port}"

    def start(self) -> None:
        # Measuring what its forwards cost takes seconds, and no test here needs it.
        with full_ticks():
            self._thread.start()
            self.wait(lambda: self._server.started)
            self.wait(lambda: self.app.state.service.ready or self.app.state.service.broken)
        assert self.app.state.service.ready, self.app.state.service.broken

    def wait(self, happened: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < until, "the server did not get there"
            time.sleep(0.01)

    def settle(self) -> None:
        """Wait until the engine has dropped what was cancelled or abandoned."""
        self.wait(lambda: self.app.state.service.engine.measurements.pending == 0)

    def put_adapter(self, path: Path) -> None:
        """Write an adapter that changes all layers of its first model."""
        networks = self.app.state.service.ready_shelf().loaded()[0].adaptable()
        parts = {part: changes(network, 4, seed=7) for part, network in networks.items()}
        files.saved(files.peft(parts), path)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def young_garbage() -> Iterator[None]:
    """Keep the collector, which runs when a model is unloaded, from visiting all tests' imports."""
    with patch("server.models.memory.collect_all", gc.collect):
        yield


@pytest.fixture(scope="session")
def adapters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters folder of the running server, which sees new files at once."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def controls_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ControlNets folder of the running server, which sees new files at once."""
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="session")
def embeddings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings folder of the running server, which sees new files at once."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="session")
def image_prompts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The IP-Adapters folder of the running server, which sees new files at once."""
    return tmp_path_factory.mktemp("image_prompts")


@pytest.fixture(scope="session")
def thin_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The models that ship with Weft, with thin networks, as values of the setting."""
    folder = tmp_path_factory.mktemp("thin")
    for name, trained in embedded_folders().items():
        save_thin_model(folder / name, trained)
    return tuple(f"{name}={folder / name}" for name in embedded_folders())


@pytest.fixture(scope="session")
def thin_folder(thin_models: tuple[str, ...]) -> Path:
    """The first of them."""
    return Path(thin_models[0].partition("=")[2])


@pytest.fixture(scope="session")
def running(
    thin_models: tuple[str, ...],
    adapters_folder: Path,
    controls_folder: Path,
    embeddings_folder: Path,
    image_prompts_folder: Path,
) -> Iterator[Running]:
    server = Running(
        Settings(
            models=thin_models,
            row_budget=8,
            deterministic=True,
            max_pending=MAX_IMAGES,
            limits=Limits(images=MAX_IMAGES),
            adapters=adapters_folder,
            controls=controls_folder,
            embeddings=embeddings_folder,
            image_prompts=image_prompts_folder,
        )
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture
def slow_denoiser(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(running, monkeypatch)


def slow_down(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an image of 200 steps take 20 seconds, so that it is under way whenever a test looks."""
    model = running.app.state.service.ready_shelf().loaded()[0]
    evaluate = model.evaluate

    def slowly(*given: Any) -> Any:
        time.sleep(0.1)
        return evaluate(*given)

    monkeypatch.setattr(model, "evaluate", slowly)


@pytest.fixture(scope="session")
def client(running: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=running.url, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture(scope="session")
def generate(client: httpx2.Client) -> Callable[..., httpx2.Response]:
    """Posts a small request; keyword arguments are its fields."""

    def post(headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
        body = {"prompt": "a red circle", "steps": 2, "seed": 5, "width": 64, "height": 64} | fields
        return client.post("/v1/generate", json=body, headers=headers)

    return post


@pytest.fixture
def unloaded() -> Callable[..., TestClient]:
    """A client of an application whose engine was never started; arguments are settings."""

    def make(**settings: Any) -> TestClient:
        return TestClient(create_app(Settings(**settings)), base_url="http://127.0.0.1:8000")

    return make
