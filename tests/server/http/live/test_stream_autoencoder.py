"""Requests and streams choose between a model's own autoencoder and a tiny one beside it."""

from __future__ import annotations

import base64
from copy import deepcopy
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.models.autoencoder import Autoencoder
from server.models.hosted import HostedModel
from tests.server.conftest import Running
from tests.server.stream_client import SMALL, file_of, opened, pixels_of

ASKED = ("prompt", "steps", "seed", "width", "height")
TINY = {"autoencoder": "tiny"}


@pytest.fixture
def with_tiny(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second autoencoder beside the model's own, which shows everything darker."""
    hosted: HostedModel = running.app.state.service.ready_shelf().loaded()[0]
    network: Any = deepcopy(hosted.modules()["vae"])
    with torch.no_grad():
        network.decoder.layers[-1].bias -= 0.3
    monkeypatch.setattr(hosted, "tiny", Autoencoder(network, hosted.device))


def drawn(client: httpx2.Client, frame: bytes, **fields: Any) -> NDArray[np.uint8]:
    body = {name: SMALL[name] for name in ASKED} | fields
    body["image"] = base64.b64encode(frame).decode()
    answer = client.post("/v1/generate", json=body, headers={"accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return pixels_of(answer.content)


@pytest.mark.usefixtures("with_tiny")
def test_a_stream_changes_its_autoencoder_at_a_frame(
    running: Running, client: httpx2.Client
) -> None:
    frame = file_of(90)
    full, tiny = drawn(client, frame), drawn(client, frame, **TINY)
    assert full.mean() - tiny.mean() > 5
    with opened(running.url) as stream:
        stream.settings(**SMALL | TINY)
        assert np.array_equal(stream.turned(frame).pixels, tiny)
        stream.settings(autoencoder="full")
        assert np.array_equal(stream.turned(frame).pixels, full)
    running.settle()


@pytest.mark.usefixtures("with_tiny")
def test_the_settings_of_an_image_name_the_tiny_autoencoder(client: httpx2.Client) -> None:
    body: dict[str, Any] = {"prompt": "a star", "steps": 1, "width": 64, "height": 64}
    for asked, said in ((TINY, "tiny"), ({"autoencoder": "full"}, None), ({}, None)):
        answer = client.post("/v1/generate", json=body | asked)
        assert answer.json()["settings"].get("autoencoder") == said


def test_a_model_without_one_refuses_it_in_one_sentence(
    running: Running, client: httpx2.Client
) -> None:
    answer = client.post("/v1/generate", json={"prompt": "a star", **TINY})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == "autoencoder"
    assert error["message"] == (
        "autoencoder is 'tiny', but model 'embedded' is hosted without a tiny autoencoder; "
        "leave it out."
    )
    with opened(running.url) as stream:
        assert stream.settings(**SMALL | TINY)["error"]["param"] == "autoencoder"
