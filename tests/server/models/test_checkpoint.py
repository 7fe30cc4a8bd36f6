"""Single-file checkpoints become folders with the same weights, and what is no such file is not."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from server.errors import ModelMismatch
from server.models.checkpoint import converted, write_tokenizer
from server.models.loading import load_model
from server.service.hosting import host
from server.settings import Settings
from tests.server.models import tiny_sdxl
from tests.server.models.original_names import checkpoint

SHIPPED = Path(str(files("server.models") / "single_file"))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """With ten layers in the second text encoder, by which an SDXL file is told from others."""
    made = tiny_sdxl.make(tiny_sdxl.BASE)
    entries: dict[str, Any] = tiny_sdxl.text_config(48).to_dict() | {"num_hidden_layers": 10}
    made.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**entries)).eval()
    return made


@pytest.fixture(scope="module")
def file(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("file") / "tiny.safetensors"
    of_training = {"model_ema.decay": torch.ones(1), "alphas_cumprod": torch.ones(1000)}
    save_file({**checkpoint(pipeline), **of_training}, made)
    return made


@pytest.fixture(scope="module")
def templates(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs of the tiny pipeline in place of those that ship."""
    made = tmp_path_factory.mktemp("templates")
    tiny_sdxl.saved(pipeline, made / "sdxl")
    for weights in made.rglob("*.safetensors"):
        weights.unlink()
    return made


def test_a_checkpoint_becomes_a_folder_of_the_same_weights(
    pipeline: Any, file: Path, templates: Path, tmp_path: Path
) -> None:
    folder = converted(file, tmp_path, templates)
    model = load_model(folder, name="m", device="cpu", dtype="float32")
    networks = model.modules()
    assert {"unet", "vae", "text_encoder", "text_encoder_2"} <= networks.keys()
    for part, network in networks.items():
        theirs = getattr(pipeline, part).state_dict()
        ours = network.state_dict()
        assert theirs.keys() == ours.keys(), part
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), part
    # It is converted once.
    shutil.rmtree(folder / "unet")
    assert converted(file, tmp_path, templates) == folder
    assert not (folder / "unet").exists()


def test_two_servers_may_convert_a_file_at_once(
    file: Path, templates: Path, tmp_path: Path
) -> None:
    def other() -> None:
        """Is done before the first one is."""
        converted(file, tmp_path, templates)

    folder = converted(file, tmp_path, templates, other)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"lora_unet_down.weight": torch.ones(1)}, "none of its networks: lora_unet_down.weight"),
        (
            {"model.diffusion_model.odd.weight": torch.ones(1)},
            "that its networks do not: model.diffusion_model.odd.weight",
        ),
        ({"model.diffusion_model.label_emb.0.0.weight": None}, "lacks the tensor 'label_emb.0.0."),
        ({"model.diffusion_model.input_blocks.0.0.weight": None}, "is no complete checkpoint"),
        ({"edm_vpred.sigma_max": torch.ones(1)}, "predicts by the preconditioning of EDM"),
        ({"conditioner.embedders.1.model.text_projection": None}, "1.model.text_projection'"),
    ],
)
def test_tensors_that_are_left_over_or_missing_are_named(
    changed: dict[str, Any], sentence: str, file: Path, templates: Path, tmp_path: Path
) -> None:
    weights = {name: one for name, one in (load_file(file) | changed).items() if one is not None}
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ModelMismatch) as refused:
        converted(tmp_path / "other.safetensors", tmp_path / "cache", templates)
    assert sentence in refused.value.message
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_trainers_and_mergers_leave_in_a_file_is_left_out(
    pipeline: Any, file: Path, templates: Path, tmp_path: Path
) -> None:
    """As kohya's scripts, ComfyUI and mergers save Stable Diffusion XL."""
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    weights = {
        # Before transformers 4.
        name.replace(f"{first}text_model.", first): tensor
        for name, tensor in load_file(file).items()
    }
    turned = weights.pop(f"{second}text_projection").T.contiguous()
    beside: dict[str, torch.Tensor] = {
        f"{second}text_projection.weight": turned,
        f"{second}logit_scale": torch.ones([]),
        f"{first}embeddings.position_ids": torch.arange(77)[None],
        f"{first}text_projection.weight": torch.ones(32, 32),
        "conditioner.embedders.0.logit_scale": torch.ones([]),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2, 2),
        "first_stage_model.model_ema.decay": torch.ones([]),
        "denoiser.sigmas": torch.ones(1000),
        "global_step": torch.ones([], dtype=torch.int64),
    }
    save_file(weights | beside, tmp_path / "merged.safetensors")
    folder = converted(tmp_path / "merged.safetensors", tmp_path / "cache", templates)
    networks = load_model(folder, name="m", device="cpu", dtype="float32").modules()
    for part in ("text_encoder", "text_encoder_2"):
        ours, theirs = networks[part].state_dict(), getattr(pipeline, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


def test_a_file_of_a_unet_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3)}
    save_file(weights, tmp_path / "unet.safetensors")
    with pytest.raises(ModelMismatch, match="no text encoder and no autoencoder; host a folder"):
        converted(tmp_path / "unet.safetensors", tmp_path / "cache")


def test_a_server_is_not_started_on_another_kind_of_file(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    settings = Settings(models=(str(tmp_path / "other.safetensors"),), cache=tmp_path / "cache")
    with pytest.raises(ModelMismatch, match=r"other.safetensors' is no complete checkpoint of"):
        host(settings)


def test_a_file_of_stable_diffusion_2_is_refused_as_its_prediction_is_not_known(
    tmp_path: Path,
) -> None:
    attention = "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    weights = {
        f"model.diffusion_model.{attention}": torch.ones(2, 1024),
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3),
    }
    save_file(weights, tmp_path / "second.safetensors")
    with pytest.raises(ModelMismatch, match=r"Stable Diffusion 2\.x, which does not say whether"):
        converted(tmp_path / "second.safetensors", tmp_path / "cache")


def test_what_the_file_says_of_its_training_reaches_the_scheduler(
    file: Path, templates: Path, tmp_path: Path
) -> None:
    """By tensors without numbers, as NoobAI's, or by metadata, as kohya's scripts."""
    plain = load_file(file)
    said = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**plain, **said}, tmp_path / "tensors.safetensors")
    save_file(plain, tmp_path / "metadata.safetensors", {"modelspec.prediction_type": "v"})
    for name, rescales in (("tensors", True), ("metadata", False)):
        folder = converted(tmp_path / f"{name}.safetensors", tmp_path / "cache", templates)
        scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == "v_prediction"
        assert bool(scheduler.get("rescale_betas_zero_snr")) == rescales


def test_the_configs_that_ship_are_those_of_the_published_networks() -> None:
    """By their numbers of parameters, as published."""
    with torch.device("meta"):
        counts = {
            f"{kind}/{part}": sum(
                one.numel() for one in network(SHIPPED / kind / part).parameters()
            )
            for kind, part in (("sd15", "unet"), ("sd15", "vae"), ("sdxl", "unet"))
        }
        second = json.loads((SHIPPED / "sdxl/text_encoder_2/config.json").read_text())
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(**second))
    assert counts == {
        "sd15/unet": 859_520_964,
        "sd15/vae": 83_653_863,
        "sdxl/unet": 2_567_463_684,
    }
    assert sum(one.numel() for one in encoder.parameters()) == 694_659_840


def network(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    kinds = {"UNet2DConditionModel": UNet2DConditionModel, "AutoencoderKL": AutoencoderKL}
    return kinds[config.pop("_class_name")](**config)


def test_the_vocabulary_is_that_of_clip(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "sdxl/tokenizer_2", tmp_path, dirs_exist_ok=True)
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    # As OpenAI's own tokenizer has it.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (len(tokenizer), tokenizer.pad_token_id) == (49408, 0)
