"""Stable Diffusion XL is what diffusers' own pipeline makes of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.engine.engine import Engine
from server.engine.state.noise import stage_noise
from server.engine.task import ImageTask
from server.errors import ModelMismatch
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.unet_model import TEXT
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models.alike import as_diffusers, task_of, their_start
from tests.server.models.tiny_sdxl import BASE, TURBO, make, saved
from tests.server.toy_model import run, started

PROMPT = "a large red circle"
WIDTH, HEIGHT = 64, 48
STEPS = 4
SHAPE = (4, HEIGHT // 2, WIDTH // 2)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(BASE)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(pipeline, tmp_path_factory.mktemp("models") / "xl")


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def load(folder: Path, dtype: str = "float32") -> HostedModel:
    return load_model(folder, name="xl", device="cpu", dtype=dtype)


def asked(model: HostedModel, **fields: Any) -> ImageTask:
    return task_of(model, **as_diffusers(PROMPT, WIDTH, HEIGHT, STEPS) | fields)


@torch.inference_mode()
def theirs(pipeline: Any, seed: int = 5, steps: int = STEPS, **fields: Any) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    latents = their_start(pipeline, steps, SHAPE, seed)
    given = {"guidance_scale": 5.0, "width": WIDTH, "height": HEIGHT, **fields}
    answer = pipeline(
        PROMPT, num_inference_steps=steps, latents=latents, output_type="latent", **given
    )
    return answer.images[0]


def assert_among(seen: list[Tensor], expected: Tensor) -> None:
    alike = [one for one in seen if one.shape == expected.shape]
    errors = [float((one - expected).norm() / expected.norm()) for one in alike]
    assert min(errors) < 1e-4, errors


def assert_apart(ours: Tensor, sprung: Tensor) -> None:
    """Check that a mistake would be visible; a test that avoids it would show nothing otherwise."""
    assert float((ours - sprung).norm() / ours.norm()) > 1e-2


def test_the_folder_is_hosted_by_its_own_words(model: HostedModel) -> None:
    facts = model.facts
    assert (facts.default_width, facts.default_height) == (64, 64)
    assert (facts.latent_scale, facts.size_multiple, facts.max_tokens) == (2, 2, 30)
    assert set(model.modules()) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert model.count_tokens(PROMPT) == 4


def test_final_latents_alone_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model)])
    assert_among(decoded, theirs(pipeline))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    company: list[dict[str, Any]] = [
        {},
        {"negative_prompt": "a green star", "seed": 6},
        {"negative_prompt": "", "seed": 7},
        {"guidance": "none", "seed": 8},
        {"sampler": "dpm_solver_pp", "guidance": "apg", "steps": 3, "seed": 9},
        {"sampler": "heun", "guidance": {"name": "cfg", "perturbed": ["pag"]}, "seed": 10},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline))
    assert_among(decoded, theirs(pipeline, 6, negative_prompt="a green star"))
    assert_among(decoded, theirs(pipeline, 7, negative_prompt=""))
    assert_among(decoded, theirs(pipeline, 8, guidance_scale=1.0))
    assert_apart(theirs(pipeline, 7, negative_prompt=""), theirs(pipeline, 7))


@torch.inference_mode()
def test_both_encoders_states_before_the_last_layer_are_read_not_normalised(
    pipeline: Any, model: HostedModel
) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    expected, *_ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.tensors[TEXT], expected[0])
    tokens = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    last = pipeline.text_encoder(tokens)[0][0]
    assert_apart(ours.tensors[TEXT][:, :32], last)


@torch.inference_mode()
def test_the_pooled_vector_is_the_second_encoders_projected_one(
    pipeline: Any, model: HostedModel
) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    _, _, expected, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    pooled = ours.tensors["text_embeds"]
    torch.testing.assert_close(pooled, expected[0])
    tokens = pipeline.tokenizer_2(PROMPT, padding="max_length", return_tensors="pt").input_ids
    assert_apart(pooled, pipeline.text_encoder_2.text_model(tokens).pooler_output[0])


@torch.inference_mode()
def test_each_tokenizer_pads_with_its_own_token(pipeline: Any, model: HostedModel) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    second = ours.tensors[TEXT][:, 32:]
    for tokenizer, same in ((pipeline.tokenizer_2, True), (pipeline.tokenizer, False)):
        tokens = tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
        states = pipeline.text_encoder_2(tokens, output_hidden_states=True).hidden_states[-2][0]
        if same:
            torch.testing.assert_close(second, states)
        else:
            assert_apart(second, states)


@torch.inference_mode()
def test_the_unconditional_is_zeros_and_the_empty_prompt_is_encoded(
    pipeline: Any, model: HostedModel
) -> None:
    nothing, empty = model.encode_prompts([None, ""], WIDTH, HEIGHT)
    for name in (TEXT, "text_embeds"):
        assert not nothing.tensors[name].any()
    _, expected, _, pooled = pipeline.encode_prompt(PROMPT, negative_prompt="")
    torch.testing.assert_close(empty.tensors[TEXT], expected[0])
    torch.testing.assert_close(empty.tensors["text_embeds"], pooled[0])
    torch.testing.assert_close(empty.tensors["time_ids"], nothing.tensors["time_ids"])


def test_a_folder_may_say_that_the_unconditional_is_the_empty_prompt(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "xl"))
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    nothing, empty = load(copy).encode_prompts([None, ""], WIDTH, HEIGHT)
    torch.testing.assert_close(nothing.tensors[TEXT], empty.tensors[TEXT])


def test_sizes_are_told_height_first_original_crop_and_target(
    pipeline: Any, model: HostedModel
) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    size = (HEIGHT, WIDTH)
    width = pipeline.text_encoder_2.config.projection_dim
    expected = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, width)
    torch.testing.assert_close(ours.tensors["time_ids"], expected[0])
    assert ours.tensors["time_ids"].tolist() == [48, 64, 0, 0, 48, 64]


def test_images_of_several_sizes_are_each_told_their_own(
    model: HostedModel, engine: Engine
) -> None:
    wide, tall = asked(model), asked(model, width=HEIGHT, height=WIDTH)
    ear = run(engine, [wide, tall])
    assert {ear.results[0].pixels.shape, ear.results[1].pixels.shape} == {
        (HEIGHT, WIDTH, 3),
        (WIDTH, HEIGHT, 3),
    }


def test_sizes_of_odd_numbers_of_cells_are_those_of_diffusers(
    pipeline: Any,
    model: HostedModel,
    engine: Engine,
    decoded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size: dict[str, Any] = {"width": 62, "height": 26}
    blurred = {"name": "cfg", "perturbed": [{"name": "seg", "sigma": 1.0}]}
    ear = run(engine, [asked(model, **size), asked(model, guidance=blurred, seed=6, **size)])
    assert not ear.errors, ear.errors
    # Their autoencoders have cells of 8 x 8 pixels, this one of 2 x 2.
    monkeypatch.setattr(pipeline, "check_inputs", lambda *_, **__: None)
    monkeypatch.setattr("tests.server.models.test_stable_diffusion_xl.SHAPE", (4, 13, 31))
    assert_among(decoded, theirs(pipeline, **size))


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo_draws_in_a_few_steps_without_guidance(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turbo = make(TURBO)
    model = load(saved(turbo, tmp_path / "turbo"))
    stages = iter(range(steps))
    monkeypatch.setattr(
        scheduling_euler_ancestral_discrete,
        "randn_tensor",
        lambda *_, **__: stage_noise(5, next(stages), SHAPE)[None],
    )
    expected = theirs(turbo, steps=steps, guidance_scale=0.0)
    task = asked(model, sampler="euler_ancestral", spacing="trailing", guidance="none", steps=steps)
    seen: list[Tensor] = []
    decode: Callable[[Tensor], Tensor] = model.decode
    engine = started(model, 4)
    monkeypatch.setattr(model, "decode", lambda latents: seen.extend(latents) or decode(latents))
    [result] = run(engine, [task]).results.values()
    engine.stop(0)
    assert result.evaluations == steps
    assert_among(seen, expected)


@pytest.fixture(scope="module")
def turbo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the size that the published U-Net states; its layers do not depend on it."""
    made = saved(make(TURBO), tmp_path_factory.mktemp("models") / "turbo")
    edit(made / "unet" / "config.json", sample_size=64)
    return made


def test_a_bare_request_to_turbo_takes_four_steps_without_guidance(turbo_folder: Path) -> None:
    request = GenerateRequest(prompt=PROMPT)
    settings = resolve(request, load(turbo_folder), Limits(), None).settings()
    assert settings["sampler"]["name"] == "euler_ancestral"
    assert settings["spacing"]["name"] == "trailing"
    assert settings["steps"] == 4
    assert settings["guidance"]["name"] == "none"


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "leading"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("unet/config.json", {"sample_size": 128}),
    ],
    ids=["lightning", "spacing", "prediction", "size"],
)
def test_a_folder_that_differs_from_turbo_gets_the_usual_defaults(
    turbo_folder: Path, tmp_path: Path, file: str, fields: dict[str, Any]
) -> None:
    copy = Path(shutil.copytree(turbo_folder, tmp_path / "xl"))
    edit(copy / file, **fields)
    assert load(copy).facts.defaults is None


def test_in_float16_the_autoencoder_stays_in_float32_where_the_folder_says_so(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "xl"))
    for upcast, dtype in ((True, torch.float32), (False, torch.float16)):
        edit(copy / "vae" / "config.json", force_upcast=upcast)
        parts: dict[str, Any] = dict(load(copy, "float16").modules())
        assert (parts["vae"].dtype, parts["unet"].dtype) == (dtype, torch.float16)


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
            "names the pipeline 'StableDiffusionXLImg2ImgPipeline'; allowed are .*XLPipeline",
        ),
        (
            "model_index.json",
            {"text_encoder": [None, None]},
            "names 'None' as its text_encoder; allowed are CLIPTextModel",
        ),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "as its text_encoder_2; allowed are CLIPTextModelWithProjection",
        ),
    ],
)
def test_relatives_that_are_not_hosted_are_refused_by_name(
    folder: Path, tmp_path: Path, file: str, fields: dict[str, Any], says: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "xl"))
    edit(copy / file, **fields)
    with pytest.raises(ModelMismatch, match=says):
        load(copy)


def test_a_unet_that_is_told_no_sizes_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "xl"))
    edit(copy / "unet" / "config.json", addition_embed_type=None)
    [file] = (copy / "unet").glob("*.safetensors")
    told = {k: v for k, v in load_file(file).items() if not k.startswith("add_embedding")}
    save_file(told, file)
    with pytest.raises(ModelMismatch, match="has the addition_embed_type None"):
        load(copy)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
