"""Z-Image is what diffusers' own pipeline makes of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image import pipeline_z_image_img2img
from torch import Tensor

from guidance.edits import IdentityAttention, SkippedBlocks
from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.errors import ModelMismatch
from server.models.adapters.adapter import Adapter, LowRank, RowAdapters, Weighted
from server.models.chat_text import TEXT
from server.models.conditioning import MASK
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models.alike import assert_among, assert_apart, task_of
from tests.server.models.tiny_z_image import BASE_SHIFT, TRANSFORMER, TURBO_SHIFT, make
from tests.server.toy_model import run, started

PROMPT = "a large red circle"
WIDTH, HEIGHT = 48, 40
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
LONG = "a small blue square above " * 3
GUIDED = {"name": "cfg", "scale": 4.0}
SLG = {"name": "slg", "start": 0.0, "stop": 1.0}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(BASE_SHIFT)


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    folder = tmp_path_factory.mktemp("models") / "z"
    pipeline.save_pretrained(folder)
    return load(folder)


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="z", device="cpu", dtype="float32")


def asked(model: HostedModel, **fields: Any) -> Any:
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "width": WIDTH,
        "height": HEIGHT,
        "seed": 5,
        "steps": 3,
        "guidance": GUIDED,
        **fields,
    }
    return task_of(model, **body)


@torch.inference_mode()
def theirs(
    pipeline: Any, seed: int = 5, prompt: str = PROMPT, scale: float = 3.0, **fields: Any
) -> Tensor:
    """Final latents of their pipeline, whose scale counts from 0."""
    given = {"num_inference_steps": 3, "width": WIDTH, "height": HEIGHT, **fields}
    latents = start_noise(seed, (4, given["height"] // 2, given["width"] // 2))[None]
    answer = pipeline(prompt, guidance_scale=scale, latents=latents, output_type="latent", **given)
    return answer.images[0]


def test_final_latents_alone_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model)])
    assert_among(decoded, theirs(pipeline))
    # Diffusers' scale of 4 is 5 here.
    assert_apart(decoded[0], theirs(pipeline, scale=4.0))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    company: list[dict[str, Any]] = [
        {},
        {"prompt": LONG, "negative_prompt": "a green star", "seed": 6},
        {"prompt": LONG, "guidance": "none", "seed": 7},
        {"prompt": LONG * 2, "sampler": "dpm_solver_pp", "guidance": "apg", "seed": 8},
        {"sampler": "heun", "steps": 2, "guidance": {**GUIDED, "perturbed": [SLG]}, "seed": 9},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline))
    assert_among(decoded, theirs(pipeline, 6, LONG, negative_prompt="a green star"))
    assert_among(decoded, theirs(pipeline, 7, LONG, scale=0.0))


def test_guidance_is_capped_and_cut_off_as_by_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    # Once the signal is more than .1, diffusers stops guidance; there sigma / alpha is 9.
    capped = {"name": "cfg", "scale": 9.0, "cfg_norm": {"variant": "picture"}}
    cut = {"name": "cfg", "scale": 9.0, "policy": {"name": "interval", "low": 9.0, "high": None}}
    ear = run(engine, [asked(model, guidance=capped), asked(model, guidance=cut)])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline, scale=8.0, cfg_normalization=True))
    assert_among(decoded, theirs(pipeline, scale=8.0, cfg_truncation=0.1))
    assert_apart(decoded[0], decoded[1])
    assert_apart(theirs(pipeline, scale=8.0), theirs(pipeline, scale=8.0, cfg_normalization=True))


def test_final_latents_among_other_sizes_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, decoded: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.cost_model.TickCost.observe", lambda *_: 1.0)
    monkeypatch.setattr("server.engine.cost_model.TickCost.is_guess", False)
    sizes = (WIDTH, HEIGHT), (32, 80), (64, 64)
    engine = started(model, 16)
    before = engine.measurements.ticks
    tasks = [asked(model, seed=seed, width=w, height=h) for seed, (w, h) in enumerate(sizes, 5)]
    ear = run(engine, [*tasks, asked(model, prompt=LONG, guidance="none", seed=8)])
    engine.stop(0)
    assert not ear.errors, ear.errors
    assert engine.measurements.ticks - before == 3
    for seed, (width, height) in enumerate(sizes, 5):
        assert_among(decoded, theirs(pipeline, seed, width=width, height=height))
    assert_among(decoded, theirs(pipeline, 8, LONG, scale=0.0))


@torch.inference_mode()
def test_rows_of_unlike_texts_are_what_the_transformers_own_forward_makes(
    pipeline: Any, model: HostedModel
) -> None:
    texts = ["", PROMPT, LONG]
    told = model.encode_prompts(texts, WIDTH, HEIGHT)
    x = torch.stack([start_noise(seed, SHAPE) for seed in range(3)])
    t = torch.tensor([0.1, 0.5, 0.9])
    captions = [one.tensors[TEXT] for one in told]
    made = pipeline.transformer(list(x.unsqueeze(2)), t, captions, return_dict=False)[0]
    stacked = model.stack(told)
    assert MASK in stacked.tensors
    ours = model.evaluate(x, t, RowInputs(stacked))
    torch.testing.assert_close(ours, -torch.stack(made)[:, :, 0], rtol=1e-5, atol=1e-5)
    # Texts are padded with learned tokens that are attended to, and no further.
    stacked.tensors[MASK].fill_(True)
    assert_apart(ours[0], model.evaluate(x, t, RowInputs(stacked))[0])


@torch.inference_mode()
def test_rows_of_unlike_sizes_are_what_the_transformers_own_forward_makes_of_each_alone(
    pipeline: Any, model: HostedModel
) -> None:
    # Pictures of 1024, 120 and 176 tokens; the latter two are padded with learned tokens.
    texts, shapes = [PROMPT, PROMPT, LONG, ""], [(64, 64), SHAPE[1:], SHAPE[1:], (16, 44)]
    told = model.encode_prompts(texts, WIDTH, HEIGHT)
    x = [start_noise(seed, (4, *shape)) for seed, shape in enumerate(shapes)]
    t = torch.tensor([0.1, 0.5, 0.9, 0.3])
    parts = [x[0][None], torch.stack(x[1:3]), x[3][None]]
    assert model.mixes_sizes
    ours = model.evaluate_sizes(parts, t, RowInputs(model.stack(told)))
    assert [part.shape for part in ours] == [part.shape for part in parts]
    for row, made in enumerate(one for part in ours for one in part):
        caption = [told[row].tensors[TEXT]]
        alone = pipeline.transformer(
            [x[row].unsqueeze(1)], t[row : row + 1], caption, return_dict=False
        )[0]
        torch.testing.assert_close(made, -alone[0][:, 0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_a_row_changes_inside_the_network_is_its_own_among_other_sizes(
    model: HostedModel,
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, 20, width, generator=generator) for width in (24, 36)]
    layers: dict[str, LowRank] = {
        name: LowRank(torch.randn(2, read), torch.randn(64, 2))
        for name, read in {"all_x_embedder.2-1": 16, "layers.0.attention.to_q": 64}.items()
    }
    adapted = (Weighted(Adapter("one", "0", {"transformer": layers}), 0.5),)
    skipped = (SkippedBlocks(("layers.1",)),)
    told = model.stack(model.encode_prompts([PROMPT], WIDTH, HEIGHT) * 4)
    adapters = RowAdapters((adapted, (), (), adapted))
    inputs, t = RowInputs(told, [(), skipped, skipped, ()], adapters=adapters), torch.rand(4)
    ours = [row for part in model.evaluate_sizes(parts, t, inputs) for row in part]
    for k, x in enumerate(row for part in parts for row in part):
        [alone] = model.evaluate(x[None], t[k : k + 1], inputs.of([k]))
        torch.testing.assert_close(ours[k], alone, rtol=1e-4, atol=1e-5)
        [plain] = model.evaluate(x[None], t[k : k + 1], model.inputs([PROMPT]))
        assert_apart(plain, ours[k])


@torch.inference_mode()
def test_the_text_is_the_state_before_the_last_layer_with_thinking_enabled(
    pipeline: Any, model: HostedModel
) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    [expected] = pipeline._encode_prompt(PROMPT)
    torch.testing.assert_close(ours.tensors[TEXT], expected, rtol=1e-4, atol=1e-3)
    messages, template = [{"role": "user", "content": PROMPT}], pipeline.tokenizer
    for thinking in (True, False):
        tokens = template.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=thinking, return_tensors="pt"
        ).input_ids
        assert (tokens.shape[1] == len(expected)) == thinking
        if thinking:
            last = pipeline.text_encoder(tokens).last_hidden_state[0]
            assert_apart(ours.tensors[TEXT], last)


def test_prompts_are_counted_without_the_template(model: HostedModel) -> None:
    assert model.count_tokens(PROMPT) == len(PROMPT)
    assert model.facts.max_tokens == 512 - len("user\n\nassistant\n") - 3


def test_the_unconditional_is_the_empty_prompt(model: HostedModel) -> None:
    nothing, empty = model.encode_prompts([None, ""], WIDTH, HEIGHT)
    assert torch.equal(nothing.tensors[TEXT], empty.tensors[TEXT])


def test_blocks_can_be_skipped_and_attention_cannot_be_edited(model: HostedModel) -> None:
    assert model.refuses(SkippedBlocks(("layers.1",))) is None
    assert model.refuses(IdentityAttention(("layers.1",))) == (
        "has a ZImageTransformer2DModel, whose attention cannot be edited; use `slg`, which skips "
        "blocks, or guidance without it, such as `cfg` or `apg`"
    )
    assert set(model.adaptable()) == {"transformer"}


def test_a_picture_comes_back_from_its_latents_as_diffusers_scales_them(
    pipeline: Any, model: HostedModel
) -> None:
    pixels = torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
    with torch.inference_mode():
        latents = model.encode_image(pixels)
        mean = pipeline.vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)
        torch.testing.assert_close(model.decode(latents), pipeline.vae.decode(mean).sample)


@torch.inference_mode()
def test_image_to_image_is_that_of_diffusers(
    pipeline: Any,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = torch.rand(3, HEIGHT, WIDTH) * 2 - 1
    run(engine, [asked(model, image=picture, strength=0.6, steps=4)])
    monkeypatch.setattr(
        pipeline_z_image_img2img, "randn_tensor", lambda *_, **__: start_noise(5, SHAPE)[None]
    )
    anew: Any = ZImageImg2ImgPipeline(**pipeline.components)
    anew.set_progress_bar_config(disable=True)
    # With as many channels as latents, it is taken for latents.
    given: dict[str, Any] = {"image": model.encode_image(picture[None]), "strength": 0.6}
    same = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": 4, "output_type": "latent"}
    made = anew(PROMPT, guidance_scale=3.0, **given, **same).images
    assert_among(decoded, made[0])


def test_a_row_is_equal_to_the_bit_beside_longer_texts_where_that_is_asked_for(
    model: HostedModel, decoded: list[Tensor]
) -> None:
    engine = started(model, 4, deterministic=True)
    decoded.clear()
    run(engine, [asked(model, steps=2)])
    alone = decoded[0]
    decoded.clear()
    run(engine, [asked(model, steps=2), asked(model, steps=2, prompt=LONG, seed=6)])
    engine.stop(0)
    assert any(torch.equal(alone, one) for one in decoded)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"axes_lens": [256, 64, 64]}, "axes_lens that begin with 256; .* need at least 514"),
        ({"all_patch_size": [4]}, "has no tokens of 2 x 2 cells"),
    ],
)
def test_a_transformer_without_positions_for_a_text_or_of_other_tokens_is_refused(
    pipeline: Any, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    pipeline.save_pretrained(tmp_path)
    ZImageTransformer2DModel(**{**TRANSFORMER, **config}).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ModelMismatch, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    ("shift", "steps", "guidance"), [(BASE_SHIFT, 50, "cfg"), (TURBO_SHIFT, 8, "none")]
)
def test_a_bare_request_takes_what_the_model_was_made_for(
    shift: float, steps: int, guidance: str, tmp_path: Path
) -> None:
    make(shift).save_pretrained(tmp_path)
    settings = resolve(GenerateRequest(prompt=PROMPT), load(tmp_path), Limits(), None).settings()
    assert settings["sampler"]["name"] == "euler"
    assert settings["spacing"]["name"] == "trailing"
    assert (settings["steps"], settings["guidance"]["name"]) == (steps, guidance)
