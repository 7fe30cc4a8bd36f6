"""Images with image prompts are those of diffusers' own pipelines with the same IP-Adapters."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import current_thread
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from torch import Tensor

from guidance.edits import NormalizedAttention
from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.models.adapters.adapter import Weighted
from server.models.hosted import HostedModel
from server.models.image_prompts.image_prompt import ImagePromptUse
from server.models.image_prompts.region import region_of
from server.models.image_prompts.row_image_prompts import RowImagePrompt, RowImagePrompts
from server.models.loading import load_model
from tests.server.models import tiny_sd, tiny_sdxl
from tests.server.models.adapters.low_rank import adapter, changes, merged
from tests.server.models.alike import (
    as_diffusers,
    assert_among,
    assert_apart,
    task_of,
    their_start,
)
from tests.server.models.image_prompts.tiny_image_prompts import (
    cross_attention,
    put_adapter,
    put_encoder,
    shelf_of,
    use,
)
from tests.server.models.tiny_sdxl import BASE
from tests.server.toy_model import run, started

PROMPT = "a large red circle"
WIDTH, HEIGHT = 24, 16
STEPS = 4
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
COSTS = {1: 0.01, 8: 0.04}


class Prompted:
    """A pipeline, its model here, and IP-Adapters for both: two plain ones, and one called plus."""

    def __init__(self, pipeline: Any, folder: Path) -> None:
        pipeline.save_pretrained(folder / "model")
        self.pipeline = pipeline
        self.folder = folder / "adapters"
        put_adapter(pipeline.unet, self.folder, "plain", 1)
        put_adapter(pipeline.unet, self.folder, "other", 2)
        put_adapter(pipeline.unet, self.folder, "plus", 3, tokens=5)
        put_encoder(self.folder)
        self.model = load_model(folder / "model", name="tiny", device="cpu", dtype="float32")
        self.model.image_prompts = shelf_of(self.model, self.folder)

    @torch.inference_mode()
    def theirs(self, *uses: ImagePromptUse, seed: int = 5, **fields: Any) -> Tensor:
        """Final latents of their pipeline, from the same x as ours."""
        pipeline = self.pipeline
        latents = their_start(pipeline, STEPS, SHAPE, seed)
        settings = {"guidance_scale": 5.0, "num_inference_steps": STEPS, **fields}
        settings |= {"height": HEIGHT, "width": WIDTH}
        with self._loaded(uses):
            shown = {"ip_adapter_image": [[*map(pil, one.pictures)] for one in uses]}
            return pipeline(
                PROMPT,
                cross_attention_kwargs=masked(uses),
                latents=latents,
                output_type="latent",
                callback_on_step_end=switching(uses),
                **(shown if uses else {}),
                **settings,
            ).images[0]

    @contextmanager
    def _loaded(self, uses: tuple[ImagePromptUse, ...]) -> Generator[None]:
        if not uses:
            yield
            return
        files = [f"{one.adapter.name}.safetensors" for one in uses]
        self.pipeline.load_ip_adapter(
            str(self.folder), subfolder="", weight_name=files, low_cpu_mem_usage=False
        )
        self.pipeline.set_ip_adapter_scale([scale_at(one, 0) for one in uses])
        yield
        self.pipeline.unload_ip_adapter()


def scale_at(one: ImagePromptUse, step: int) -> float:
    return one.scale if one.acts(step, STEPS) else 0.0


def switching(uses: tuple[ImagePromptUse, ...]) -> Any:
    def switch(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if uses and step + 1 < STEPS:
            pipeline.set_ip_adapter_scale([scale_at(one, step + 1) for one in uses])
        return tensors

    return switch


def masked(uses: tuple[ImagePromptUse, ...]) -> dict[str, Any] | None:
    """Their masks at the size of the image, all white for those without a region."""
    if all(one.region is None for one in uses):
        return None
    processor: Any = IPAdapterMaskProcessor(vae_scale_factor=1)
    whole = torch.ones(HEIGHT, WIDTH)
    regions = [whole if one.region is None else one.region for one in uses]
    masks = [Image.fromarray((255 * one).byte().numpy()) for one in regions]
    made = processor.preprocess(masks, height=HEIGHT, width=WIDTH)
    return {"ip_adapter_masks": [one[None] for one in made]}


def pil(picture: Tensor) -> Image.Image:
    pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Prompted:
    return Prompted(tiny_sd.make(BASE), tmp_path_factory.mktemp("prompted"))


@pytest.fixture(scope="module")
def model(prompted: Prompted) -> HostedModel:
    return prompted.model


def asked(model: HostedModel, *uses: ImagePromptUse, **fields: Any) -> ImageTask:
    body = as_diffusers(PROMPT, WIDTH, HEIGHT, STEPS) | fields
    return replace(task_of(model, **body), image_prompts=uses)


@pytest.mark.parametrize("name", ["plain", "plus"])
def test_an_image_alone_is_that_of_diffusers(
    prompted: Prompted, model: HostedModel, engine: Engine, decoded: list[Tensor], name: str
) -> None:
    one = use(model, name, 1, scale=0.6)
    ear = run(engine, [asked(model, one)])
    assert not ear.errors, ear.errors
    assert_among(decoded, prompted.theirs(one))


def test_images_in_mixed_company_are_those_of_diffusers(
    prompted: Prompted, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    """Beside other adapters, none, two pictures at once, a window; one and two branches."""
    plain, other = use(model, "plain", 1, scale=0.6), use(model, "other", 2)
    plus, again = use(model, "plus", 3, scale=0.6), use(model, "plain", 4, scale=0.3)
    early = use(model, "plus", 1, end=0.5)
    tasks = [
        asked(model, plain, plus),
        asked(model, seed=6),
        asked(model, other, seed=7, guidance="none"),
        asked(model, early, seed=8, negative_prompt=PROMPT),
        asked(model, plain, again, seed=9),
        asked(model, plus, seed=10, sampler="heun", guidance="apg", steps=3),
    ]
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    assert_among(decoded, prompted.theirs(plain, plus))
    assert_among(decoded, prompted.theirs(seed=6))
    assert_among(decoded, prompted.theirs(other, seed=7, guidance_scale=1.0))
    # The negative prompt has the prompt's text here, but still gets no picture.
    assert_among(decoded, prompted.theirs(early, seed=8, negative_prompt=PROMPT))
    assert_among(decoded, prompted.theirs(plain, again, seed=9))
    # Each picture makes a difference that would be noticed.
    assert_apart(prompted.theirs(plain, plus), prompted.theirs(plain, early))


def test_several_pictures_are_attended_to_together_and_each_in_its_region(
    prompted: Prompted, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    """Checked alone and side by side."""
    left, middle = torch.zeros(2, HEIGHT, WIDTH)
    left[:, : WIDTH // 2] = 1
    middle[3:9, 5:16] = 1
    several = use(model, "plain", 1, 2, 3, scale=0.6)
    here, there = use(model, "plain", 4, region=left), use(model, "plus", 5, region=middle)
    whole = use(model, "plain", 6, scale=0.5)
    tasks = [
        asked(model, several),
        asked(model, here, seed=6),
        asked(model, here, there, whole, seed=7),
    ]
    theirs = prompted.theirs(here, seed=6)
    for together in ([tasks[1]], tasks):
        decoded.clear()
        ear = run(engine, together)
        assert not ear.errors, ear.errors
        assert_among(decoded, theirs)
    assert_among(decoded, prompted.theirs(several))
    assert_among(decoded, prompted.theirs(here, there, whole, seed=7))
    # The region makes a difference that would be noticed.
    assert_apart(theirs, prompted.theirs(replace(here, region=None), seed=6))


def test_images_of_stable_diffusion_xl_are_those_of_diffusers(tmp_path: Path) -> None:
    prompted = Prompted(tiny_sdxl.make(BASE), tmp_path)
    model, seen = prompted.model, list[Tensor]()
    decode = model.decode
    model.decode = lambda latents: seen.extend(latents.clone()) or decode(latents)
    plain, plus = use(model, "plain", 1, scale=0.6), use(model, "plus", 2, scale=0.6)
    engine = started(model, 16, guessed_costs=COSTS)
    ear = run(engine, [asked(model, plain), asked(model, plus, seed=6)])
    engine.stop(0)
    assert not ear.errors, ear.errors
    assert_among(seen, prompted.theirs(plain))
    assert_among(seen, prompted.theirs(plus, seed=6))


@torch.inference_mode()
def test_rows_without_are_not_moved_by_a_bit_nor_those_of_scale_0(model: HostedModel) -> None:
    x, t = torch.randn(4, *SHAPE), torch.tensor([900.0, 500.0, 500.0, 100.0])
    plain = model.inputs([PROMPT, "", "", "a star"], WIDTH, HEIGHT)
    one = use(model, "plain", 1)
    attention = model.image_attention
    assert attention is not None
    tokens = attention.tokens(one.adapter, one.pictures[0][None])[0]
    keys = attention.shown(one.adapter, tokens, tokens).picture
    rows = ((), (RowImagePrompt(keys, 1.0),), (RowImagePrompt(keys, 0.0),), ())
    half = torch.ones(HEIGHT, WIDTH)
    half[: HEIGHT // 2] = 0
    region = region_of(half, *SHAPE[1:])
    beside = (*rows[:3], (RowImagePrompt(keys, 1.0, region),))
    without, with_one, with_region = (
        model.evaluate(x, t, inputs)
        for inputs in (
            plain,
            replace(plain, image_prompts=RowImagePrompts(rows)),
            replace(plain, image_prompts=RowImagePrompts(beside)),
        )
    )
    assert torch.equal(without[[0, 2, 3]], with_one[[0, 2, 3]])
    assert_apart(without[1], with_one[1])
    assert torch.equal(with_one[:3], with_region[:3])
    assert_apart(with_one[3], with_region[3])


@torch.inference_mode()
def test_a_region_has_the_resolutions_of_the_layers_where_sides_are_odd(model: HostedModel) -> None:
    """Here 4 x 6 queries, which diffusers takes for 3 x 8 from the proportions of the mask."""
    height, width = 7, 12
    seen = set[int]()
    layers = cross_attention(model.modules()["unet"])
    watches = [
        layer.to_q.register_forward_hook(lambda _, __, queries: seen.add(queries.shape[1]))
        for layer in layers
    ]
    model.evaluate(
        torch.randn(1, 4, height, width), torch.tensor([500.0]), model.inputs([""], 24, 14)
    )
    for watch in watches:
        watch.remove()
    left = torch.zeros(2 * height, 2 * width)
    left[:, :width] = 1
    region = region_of(left, height, width)
    assert 4 * 6 in seen <= region.keys()
    columns = region[4 * 6].view(4, 6)
    torch.testing.assert_close(columns[:, [0, 1, 4, 5]], torch.tensor([1.0, 1, 0, 0]).expand(4, 4))


@pytest.mark.parametrize("prepares", [False, True])
def test_an_image_is_bit_identical_alone_and_in_company_where_the_server_is_deterministic(
    model: HostedModel, decoded: list[Tensor], monkeypatch: pytest.MonkeyPatch, *, prepares: bool
) -> None:
    rows: set[int] = set()
    alike = RowImagePrompts.alike

    def noted(prompts: RowImagePrompts) -> Any:
        made = alike(prompts)
        rows.update(len(one.rows) for one in made)
        return made

    monkeypatch.setattr(RowImagePrompts, "alike", noted)
    above = torch.zeros(HEIGHT, WIDTH)
    above[: HEIGHT // 2] = 1
    plain, plus = use(model, "plain", 1), use(model, "plus", 2, 5, scale=0.5, region=above)
    engine = started(model, 8, deterministic=True, guessed_costs=COSTS, prepares=prepares)
    company = [
        asked(model, seed=6),
        asked(model, use(model, "plus", 3), seed=7),
        asked(model, use(model, "plain", 3), plus, plain),
    ]
    made: list[list[Tensor]] = []
    for tasks in (company[2:], company):
        decoded.clear()
        ear = run(engine, tasks)
        assert not ear.errors, ear.errors
        made.append(list(decoded))
    engine.stop(0)
    assert any(torch.equal(made[0][0], one) for one in made[1])
    # These may be equal by chance: libraries choose the order of sums by the number of rows.
    assert rows == {8}


def test_a_lora_and_a_perturbation_act_beside_it_as_in_diffusers(
    prompted: Prompted, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    """A LoRA of the layers that attend to the picture; the perturbed row gets the picture, too."""
    style = adapter("style", {"unet": changes(prompted.pipeline.unet, 4, within="attn2")})
    adapted = (Weighted(style, 0.7),)
    unet = merged(prompted.pipeline.unet, "unet", adapted)
    perturbed = copy(prompted)
    perturbed.pipeline = StableDiffusionPAGPipeline(
        **prompted.pipeline.components | {"unet": unet}, requires_safety_checker=False
    )
    perturbed.pipeline.set_progress_bar_config(disable=True)
    one = use(model, "plus", 1, scale=0.6)
    guidance = {"name": "cfg", "scale": 5.0, "perturbed": [{"name": "pag", "scale": 2.0}]}
    task = replace(asked(model, one, guidance=guidance), adapters=adapted)
    ear = run(engine, [task, asked(model, seed=6)])
    assert not ear.errors, ear.errors
    assert_among(decoded, perturbed.theirs(one, pag_scale=2.0))


@torch.inference_mode()
def test_normalized_attention_guidance_leads_the_attention_to_the_text_alone(
    model: HostedModel,
) -> None:
    """At the first layer, where all rows have the same input, the effects add up."""
    x, t = torch.randn(1, *SHAPE).expand(4, -1, -1, -1), torch.full((4,), 500.0)
    inputs = model.inputs([PROMPT] * 4, WIDTH, HEIGHT)
    one, attention = use(model, "plain", 1), model.image_attention
    assert attention is not None
    tokens = attention.tokens(one.adapter, one.pictures[0][None])[0]
    shown = RowImagePrompt(attention.shown(one.adapter, tokens, tokens).picture, 1.0)
    led, unled = (NormalizedAttention(scale=5.0, tau=2.5, alpha=0.5),), ()
    inputs = replace(
        inputs,
        edits=[unled, unled, led, led],
        against=model.inputs(["a green star"] * 4, WIDTH, HEIGHT).conditioning,
        image_prompts=RowImagePrompts(((), (shown,), (), (shown,))),
    )
    attended: list[Tensor] = []
    first: Any = cross_attention(model.modules()["unet"])[0]
    watch = first.to_out[0].register_forward_hook(lambda _, args, __: attended.append(args[0]))
    model.evaluate(x, t, inputs)
    watch.remove()
    # The last call: in the one before, the network attended to the text to be avoided.
    plain, pictured, away, both = attended[-1]
    torch.testing.assert_close(both - away, pictured - plain, rtol=1e-4, atol=1e-5)
    assert_apart(away, plain)
    assert_apart(pictured, plain)


def test_a_picture_is_encoded_once_for_all_that_show_it(
    model: HostedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = model.image_attention
    assert attention is not None
    encode, seen = attention.tokens, list[int]()
    monkeypatch.setattr(
        attention, "tokens", lambda one, batch: seen.append(len(batch)) or encode(one, batch)
    )
    twice, other = use(model, "plain", 21), use(model, "plain", 22)
    alone = {"steps": 1, "guidance": "none"}
    tasks = [asked(model, twice, other, **alone), asked(model, twice, seed=6, **alone)]
    for _ in range(2):
        ear = run(engine, tasks)
        assert not ear.errors, ear.errors
    assert seen == [2]


def test_the_engine_s_thread_does_not_look_through_pictures(
    model: HostedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(content: bytes) -> Any:
        threads.append(current_thread().name)
        return sha256(content)

    monkeypatch.setattr("server.models.image_prompts.image_prompt.sha256", noted)
    ear = run(engine, [asked(model, use(model, "plain", 23), steps=1)])
    assert not ear.errors
    assert threads == [current_thread().name]


def test_a_picture_that_cannot_be_encoded_fails_its_own_image(
    model: HostedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = model.image_attention
    assert attention is not None
    encode, bad, good = attention.tokens, use(model, "plain", 31), use(model, "plain", 32)

    def breaking(adapter: Any, batch: Tensor) -> Tensor:
        if any(torch.equal(one, bad.pictures[0]) for one in batch):
            raise ValueError("no such picture")
        return encode(adapter, batch)

    monkeypatch.setattr(attention, "tokens", breaking)
    ear = run(engine, [asked(model, one, steps=1) for one in (bad, good)])
    assert list(ear.errors) == [0]
    assert list(ear.results) == [1]


def test_an_adapter_is_let_go_of_with_the_last_image_that_has_it(
    model: HostedModel, engine: Engine
) -> None:
    passing = use(model, "other", 1)
    gone = weakref.ref(passing.adapter)
    run(engine, [asked(model, passing, steps=1)])
    run(engine, [asked(model, steps=1)])
    del passing
    model.image_prompts.forget()
    gc.collect()
    assert gone() is None
