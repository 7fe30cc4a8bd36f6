"""SANA and SANA-Sprint are what diffusers' own pipelines make of the same weights."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_scm
from torch import Tensor

from guidance.edits import IdentityAttention
from samplers import NoiseSchedule
from samplers.names import of_diffusers
from server.engine.engine import Engine
from server.engine.state.noise import stage_noise, start_noise
from server.errors import ModelMismatch
from server.models.conditioning import MASK
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.sana import INSTRUCTION, LENGTH, TEXT
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models.alike import assert_among, assert_apart, assert_skipped, task_of
from tests.server.models.tiny_sana import TIMESTEP_SCALE, autoencoder, make
from tests.server.toy_model import run, started

PROMPT = "a Red circle "
WIDTH, HEIGHT = 64, 32
SHAPE = (4, HEIGHT // 2, WIDTH // 2)


def saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def load(folder: Path) -> HostedModel:
    return load_model(folder, name="sana", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make(sprint=False)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(pipeline, tmp_path_factory.mktemp("models") / "sana")


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load(folder)


def asked(model: HostedModel, **fields: Any) -> Any:
    body: dict[str, Any] = {"prompt": PROMPT, "width": WIDTH, "height": HEIGHT, "seed": 5}
    body |= {"steps": 4, **fields}
    return task_of(model, **body)


@torch.inference_mode()
def theirs(pipeline: Any, seed: int = 5, prompt: str = PROMPT, **fields: Any) -> Tensor:
    """Final latents of their pipeline, from the same x as ours."""
    given: dict[str, Any] = {
        "latents": start_noise(seed, SHAPE)[None],
        "num_inference_steps": 4,
        "width": WIDTH,
        "height": HEIGHT,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    if type(pipeline).__name__ == "SanaPipeline":
        # Diffusers' noise has standard deviation 1, where the level's is .9997.
        pipeline.scheduler.set_timesteps(1)
        given["latents"] = given["latents"] * pipeline.scheduler.sigmas[0]
    return pipeline(prompt, **given | fields).images[0]


def test_final_latents_alone_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model)])
    assert_among(decoded, theirs(pipeline))
    assert_apart(decoded[0], theirs(pipeline, complex_human_instruction=None))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    company: list[dict[str, Any]] = [
        {},
        {"prompt": "a star", "negative_prompt": "a blue square and a ring", "seed": 6},
        {"guidance": "none", "steps": 3, "seed": 7},
        {"sampler": "heun", "guidance": "apg", "steps": 3, "seed": 8},
        # The same text as a prompt and as a negative one.
        {"prompt": "a star", "negative_prompt": "a star", "seed": 9},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline))
    negative = "a blue square and a ring"
    assert_among(decoded, theirs(pipeline, 6, "a star", negative_prompt=negative))
    assert_among(decoded, theirs(pipeline, 7, guidance_scale=1.0, num_inference_steps=3))
    assert_among(decoded, theirs(pipeline, 9, "a star", negative_prompt="a star"))


@torch.inference_mode()
def test_a_text_is_the_end_of_what_is_read_behind_the_instruction(
    pipeline: Any, model: HostedModel
) -> None:
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"]
    lines = instruction.default
    assert "\n".join(lines) == INSTRUCTION
    long = "x" * 2 * LENGTH
    for prompt in (PROMPT, "", long):
        states, mask, against, told = pipeline.encode_prompt(
            prompt, negative_prompt=prompt, complex_human_instruction=lines
        )
        [ours, negative] = model.encode_prompts([prompt, model.negative(prompt)], WIDTH, HEIGHT)
        expected = states[0][mask[0].bool()]
        torch.testing.assert_close(ours.tensors[TEXT], expected, rtol=1e-4, atol=1e-4)
        expected = against[0][told[0].bool()]
        torch.testing.assert_close(negative.tensors[TEXT], expected, rtol=1e-4, atol=1e-4)
    [unconditional, empty] = model.encode_prompts([None, model.negative("")], WIDTH, HEIGHT)
    torch.testing.assert_close(unconditional.tensors[TEXT], empty.tensors[TEXT])
    assert model.count_tokens(PROMPT) == len(PROMPT.strip())
    assert ours.length == LENGTH == model.facts.max_tokens + 2


@torch.inference_mode()
def test_a_row_does_not_attend_to_the_padding_behind_its_text(model: HostedModel) -> None:
    x, t = torch.randn(2, *SHAPE), torch.tensor([500.0, 20.0])
    texts = ["a star", "a large red circle beside a ring"]
    both = model.inputs(texts, WIDTH, HEIGHT)
    together = model.evaluate(x, t, both)
    for row, text in enumerate(texts):
        [alone] = model.evaluate(x[row, None], t[row, None], model.inputs([text], WIDTH, HEIGHT))
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
    fixed = model.stack(model.encode_prompts(texts, WIDTH, HEIGHT), fixed=True)
    assert fixed.tensors[TEXT].shape[1] == LENGTH
    torch.testing.assert_close(model.evaluate(x, t, RowInputs(fixed)), together)
    told = {name: one for name, one in both.conditioning.tensors.items() if name != MASK}
    unmasked = model.evaluate(x, t, RowInputs(type(both.conditioning)(told)))
    assert not torch.allclose(together[0], unmasked[0], atol=1e-3)


def test_levels_and_whole_timesteps_are_those_of_the_scheduler(
    pipeline: Any, model: HostedModel
) -> None:
    pipeline.scheduler.set_timesteps(7)
    config = {**pipeline.scheduler.config, "_class_name": "DPMSolverMultistepScheduler"}
    _, spacing = of_diffusers(config)
    grid = NoiseSchedule.from_diffusers(config).grid(spacing, 7)
    torch.testing.assert_close(torch.tensor(grid.sigma).float(), pipeline.scheduler.sigmas)
    expected = TIMESTEP_SCALE * pipeline.scheduler.timesteps
    assert model.network_time(grid.t[:-1]).tolist() == expected.tolist()


def test_pictures_go_through_the_autoencoder_and_back(pipeline: Any, model: HostedModel) -> None:
    pixels = torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1
    with torch.inference_mode():
        latents = pipeline.vae.encode(pixels).latent * 0.41407
        torch.testing.assert_close(model.encode_image(pixels), latents, rtol=1e-4, atol=1e-4)
        expected = pipeline.vae.decode(latents / 0.41407).sample
        torch.testing.assert_close(model.decode(latents), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def sprint() -> Any:
    return make(sprint=True)


@pytest.fixture(scope="module")
def sprinter(sprint: Any, tmp_path_factory: pytest.TempPathFactory) -> HostedModel:
    return load(saved(sprint, tmp_path_factory.mktemp("models") / "sprint"))


def test_sprint_draws_in_a_few_steps_and_is_told_its_scale(
    sprint: Any, sprinter: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    decode, engine = sprinter.decode, started(sprinter, 4)
    monkeypatch.setattr(sprinter, "decode", lambda latents: seen.extend(latents) or decode(latents))
    company: list[dict[str, Any]] = [
        {"steps": 2},
        {"steps": 1, "guidance": {"name": "cfg", "scale": 20.0, "policy": "embedded"}},
        {"steps": 3, "guidance": "none", "prompt": "a star beside a ring"},
        {"sampler": "heun", "guidance": "none", "seed": 7},
    ]
    with monkeypatch.context() as patched:
        # This call waits for the device, which a tick may do only once, at its end.
        patched.setattr(Tensor, "new_tensor", None)
        ear = run(engine, [asked(sprinter, **one) for one in company])
    engine.stop(0)
    assert not ear.errors, ear.errors

    def drawn(prompt: str = PROMPT, **fields: Any) -> Tensor:
        stages = iter(range(3))
        monkeypatch.setattr(
            scheduling_scm,
            "randn_tensor",
            lambda *_, **__: stage_noise(5, next(stages), SHAPE)[None],
        )
        return theirs(sprint, prompt=prompt, **fields)

    usual = drawn(num_inference_steps=2)
    assert_among(seen, usual)
    even: dict[str, Any] = {"intermediate_timesteps": None}
    assert_among(seen, drawn(num_inference_steps=1, guidance_scale=20.0, **even))
    told_nothing = {"num_inference_steps": 3, "guidance_scale": 1.0}
    assert_among(seen, drawn("a star beside a ring", **told_nothing, **even))
    # As if the scale were passed unchanged, and as if the second angle were half way.
    assert_apart(usual, drawn(num_inference_steps=2, guidance_scale=45.0))
    assert_apart(usual, drawn(num_inference_steps=2, **even))


def test_bare_requests_are_sampled_as_the_pipelines_sample(
    model: HostedModel, sprinter: HostedModel
) -> None:
    expected = [
        (model, "dpm_solver_pp", "trailing", 20, "always"),
        (sprinter, "lcm", "angles", 2, "embedded"),
    ]
    for one, sampler, spacing, steps, policy in expected:
        settings = resolve(GenerateRequest(prompt=PROMPT), one, Limits(), None).settings()
        chosen = [settings[field]["name"] for field in ("sampler", "spacing", "guidance")]
        assert chosen == [sampler, spacing, "cfg"]
        assert (settings["steps"], settings["guidance"]["scale"]) == (steps, 4.5)
        assert settings["guidance"]["policy"]["name"] == policy


def test_a_scheduler_of_eulers_tells_timesteps_as_they_are(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "euler"))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(copy / "scheduler")
    model = load(copy)
    t = model.default_schedule.grid("trailing", 3).t[:-1]
    assert model.network_time(t).tolist() == (TIMESTEP_SCALE * 1000 * t).tolist()
    config = copy / "scheduler" / "scheduler_config.json"
    euler = config.read_text()
    config.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler"}))
    with pytest.raises(ModelMismatch, match="DPMSolverMultistepScheduler' and no use_flow_sigmas"):
        load(copy)
    config.write_text(json.dumps({"use_flow_sigmas": True, "prediction_type": "epsilon"}))
    with pytest.raises(ModelMismatch, match="'epsilon'; SANA predicts a velocity"):
        load(copy)
    config.write_text(json.dumps({**json.loads(euler), "shift_terminal": 0.1}))
    with pytest.raises(ModelMismatch, match=r"shift_terminal '0\.1'; for SANA only null"):
        load(copy)
    config.write_text(euler)
    autoencoder(latent_channels=8).save_pretrained(copy / "vae")
    with pytest.raises(ModelMismatch, match=r"of 4 channels; its autoencoder makes .* 8"):
        load(copy)


def test_blocks_can_be_skipped_and_attention_is_refused(model: HostedModel) -> None:
    assert_skipped(model, torch.randn(SHAPE), PROMPT, "transformer_blocks")
    refusal = model.refuses(IdentityAttention(("middle",)))
    assert refusal is not None
    assert "SanaTransformer2DModel, whose attention cannot be edited" in refusal
