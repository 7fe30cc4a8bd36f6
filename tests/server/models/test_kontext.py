"""FLUX.1 Kontext is what diffusers' own pipeline makes of the same weights and picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor

from server.decoding.sizing import PictureTarget
from server.engine import graphs as graphs_module
from server.engine.cost_model import TickCost
from server.engine.engine import Engine
from server.engine.graphs import Graphs
from server.engine.state.noise import start_noise
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.requests.reference_images import target_of
from server.service.pixels import pixels_tensor
from tests.server.engine.operation_tape import OperationTape
from tests.server.models.alike import assert_among, assert_apart, task_of
from tests.server.models.tiny_flux1 import DEV, make
from tests.server.models.tiny_sdxl import saved
from tests.server.models.tiny_text import LENGTH
from tests.server.toy_model import run

WIDTH, HEIGHT = 32, 24
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
ASKED: dict[str, Any] = {"prompt": "a star", "width": WIDTH, "height": HEIGHT, "steps": 4}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(DEV, guided=True, kind=FluxKontextPipeline)


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder = saved(pipeline, tmp_path_factory.mktemp("models") / "kontext")
    return load_model(folder, name="kontext", device="cpu", dtype="float32")


@torch.inference_mode()
def theirs(pipeline: Any, seed: int, picture: Image.Image | None, **fields: Any) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    noise = start_noise(seed, SHAPE)[None]
    given = {
        "prompt": "a star",
        "image": picture,
        "latents": pipeline._pack_latents(noise, *noise.shape),
        "num_inference_steps": 4,
        "width": WIDTH,
        "height": HEIGHT,
        "max_area": WIDTH * HEIGHT,
        "_auto_resize": False,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
        **fields,
    }
    return pipeline._unpack_latents(pipeline(**given).images, HEIGHT, WIDTH, 2)[0]


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    wide, small = picture(40, 24, seed=1), picture(16, 16, seed=2)

    def asked(seed: int, *pictures: Image.Image, **fields: Any) -> Any:
        references = tuple(pixels_tensor(np.asarray(one)) for one in pictures)
        given: dict[str, Any] = ASKED | {"seed": seed} | fields
        return replace(task_of(model, **given), references=references)

    true_cfg = {"guidance": {"name": "cfg", "scale": 4.0}, "negative_prompt": "blue"}
    ear = run(engine, [asked(5, wide), asked(6, small), asked(7, wide, **true_cfg), asked(8)])
    assert not ear.errors, ear.errors
    seen = list(decoded)
    expected = theirs(pipeline, 5, wide, guidance_scale=2.5)
    assert_among(seen, expected)
    assert_among(seen, theirs(pipeline, 6, small, guidance_scale=2.5))
    doubled: dict[str, Any] = {"true_cfg_scale": 4.0, "negative_prompt": "blue"}
    assert_among(seen, theirs(pipeline, 7, wide, guidance_scale=1.0, **doubled))
    assert_among(seen, theirs(pipeline, 8, None, guidance_scale=2.5))
    assert_apart(theirs(pipeline, 5, None, guidance_scale=2.5), expected)


def test_a_picture_gets_the_size_that_diffusers_gives_it(model: HostedModel) -> None:
    target: PictureTarget = target_of(model.facts)
    assert target.size_of(3000, 1700, 2**21) == (1392, 752)
    assert target.size_of(100, 100, 2**21) == (1024, 1024)
    assert target.size_of(1700, 3000, 2**21) == (752, 1392)
    # Where the operator's limit is lower, proportions are kept, in the model's multiples.
    assert target.size_of(200, 100, 5000) == (100, 48)


@torch.inference_mode()
def test_a_recorded_forward_gives_the_numbers_of_other_reference_pictures(
    model: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_REPLAY_RATIO", 1e9)
    tape, cost = OperationTape(), TickCost({1: 1.0})
    graphs, texts = Graphs(model, tape), model.encode_prompts(["a star", "a blue star"], 32, 24)

    def given(seed: int) -> tuple[Tensor, Tensor, RowInputs]:
        generator = torch.Generator().manual_seed(seed)
        pictures = torch.randn(2, *SHAPE, generator=generator)
        told = zip(texts, pictures, strict=True)
        rows = [model.add_references(text, [picture]) for text, picture in told]
        x = torch.randn(2, *SHAPE, generator=generator)
        return x, torch.full((2,), 0.5 + 0.1 * seed), RowInputs(model.stack(rows))

    graphs.evaluate(*given(0), cost)
    graphs.record()
    calls = tape.made[0].calls
    assert torch.equal(graphs.evaluate(*given(1), cost), model.evaluate(*given(1)))
    assert tape.made[0].calls == calls + 1
