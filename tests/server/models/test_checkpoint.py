"""Single-file checkpoints become folders with the same weights; other files are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from server.errors import ModelMismatch
from server.models import checkpoint_prediction
from server.models.checkpoint import converted, write_tokenizer
from server.models.checkpoint_prediction import prediction_of
from server.models.loading import load_model
from server.service.hosting import host
from server.settings import Settings
from tests.server.models import tiny_sd, tiny_sdxl
from tests.server.models.original_names import checkpoint, second_checkpoint

SHIPPED = Path(str(files("server.models") / "single_file"))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A pipeline with ten layers in the second text encoder, by which SDXL files are recognized."""
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
    """The configs of the tiny pipeline, in place of those that ship with Weft."""
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
    # It is converted only once.
    shutil.rmtree(folder / "unet")
    assert converted(file, tmp_path, templates) == folder
    assert not (folder / "unet").exists()


def test_two_servers_may_convert_a_file_at_once(
    file: Path, templates: Path, tmp_path: Path
) -> None:
    def other() -> None:
        """Finish before the first one does."""
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
        ({"model.diffusion_model.input_blocks.0.0.weight": None}, "is not a complete checkpoint"),
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
        # As saved before transformers 4.
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
        "text_model.embeddings.position_ids": torch.arange(77)[None],
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


def test_a_checkpoint_of_another_kind_is_refused_by_its_name(tmp_path: Path) -> None:
    weights = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 8, 3, 3),
        "first_stage_model.quant_conv.weight": torch.ones(1),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(1),
    }
    save_file(weights, tmp_path / "edit.safetensors")
    with pytest.raises(
        ModelMismatch, match=r"or XL \(diffusers takes it for instruct-pix2pix\); m"
    ):
        converted(tmp_path / "edit.safetensors", tmp_path / "cache")


def test_a_gguf_file_is_no_model_by_itself(tmp_path: Path) -> None:
    (tmp_path / "flux.gguf").touch()
    with pytest.raises(ModelMismatch, match=r"flux\.gguf' is a GGUF file, .* `--denoiser name=pat"):
        converted(tmp_path / "flux.gguf", tmp_path / "cache")


def test_a_server_is_not_started_on_another_kind_of_file(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    settings = Settings(models=(str(tmp_path / "other.safetensors"),), cache=tmp_path / "cache")
    with pytest.raises(ModelMismatch, match=r"other.safetensors' is not a complete checkpoint of"):
        host(settings)


def test_weights_that_find_no_room_on_the_disk_are_an_error_of_the_disk(
    file: Path, templates: Path, tmp_path: Path
) -> None:
    whole = converted(file, tmp_path / "whole", templates)
    largest = max(one.stat().st_size for one in whole.rglob("*.safetensors"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            converted(file, tmp_path / "full", templates)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Path(failed.value.filename).is_relative_to(tmp_path / "full")
    assert not list((tmp_path / "full").rglob("*.safetensors"))


def test_a_folder_gets_its_name_once_all_that_it_holds_is_on_the_disk(
    file: Path, templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty config or tokenizer in a folder that looks complete would be used for ever."""
    synced: set[tuple[int, int]] = set()
    sync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        sync(descriptor)
        synced.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def check(made: Path, target: Path) -> Path:
        held = [made, *made.rglob("*")]
        assert {path.name for path in held} >= {"model_index.json", "config.json"}
        unsynced = [
            path for path in held if (path.stat().st_ino, path.stat().st_size) not in synced
        ]
        assert unsynced == []
        return rename(made, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    assert converted(file, tmp_path, templates).is_dir()


@pytest.fixture(scope="module")
def second() -> Any:
    """A pipeline with the text width of Stable Diffusion 2, by which its files are recognized."""
    made = tiny_sd.make(
        tiny_sdxl.BASE,
        block_out_channels=(32,),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(2,),
        transformer_layers_per_block=1,
        cross_attention_dim=1024,
    )
    entries: dict[str, Any] = tiny_sdxl.text_config(1024).to_dict()
    entries |= {"intermediate_size": 16, "num_hidden_layers": 1}
    made.text_encoder = CLIPTextModel(CLIPTextConfig(**entries)).eval()
    return made


@pytest.mark.parametrize("velocity", [True, False])
def test_a_file_of_stable_diffusion_2_becomes_a_folder_that_says_what_it_predicts(
    velocity: bool,
    second: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is found from the weights, since files of that time do not state it."""
    norm = "model.diffusion_model.output_blocks.2.1.transformer_blocks.0.norm1.bias"
    monkeypatch.setattr(checkpoint_prediction, "LAST_NORM", norm)
    bias = second.unet.up_blocks[0].attentions[2].transformer_blocks[0].norm1.bias
    torch.nn.init.normal_(bias, std=0.2 if velocity else 0.05)
    tiny_sdxl.saved(second, tmp_path / "templates" / "sd21")
    for file in (tmp_path / "templates").rglob("*.safetensors"):
        file.unlink()
    # The last layer exists, but is not used for pictures.
    last, clip = "transformer.resblocks.23.", "cond_stage_model.model."
    beside = {
        f"{clip}{last}ln_1.weight": torch.ones(1024),
        f"{clip}{last}attn.in_proj_weight": torch.ones(3, 4),
        f"{clip}logit_scale": torch.ones([]),
        **({f"{clip}text_projection": torch.ones(1024, 8)} if velocity else {}),
    }
    save_file(second_checkpoint(second) | beside, tmp_path / "second.safetensors")
    folder = converted(tmp_path / "second.safetensors", tmp_path, tmp_path / "templates")
    model = load_model(folder, name="m", device="cpu", dtype="float32")
    for part, network in model.modules().items():
        theirs, ours = getattr(second, part).state_dict(), network.state_dict()
        assert theirs.keys() == ours.keys(), part
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), part
    predicts = "v_prediction" if velocity else "epsilon"
    assert model.facts.prediction == predicts
    # Latent cells of the tiny pipeline have two pixels along a side.
    assert model.facts.default_width == 2 * (96 if velocity else 32)
    assert f"by its weights it is {'a velocity' if velocity else 'noise'}." in caplog.text


def test_what_a_file_of_stable_diffusion_2_says_counts_more_than_its_weights() -> None:
    weights = {checkpoint_prediction.LAST_NORM: torch.tensor([-1.0, 1.0])}
    for entry, velocity, guessed in (
        ("other", True, True),
        ("modelspec.prediction_type", False, False),
        # As ComfyUI's node CheckpointSave writes it.
        ("modelspec.predict_key", False, False),
    ):
        metadata = {entry: "epsilon"}
        found = prediction_of("v2", weights, metadata)
        assert (found.velocity, found.guessed) == (velocity, guessed)
    # Inpainting models were trained to predict noise, and so were other kinds.
    assert not prediction_of("inpainting_v2", weights, {}).velocity


def test_a_file_is_converted_again_by_another_converter(
    file: Path, templates: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(templates, tmp_path / "templates")
    first = converted(file, tmp_path / "cache", other)
    config = other / "sdxl" / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert converted(file, tmp_path / "cache", other) != first


def test_what_the_file_says_of_its_training_reaches_the_scheduler(
    file: Path, templates: Path, tmp_path: Path
) -> None:
    """By empty tensors, as in NoobAI's files, or by metadata, as in those of kohya's scripts."""
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
    """Compared by their published numbers of parameters."""
    with torch.device("meta"):
        counts = {
            f"{kind}/{part}": sum(
                one.numel() for one in network(SHIPPED / kind / part).parameters()
            )
            for kind in ("sd15", "sd21", "sdxl")
            for part in ("unet", "vae")
        }
        encoders = {
            part: kind(CLIPTextConfig(**json.loads((SHIPPED / part / "config.json").read_text())))
            for part, kind in (
                ("sd21/text_encoder", CLIPTextModel),
                ("sdxl/text_encoder_2", CLIPTextModelWithProjection),
            )
        }
    counts |= {
        part: sum(one.numel() for one in encoder.parameters()) for part, encoder in encoders.items()
    }
    assert counts == {
        "sd15/unet": 859_520_964,
        "sd15/vae": 83_653_863,
        "sd21/unet": 865_910_724,
        "sd21/vae": 83_653_863,
        "sd21/text_encoder": 340_387_840,
        "sdxl/unet": 2_567_463_684,
        "sdxl/vae": 83_653_863,
        "sdxl/text_encoder_2": 694_659_840,
    }


def network(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    kinds = {"UNet2DConditionModel": UNet2DConditionModel, "AutoencoderKL": AutoencoderKL}
    return kinds[config.pop("_class_name")](**config)


def test_the_vocabulary_is_that_of_clip(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "sdxl/tokenizer_2", tmp_path, dirs_exist_ok=True)
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    # These are the tokens of OpenAI's own tokenizer.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (len(tokenizer), tokenizer.pad_token_id) == (49408, 0)
