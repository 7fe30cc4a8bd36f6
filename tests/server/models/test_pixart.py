"""PixArt-alpha and PixArt-Sigma are what diffusers' own pipelines make of the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from guidance.edits import IdentityAttention
from server.engine.engine import Engine
from server.engine.state.noise import start_noise
from server.errors import AdapterMismatch, ModelMismatch
from server.models.adapters.adapter import RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.conditioning import MASK
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.pixart import TEXT, PixArtDenoiser
from server.requests.resolve import resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes, merged
from tests.server.models.alike import assert_among, assert_apart, difference, task_of
from tests.server.models.tiny_pixart import KINDS, make
from tests.server.models.tiny_sdxl import VAE
from tests.server.toy_model import run

PROMPT = "a Red circle "
WIDTH, HEIGHT = 48, 32
SHAPE = (4, HEIGHT // 2, WIDTH // 2)
GUIDED: dict[str, Any] = {"name": "cfg", "scale": 4.5}


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "pixart"
    pipeline.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> HostedModel:
    return load_model(folder, name="pixart", device="cpu", dtype="float32")


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
        "clean_caption": False,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return pipeline(prompt, **given | fields).images[0]


def test_final_latents_alone_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    run(engine, [asked(model)])
    assert_among(decoded, theirs(pipeline))


def test_final_latents_in_mixed_company_are_those_of_diffusers(
    pipeline: Any, model: HostedModel, engine: Engine, decoded: list[Tensor]
) -> None:
    skipping = {"name": "slg", "layers": ["transformer_blocks.1"], "start": 0.0, "stop": 1.0}
    company: list[dict[str, Any]] = [
        {},
        {"prompt": "a star", "negative_prompt": "a blue square and a ring", "seed": 6},
        {"guidance": "none", "steps": 3, "seed": 7},
        {"sampler": "heun", "guidance": "apg", "steps": 3, "seed": 8},
        {"guidance": GUIDED | {"perturbed": [skipping]}, "seed": 9},
    ]
    ear = run(engine, [asked(model, **fields) for fields in company])
    assert not ear.errors, ear.errors
    assert_among(decoded, theirs(pipeline))
    negative = "a blue square and a ring"
    assert_among(decoded, theirs(pipeline, 6, "a star", negative_prompt=negative))
    plain = theirs(pipeline, 7, guidance_scale=1.0, num_inference_steps=3)
    assert_among(decoded, plain)


@torch.inference_mode()
def test_a_text_is_its_own_tokens_in_small_letters_without_padding(
    pipeline: Any, model: HostedModel
) -> None:
    [ours] = model.encode_prompts([PROMPT], WIDTH, HEIGHT)
    expected, mask, _, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    texts = ours.tensors[TEXT]
    torch.testing.assert_close(texts, expected[0][mask[0].bool()])
    assert ours.length == len(texts) == model.count_tokens(PROMPT) + 1
    ids = pipeline.tokenizer(PROMPT.lower().strip(), padding="max_length", return_tensors="pt")
    assert_apart(texts, pipeline.text_encoder(ids.input_ids)[0][0][: len(texts)])


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
    assert fixed.tensors[TEXT].shape[1] == model.facts.max_tokens + 1
    torch.testing.assert_close(model.evaluate(x, t, RowInputs(fixed)), together)
    told = {name: one for name, one in both.conditioning.tensors.items() if name != MASK}
    unmasked = model.evaluate(x, t, RowInputs(type(both.conditioning)(told)))
    assert_apart(together[0], unmasked[0])


@torch.inference_mode()
def test_noise_is_the_first_half_of_what_the_transformer_puts_out(
    pipeline: Any, model: HostedModel
) -> None:
    x, t, inputs = torch.randn(1, *SHAPE), torch.ones(1), model.inputs([PROMPT], WIDTH, HEIGHT)
    told = {"resolution": torch.tensor([[32.0, 48.0]]), "aspect_ratio": torch.tensor([[2 / 3]])}
    both = pipeline.transformer(x, inputs.conditioning.tensors[TEXT], t, told).sample
    ours = model.evaluate(x, t, inputs)
    torch.testing.assert_close(ours, both[:, :4], rtol=1e-4, atol=1e-5)
    assert_apart(ours, both[:, 4:])


def test_a_bare_request_is_sampled_as_the_pipeline_samples(
    pipeline: Any, folder: Path, model: HostedModel
) -> None:
    settings = resolve(GenerateRequest(prompt=PROMPT), model, Limits(), None).settings()
    assert settings["sampler"]["name"] == "dpm_solver_pp"
    assert settings["spacing"] == {"name": "linspace", "endpoint": False, "twice_shifted": False}
    assert settings["steps"] == 20
    assert (settings["guidance"]["name"], settings["guidance"]["scale"]) == ("cfg", 4.5)
    lengths = {"PixArtAlphaPipeline": 119, "PixArtSigmaPipeline": 299}
    assert model.facts.max_tokens == lengths[type(pipeline).__name__]
    assert model.facts.defaults is not None
    assert model.facts.defaults.convention == "pixart"


def test_the_transformers_old_class_name_and_an_lcm_scheduler_are_known(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "old"))
    edit(copy / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    scheduler = copy / "scheduler" / "scheduler_config.json"
    edit(scheduler, _class_name="LCMScheduler", original_inference_steps=2)
    loaded = load_model(copy, name="old", device="cpu", dtype="float32")
    assert loaded.facts.defaults is not None
    assert loaded.facts.defaults.convention == "lcm_lora"
    assert loaded.facts.defaults.steps == 2


def test_other_predictions_and_other_latents_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "other"))
    scheduler = copy / "scheduler" / "scheduler_config.json"
    edit(scheduler, prediction_type="v_prediction")
    with pytest.raises(ModelMismatch, match="'v_prediction'; PixArt predicts noise"):
        load_model(copy, name="other", device="cpu", dtype="float32")
    edit(scheduler, prediction_type="epsilon")
    wider: dict[str, Any] = {**VAE, "latent_channels": 8}
    AutoencoderKL(**wider).save_pretrained(copy / "vae")
    with pytest.raises(ModelMismatch, match=r"of 4 channels; its autoencoder makes .* 8"):
        load_model(copy, name="other", device="cpu", dtype="float32")


@torch.inference_mode()
def test_a_forward_makes_no_tensor_of_a_list_which_waits_for_the_device(
    model: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = model.inputs([PROMPT], WIDTH, HEIGHT)

    def waits(*_: Any, **__: Any) -> None:
        pytest.fail("a tensor is made of numbers on the device")

    monkeypatch.setattr(Tensor, "new_tensor", waits)
    assert model.evaluate(torch.randn(1, *SHAPE), torch.ones(1), inputs).isfinite().all()


@torch.inference_mode()
def test_an_adapter_is_as_if_added_to_the_weights_and_none_is_of_the_size(
    pipeline: Any, model: HostedModel, tmp_path: Path
) -> None:
    by_rows = {
        name: change
        for name, change in changes(pipeline.transformer, 4).items()
        if "resolution_embedder" not in name
    }
    target = Target.of("pixart", model.adaptable())
    path = files.saved(files.peft({"transformer": by_rows}), tmp_path / "one.safetensors")
    adapter = AdapterFile.read("one", path, target).load(torch.device("cpu"), torch.float32)
    x, t, inputs = torch.randn(2, *SHAPE), torch.ones(2), model.inputs(["a star"] * 2)
    adapters = RowAdapters(((Weighted(adapter, 0.5),), ()))
    ours, beside = model.evaluate(x, t, RowInputs(inputs.conditioning, adapters=adapters))
    plain = model.evaluate(x, t, inputs)
    fused = merged(pipeline.transformer, "transformer", [Weighted(adapter, 0.5)])
    expected = PixArtDenoiser(fused, model.facts.latent_scale)(x, t, inputs)
    assert difference(ours, expected[0]) < 1e-4
    assert_apart(plain[0], ours)
    assert torch.equal(beside, plain[1])
    if pipeline.transformer.use_additional_conditions:
        of_size = changes(pipeline.transformer.adaln_single.emb, 4, within="resolution_embedder")
        named = {f"adaln_single.emb.{name}": change for name, change in of_size.items()}
        path = files.saved(files.peft({"transformer": named}), tmp_path / "two.safetensors")
        with pytest.raises(AdapterMismatch, match="resolution_embedder"):
            AdapterFile.read("two", path, target)


def test_attention_inside_is_refused_in_one_sentence(model: HostedModel) -> None:
    refusal = model.refuses(IdentityAttention(("middle",)))
    assert refusal is not None
    assert "PixArtTransformer2DModel, whose attention cannot be edited" in refusal


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
