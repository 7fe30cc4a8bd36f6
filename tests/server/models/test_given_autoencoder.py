"""An autoencoder in place of a model's own decodes as it does in diffusers' pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch.nn.functional import pixel_shuffle

from server.errors import ModelMismatch
from server.models.given_autoencoder import named_as_by_diffusers
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.settings import Settings
from tests.server.models import tiny_flux2
from tests.server.models.original_names import (
    checkpoint,
    flux_2_autoencoder,
    wan_autoencoder,
)
from tests.server.models.tiny_sdxl import BASE, VAE, make, saved

ORIGINAL = "first_stage_model."


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A pipeline with another autoencoder than the folder below."""
    made = make(BASE)
    torch.manual_seed(1)
    made.vae = AutoencoderKL(**VAE).eval()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(make(BASE), tmp_path_factory.mktemp("models") / "xl")


def load(folder: Path, vae: Path | None = None) -> HostedModel:
    return load_model(folder, name="xl", device="cpu", dtype="float32", vae=vae)


@torch.inference_mode()
def test_each_form_of_a_vae_decodes_as_in_diffusers(
    pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    own = load(folder)
    whole = {k: v for k, v in checkpoint(pipeline).items() if k.startswith(ORIGINAL)}
    # ComfyUI saves whole checkpoints of FLUX.1 so (``vae_key_prefix`` of its supported models).
    comfy = {f"vae.{k.removeprefix(ORIGINAL)}": v for k, v in whole.items()}
    save_file(comfy | {"model.diffusion_model.x": torch.ones(1)}, tmp_path / "all.safetensors")
    bare = {name.removeprefix(ORIGINAL): tensor for name, tensor in whole.items()}
    save_file(whole | {"loss.logvar": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    save_file(bare, tmp_path / "original.safetensors")
    save_file(pipeline.vae.state_dict(), tmp_path / "named.safetensors")
    pipeline.vae.save_pretrained(tmp_path / "kept")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline.vae.decode(latents / VAE["scaling_factor"], return_dict=False)[0]
    kinds = "checkpoint", "original", "named", "all"
    for name in (*(f"{kind}.safetensors" for kind in kinds), "kept"):
        model = load(folder, tmp_path / name)
        torch.testing.assert_close(model.decode(latents), theirs, rtol=1e-5, atol=1e-5)
        assert model.facts.vae == name.removesuffix(".safetensors")
        assert model.facts.revision != own.facts.revision
        assert model.facts.denoiser == own.facts.denoiser
    assert own.facts.vae is None
    assert not torch.allclose(own.decode(latents), theirs, atol=1e-2)


@torch.inference_mode()
def test_an_autoencoder_of_flux_2_brings_the_statistics_of_its_latents(tmp_path: Path) -> None:
    pipeline = tiny_flux2.make(distilled=True)
    pipeline.save_pretrained(tmp_path / "klein")
    vae = pipeline.vae
    for tensor in vae.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    save_file(flux_2_autoencoder(vae), tmp_path / "ae.safetensors")
    save_file(vae.state_dict(), tmp_path / "named.safetensors")
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    cells = latents * deviation.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
    theirs = vae.decode(pixel_shuffle(cells, 2), return_dict=False)[0]
    for name in ("ae", "named"):
        model = load(tmp_path / "klein", tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(model.decode(latents), theirs, rtol=1e-5, atol=1e-5)


def test_the_autoencoder_of_qwen_image_is_read_by_the_names_of_wan() -> None:
    config: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4]}
    network = AutoencoderKLQwenImage(**config, temperal_downsample=[False, True, True])
    tensors = wan_autoencoder(network)
    # All the original code's layers of a ResNet, an attention, and an encoder or decoder.
    assert {
        "conv1.weight",
        "encoder.downsamples.2.resample.1.weight",
        "encoder.downsamples.5.time_conv.weight",
        "decoder.middle.0.residual.6.bias",
        "decoder.middle.1.to_qkv.weight",
        "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.7.time_conv.bias",
        "decoder.upsamples.14.residual.3.gamma",
        "decoder.head.2.weight",
    } <= tensors.keys()
    made = named_as_by_diffusers(tensors, network)
    theirs = network.state_dict()
    assert made.keys() == theirs.keys()
    assert all(torch.equal(made[name], theirs[name]) for name in theirs)


def test_an_autoencoder_of_stable_diffusion_is_not_taken_for_that_of_qwen_image(
    pipeline: Any,
) -> None:
    """Its names stay as they are, so that the error can name the layers that do not fit."""
    tensors = {k.removeprefix(ORIGINAL): v for k, v in checkpoint(pipeline).items()}
    config: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4]}
    network = AutoencoderKLQwenImage(**config, temperal_downsample=[False, True, True])
    made = named_as_by_diffusers(tensors, network)
    assert "decoder.up.0.block.0.conv1.weight" in made.keys() - network.state_dict().keys()


def test_what_is_no_autoencoder_of_the_model_is_refused(
    pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    weights = pipeline.vae.state_dict()
    weights["decoder.conv_out.weight"] = weights["decoder.conv_out.weight"][:2].clone()
    save_file(weights, tmp_path / "narrow.safetensors")
    save_file({"weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    wan = {f"decoder.{name}": torch.ones(1) for name in ("middle.0.residual.0.gamma", "upsamples.")}
    save_file(wan, tmp_path / "wan.safetensors")
    (tmp_path / "vae.pt").write_text("a pickle")
    wide: dict[str, Any] = VAE | {"scaling_factor": 0.18215}
    AutoencoderKL(**wide).save_pretrained(tmp_path / "sd15")
    for name, says in (
        ("narrow.safetensors", "does not fit model 'xl': .* shapes: decoder.conv_out.weight"),
        ("lora.safetensors", "'lora.safetensors' does not fit model 'xl'"),
        ("wan.safetensors", "^vae 'wan.safetensors' cannot be read"),
        ("vae.pt", "neither a .safetensors file nor a folder with diffusion_pytorch_model"),
        ("sd15", re.escape("has the scaling_factor 0.18215, but the model's autoencoder has")),
    ):
        with pytest.raises(ModelMismatch, match=says):
            load(folder, tmp_path / name)


def test_the_setting_names_a_model_and_a_path(tmp_path: Path) -> None:
    assert Settings(vaes=(f"xl={tmp_path}",)).vae_of("xl") == tmp_path
    assert Settings(vaes=(f"xl={tmp_path}",)).vae_of("other") is None
    for wrong in (str(tmp_path), f"xl={tmp_path}/none", f"={tmp_path}"):
        with pytest.raises(ValueError, match="allowed is `name=path`"):
            Settings(vaes=(wrong,))
