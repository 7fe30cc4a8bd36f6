"""Qwen-Image-Edit is what diffusers' own pipelines make of the same weights and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image
from torch import Tensor

from server.decoding.sizing import PictureTarget, resize_to
from server.engine.state.noise import start_noise
from server.engine.task import ImageTask
from server.models import transformer_model
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.references import SeenPicture
from server.requests.reference_images import seen_target_of, target_of
from server.service.pixels import pixels_tensor
from tests.server.models.alike import assert_apart, difference, task_of
from tests.server.models.tiny_qwen_image import CHANNELS, make
from tests.server.toy_model import run, started

WIDTH, HEIGHT = 48, 40
SHAPE = (CHANNELS, HEIGHT // 2, WIDTH // 2)
PIXELS, SEEN_PIXELS = 64 * 64, 56 * 56
"""Areas in place of a megapixel, and of the pictures that the text encoder sees."""

GUIDED: dict[str, Any] = {"name": "cfg", "scale": 4.0, "cfg_norm": {"patch": 2}}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Use small areas, since a megapixel is too large for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_model, "DEFAULT_SIDE", 32)
        patch.setattr(edit_plus, "VAE_IMAGE_SIZE", PIXELS)
        patch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", SEEN_PIXELS)
        sizes = edit.calculate_dimensions
        patch.setattr(edit, "calculate_dimensions", lambda _, ratio: sizes(PIXELS, ratio))
        yield


def of_kind(kind: Any, folder: Any, **config: Any) -> tuple[Any, HostedModel]:
    """A pipeline, and our model of the folder that it saves."""
    pipeline = make(kind, **config)
    pipeline.save_pretrained(folder)
    pipeline.processor.image_processor.save_pretrained(folder / "processor")
    read = pipeline.text_encoder.forward

    def placed(input_ids: Tensor, **given: Any) -> Any:
        """Find positions as transformers 4 did, with which these models were published."""
        kinds = (input_ids == pipeline.text_encoder.config.image_token_id).int()
        return read(input_ids, mm_token_type_ids=kinds, **given)

    pipeline.text_encoder.forward = placed
    return pipeline, load_model(folder, name="edit", device="cpu", dtype="float32")


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def asked(
    model: HostedModel, pictures: list[Image.Image], seen_pixels: int, **fields: Any
) -> ImageTask:
    given: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "steps": 3, "guidance": GUIDED}
    task = task_of(model, **given | fields)
    read, seen = (
        [
            np.asarray(resize_to(one, PictureTarget(area=area, multiple=32), 10**6))
            for one in pictures
        ]
        for area in (PIXELS, seen_pixels)
    )
    text = replace(task.text, pictures=tuple(map(SeenPicture.of, seen)))
    return replace(task, references=tuple(map(pixels_tensor, read)), text=text)


@torch.inference_mode()
def theirs(pipeline: Any, seed: int, image: Any, prompt: str) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    noise = start_noise(seed, SHAPE)[None]
    packed = pipeline(
        image,
        prompt=prompt,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        latents=pipeline._pack_latents(noise, *noise.shape),
        num_inference_steps=3,
        width=WIDTH,
        height=HEIGHT,
        output_type="latent",
    ).images
    return pipeline._unpack_latents(packed, HEIGHT, WIDTH, 2)[0, :, 0]


def drawn(model: HostedModel, tasks: list[ImageTask]) -> list[Tensor]:
    """Clean latents of some images that run together."""
    engine = started(model, 16)
    try:
        ear = run(engine, [replace(task, undecoded=True) for task in tasks])
        assert not ear.errors, ear.errors
        found = [ear.results[index].latents for index in range(len(tasks))]
        return [one for one in found if one is not None]
    finally:
        engine.stop(0)


def test_with_several_pictures_it_is_the_pipeline_of_diffusers(tmp_path: Any) -> None:
    # As in the 2511 release: for pictures, the time says that they have no noise.
    pipeline, model = of_kind(QwenImageEditPlusPipeline, tmp_path / "plus", zero_cond_t=True)
    wide, small = picture(90, 50, seed=1), picture(64, 64, seed=2)
    tasks = [
        asked(model, [wide], SEEN_PIXELS, prompt="a red circle", seed=5),
        asked(model, [small, wide], SEEN_PIXELS, prompt="a star", seed=6),
        asked(model, [wide], SEEN_PIXELS, prompt="a much longer text " * 3, seed=7),
        asked(model, [], SEEN_PIXELS, prompt="a star", seed=8),
    ]
    one, two, long, _ = drawn(model, tasks)
    expected = theirs(pipeline, 5, [wide], "a red circle")
    assert difference(one, expected) < 1e-4
    assert difference(two, theirs(pipeline, 6, [small, wide], "a star")) < 1e-4
    assert difference(long, theirs(pipeline, 7, [wide], "a much longer text " * 3)) < 1e-4
    assert_apart(expected, theirs(pipeline, 5, [small], "a red circle"))
    # If only the text encoder or only the denoiser saw it, the image would be another.
    for sprung in (
        replace(tasks[0], text=replace(tasks[0].text, pictures=())),
        replace(tasks[0], text=asked(model, [small], SEEN_PIXELS, prompt="a red circle").text),
    ):
        assert_apart(expected, drawn(model, [sprung])[0])


@pytest.fixture(scope="module")
def one_picture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HostedModel]:
    return of_kind(QwenImageEditPipeline, tmp_path_factory.mktemp("models") / "edit")


def test_with_one_picture_it_is_the_pipeline_of_diffusers(
    one_picture: tuple[Any, HostedModel],
) -> None:
    (pipeline, model), wide = one_picture, picture(90, 50, seed=1)
    [image] = drawn(model, [asked(model, [wide], PIXELS, prompt="a red circle", seed=5)])
    assert difference(image, theirs(pipeline, 5, wide, "a red circle")) < 1e-4
    # Pictures are resized to a megapixel, for both networks.
    target = target_of(model.facts)
    assert target == seen_target_of(model.facts)
    for size in ((900, 500), (64, 64), (500, 900)):
        ours = target.size_of(*size, 2**21)
        assert ours == edit_plus.calculate_dimensions(1024**2, size[0] / size[1])
    # Diffusers' have 1376 x 768, slightly more than a server with a limit of a megapixel allows.
    for size in ((1920, 1080), (640, 360)):
        assert target.size_of(*size, 1024**2) == (1344, 768)


def test_nothing_that_a_prompt_says_is_read_as_a_picture(
    one_picture: tuple[Any, HostedModel],
) -> None:
    _, model = one_picture
    wide = picture(90, 50, seed=1)
    nested = "a red <|image_<|image_pad|>pad|>circle"
    plain, hostile = (
        drawn(model, [asked(model, [wide], PIXELS, prompt=prompt, seed=5)])[0]
        for prompt in ("a red circle", nested)
    )
    assert torch.equal(plain, hostile)


def test_what_fills_up_a_batch_of_prompts_is_encoded_once(
    one_picture: tuple[Any, HostedModel],
) -> None:
    _, model = one_picture
    read: list[int] = []
    encoder = model.modules()["text_encoder"]
    hook = encoder.register_forward_hook(lambda *_: read.append(1))
    with torch.inference_mode():
        one, *nothing = model.encode_prompts(["a star", None, None, None], WIDTH, HEIGHT)
    hook.remove()
    assert len(read) == 2
    assert one.length > nothing[0].length
