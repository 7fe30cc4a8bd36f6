"""Embeddings over HTTP: named by prompts, listed, and kept by streams that leave a prompt."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.server.conftest import Running
from tests.server.stream_client import SMALL, opened

Generate = Callable[..., httpx2.Response]
VECTORS = 12
INK, RED = "an inkish ring", "a red circle"


@pytest.fixture(scope="module")
def width(running: Running) -> int:
    [width] = running.app.state.service.ready_shelf().loaded()[0].embedding_target().widths.values()
    return width


@pytest.fixture(scope="module")
def plain(generate: Generate) -> bytes:
    """A picture of a word that does not name an embedding yet."""
    return file_of(generate(prompt=INK))


@pytest.fixture(scope="module")
def inkish(plain: bytes, width: int, embeddings_folder: Path) -> str:
    vectors = torch.randn(VECTORS, width, generator=torch.Generator().manual_seed(1))
    save_file({"emb_params": vectors}, embeddings_folder / "inkish.safetensors")
    save_file({"emb_params": torch.ones(2, 7)}, embeddings_folder / "narrow.safetensors")
    return "inkish"


def file_of(answer: httpx2.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["images"][0]["b64_json"])


def test_a_new_file_acts_wherever_a_text_names_it(
    generate: Generate, client: httpx2.Client, plain: bytes, inkish: str
) -> None:
    answer = generate(prompt=INK)
    assert file_of(answer) != plain
    again = client.post("/v1/generate", json=answer.json()["settings"])
    assert file_of(again) == file_of(answer)
    away = [generate(prompt=RED, negative_prompt=text) for text in (inkish, "unknown")]
    assert file_of(away[0]) != file_of(away[1])
    [warning] = generate(prompt="a narrow ring").json()["warnings"]
    assert warning.startswith("'narrow' is read as plain text: ")


def test_embeddings_are_listed_with_those_that_do_not_fit(
    client: httpx2.Client, inkish: str, width: int
) -> None:
    [model, *_] = client.get("/v1/catalog").json()["models"]
    assert model["embeddings"] == [{"name": inkish, "vectors": VECTORS, "width": width}]
    assert f"needs a width of {width}" in model["unfit_embeddings"]["narrow"]
    listed = client.get("/sdapi/v1/embeddings").json()
    assert listed["loaded"][inkish] | {"step": None} == {
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "shape": width,
        "vectors": VECTORS,
    }
    assert list(listed["skipped"]) == ["narrow"]


def test_clients_of_automatic1111_name_more_vectors_than_a_chunk_has(
    client: httpx2.Client, generate: Generate, inkish: str
) -> None:
    prompt = ", ".join([inkish] * 3)
    assert generate(prompt=prompt).status_code == 422
    body: dict[str, Any] = {"prompt": prompt, "steps": 2, "width": 64, "height": 64}
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text


def test_a_stream_keeps_the_embeddings_of_the_prompt_that_it_leaves(
    running: Running, inkish: str
) -> None:
    settings: dict[str, Any] = {**SMALL, "width": 64, "height": 64, "source": "text"}
    with opened(running.url) as stream:
        stream.settings(**settings | {"prompt": [{"text": INK}, {"text": RED}]})
        mixed = stream.output().pixels
    with opened(running.url) as stream:
        stream.settings(**settings | {"prompt": INK})
        stream.output()
        stream.settings(prompt=RED, transition_frames=2)
        half = stream.output().pixels
    running.settle()
    assert np.array_equal(half, mixed)


def test_a_stream_warns_once_of_a_word_in_any_of_its_prompts_that_is_read_as_it_stands(
    running: Running, inkish: str
) -> None:
    texts = [{"text": one} for one in (inkish, "narrow lines", "a narrow square")]
    with opened(running.url) as stream:
        answer = stream.settings(**SMALL | {"source": "text", "prompt": texts})
    assert len(answer["warnings"]) == 1
    assert answer["warnings"][0].startswith("'narrow' is read as plain text: ")
