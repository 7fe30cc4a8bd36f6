"""A tiny autoencoder in place of a model's own draws as in diffusers' pipeline of that family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_img2img as of_flux
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as of_sd
from diffusers.pipelines.stable_diffusion_3 import (
    pipeline_stable_diffusion_3_img2img as of_sd3,
)
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as of_xl
from diffusers.pipelines.z_image import pipeline_z_image_img2img as of_z_image
from safetensors.torch import save_file
from torch import Tensor, nn

from server.engine.state.noise import start_noise
from server.errors import ModelMismatch
from server.models import tiling
from server.models.autoencoder import Autoencoder
from server.models.given_autoencoder import add_tiny_autoencoder
from server.models.hosted import HostedModel
from server.models.loading import load_model
from tests.server.full_ticks import full_ticks
from tests.server.models import (
    tiny_flux1,
    tiny_flux2,
    tiny_pixart,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.server.models.alike import as_diffusers, task_of, their_start
from tests.server.models.tiny_text import LENGTH
from tests.server.toy_model import run, started

PROMPT = "a red circle"
SIDE = 32
SHAPE = (4, SIDE // 2, SIDE // 2)
STEPS = 4
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
"""Config of a tiny autoencoder for cells of 2 pixels, as those of the tiny models."""


def tiny(**config: Any) -> Any:
    torch.manual_seed(3)
    return AutoencoderTiny(**TINY | config).eval().requires_grad_(requires_grad=False)


def saved(network: Any, folder: Path) -> Path:
    network.save_pretrained(folder)
    return folder


def load(folder: Path, vae: Path | None = None) -> HostedModel:
    return load_model(folder, name="one", device="cpu", dtype="float32", vae=vae)


@dataclass(frozen=True)
class Family:
    """A family, and how to ask diffusers and us for the same picture.

    Attributes:
        make: makes the pipeline.
        told: arguments of their pipelines beside the prompt, the size and the steps.
        asked: fields of our request beside those.
        anew: their image-to-image pipeline; None for a family that has none.
        module: its module, which draws the noise.
    """

    make: Callable[[], Any]
    told: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    anew: Any = None
    module: ModuleType | None = None


SCALED = {"guidance": {"name": "cfg", "scale": 4.0}}
SHORT = {"max_sequence_length": LENGTH}
OF_UNETS: dict[str, Any] = as_diffusers(PROMPT, SIDE, SIDE, STEPS)
OF_PIXART = {"clean_caption": False, "use_resolution_binning": False}
FAMILIES = {
    "sd": Family(
        lambda: tiny_sd.make(tiny_sdxl.BASE),
        {"guidance_scale": 5.0},
        OF_UNETS,
        StableDiffusionImg2ImgPipeline,
        of_sd,
    ),
    "sdxl": Family(
        lambda: tiny_sdxl.make(tiny_sdxl.BASE),
        {"guidance_scale": 5.0},
        OF_UNETS,
        StableDiffusionXLImg2ImgPipeline,
        of_xl,
    ),
    "sd3": Family(
        tiny_sd3.make,
        {"guidance_scale": 4.0, **SHORT},
        SCALED,
        StableDiffusion3Img2ImgPipeline,
        of_sd3,
    ),
    "flux1": Family(
        lambda: tiny_flux1.make(tiny_flux1.DEV, guided=True),
        {"guidance_scale": 3.5, **SHORT},
        {},
        FluxImg2ImgPipeline,
        of_flux,
    ),
    "z_image": Family(
        lambda: tiny_z_image.make(tiny_z_image.BASE_SHIFT),
        {"guidance_scale": 3.0},
        SCALED,
        ZImageImg2ImgPipeline,
        of_z_image,
    ),
    "pixart": Family(lambda: tiny_pixart.make("sigma"), OF_PIXART),
}


@dataclass(frozen=True)
class Both:
    """Their pipeline with a tiny autoencoder, and our model with the same."""

    family: Family
    pipeline: Any
    model: HostedModel

    def ours(self, image: Tensor | None = None, **fields: Any) -> np.ndarray[Any, Any]:
        body = {"prompt": PROMPT, "width": SIDE, "height": SIDE, "seed": 5, "steps": STEPS}
        task = task_of(self.model, image=image, **body | self.family.asked | fields)
        engine = started(self.model, 16)
        try:
            ear = run(engine, [task])
        finally:
            engine.stop(0)
        assert not ear.errors, ear.errors
        return ear.results[0].pixels

    def theirs(self, pipeline: Any, **given: Any) -> np.ndarray[Any, Any]:
        told = {"num_inference_steps": STEPS, "output_type": "np", **self.family.told, **given}
        [picture] = pipeline(PROMPT, **told).images
        return np.round(255 * picture).astype(np.uint8)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    family = FAMILIES[request.param]
    place = tmp_path_factory.mktemp("models")
    pipeline = family.make()
    pipeline.save_pretrained(place / "one")
    pipeline.vae = tiny()
    return Both(family, pipeline, load(place / "one", saved(pipeline.vae, place / "tiny")))


def assert_alike(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> None:
    assert ours.std() > 8, "a picture of one colour would be alike whatever decodes it"
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@torch.inference_mode()
def test_a_picture_is_that_of_diffusers_with_the_same_tiny_autoencoder(both: Both) -> None:
    start = start_noise(5, SHAPE)[None]
    if both.family.asked is OF_UNETS:
        start = their_start(both.pipeline, STEPS, SHAPE)
    if both.family.module is of_flux:
        start = both.pipeline._pack_latents(start, *start.shape)
    theirs = both.theirs(both.pipeline, latents=start, width=SIDE, height=SIDE)
    assert_alike(both.ours(), theirs)


@torch.inference_mode()
@pytest.mark.parametrize(
    "both", [name for name, one in FAMILIES.items() if one.anew], indirect=True
)
def test_a_picture_drawn_anew_is_that_of_diffusers_with_the_same_tiny_autoencoder(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = both.family
    picture = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(family.module, "randn_tensor", lambda *_, **__: start_noise(5, SHAPE)[None])
    parts = both.pipeline.components
    unchecked = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    anew = family.anew(**parts, **unchecked)
    anew.set_progress_bar_config(disable=True)
    sized = {} if family.asked is OF_UNETS else {"width": SIDE, "height": SIDE}
    theirs = both.theirs(anew, image=picture[None], strength=0.5, **sized)
    assert_alike(both.ours(2 * picture - 1, strength=0.5), theirs)


@torch.inference_mode()
def test_images_of_both_autoencoders_share_passes_and_each_is_that_of_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_flux1.make(tiny_flux1.DEV, guided=True)
    pipeline.save_pretrained(tmp_path / "one")
    model, network = load(tmp_path / "one"), tiny()
    revision = model.facts.revision
    add_tiny_autoencoder(model, saved(network, tmp_path / "taef1"))
    assert model.facts.tiny_vae == "taef1"
    assert model.facts.revision != revision
    picture = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    fields: dict[str, Any] = {"width": SIDE, "height": SIDE, "seed": 5, "steps": STEPS}
    fields |= {"prompt": PROMPT, "strength": 0.5}
    tasks = [
        # Images of one request have one autoencoder, and share the latents of a picture.
        task_of(model, autoencoder=name, image=2 * picture - 1, **fields)
        for name in ("full", "tiny")
    ]
    rows: list[int] = []
    evaluate = model.evaluate

    def counted(x: Tensor, *others: Any) -> Tensor:
        rows.append(len(x))
        return evaluate(x, *others)

    engine = started(model, 16)
    monkeypatch.setattr(model, "evaluate", counted)
    try:
        with full_ticks():
            ear = run(engine, tasks)
    finally:
        engine.stop(0)
    assert not ear.errors, ear.errors
    assert rows == [2] * (STEPS // 2)
    monkeypatch.setattr(of_flux, "randn_tensor", lambda *_, **__: start_noise(5, SHAPE)[None])
    for index, vae in enumerate((pipeline.vae, network)):
        anew: Any = FluxImg2ImgPipeline(**pipeline.components | {"vae": vae})
        anew.set_progress_bar_config(disable=True)
        if vae is pipeline.vae:
            # Theirs is a sample of the posterior, ours its mean.
            mean = vae.encode(2 * picture[None] - 1).latent_dist.mode()
            given = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        else:
            given = picture[None]
        [theirs] = anew(
            PROMPT,
            image=given,
            strength=0.5,
            num_inference_steps=STEPS,
            guidance_scale=3.5,
            width=SIDE,
            height=SIDE,
            output_type="np",
            **SHORT,
        ).images
        assert_alike(ear.results[index].pixels, np.round(255 * theirs).astype(np.uint8))


@torch.inference_mode()
def test_a_reference_is_encoded_by_each_image_s_own_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture object may be that of several images, as in a stream that changes over."""
    tiny_flux1.make(tiny_flux1.DEV, guided=True, kind=FluxKontextPipeline).save_pretrained(
        tmp_path / "one"
    )
    model = load(tmp_path / "one")
    add_tiny_autoencoder(model, saved(tiny(), tmp_path / "taef1"))
    picture = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    read: list[Tensor] = []
    add_references = model.add_references

    def watched(text: Any, references: Any) -> Any:
        read.extend(references)
        return add_references(text, references)

    assert model.tiny is not None
    full, small = model.encode_image(picture[None])[0], model.tiny.encode(picture[None])[0]
    fields: dict[str, Any] = {"width": SIDE, "height": SIDE, "steps": 1, "prompt": PROMPT}
    engine = started(model, 16)
    monkeypatch.setattr(model, "add_references", watched)
    try:
        for name, expected in (("full", full), ("tiny", small), ("full", full)):
            task = task_of(model, autoencoder=name, **fields)
            run(engine, [replace(task, references=(picture,))])
            assert read
            for latents in read:
                torch.testing.assert_close(latents, expected)
            read.clear()
    finally:
        engine.stop(0)


def test_a_full_autoencoder_is_refused_as_a_tiny_one(flux: Path) -> None:
    with pytest.raises(ModelMismatch, match="vae 'vae' is not a tiny autoencoder"):
        add_tiny_autoencoder(load(flux), flux / "vae")


def original(network: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder and the decoder in the form of the original code.

    Its decoder is the same sequence behind a layer that clamps, which has no weights.
    """
    encoder: nn.Sequential = network.encoder.layers
    decoder = nn.Sequential(nn.Tanh(), *network.decoder.layers)
    return encoder.state_dict(), decoder.state_dict()


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 with latents of 16 channels and cells of 8 pixels, as the published one."""
    four: dict[str, Any] = {
        "latent_channels": 16,
        "block_out_channels": (32,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
    }
    pipeline = tiny_flux1.make(tiny_flux1.DEV, guided=True, channels=64)
    pipeline.vae = type(pipeline.vae)(**tiny_flux1.VAE | four).eval()
    folder = tmp_path_factory.mktemp("models") / "flux"
    pipeline.save_pretrained(folder)
    return folder


@torch.inference_mode()
def test_each_published_form_of_a_tiny_autoencoder_is_read(flux: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: Any = AutoencoderTiny(latent_channels=16).eval()
    encoder, decoder = original(network)
    assert {"0.weight", "14.bias"} <= encoder.keys()
    assert {"1.weight", "3.conv.4.bias", "19.weight"} <= decoder.keys()
    network.save_pretrained(tmp_path / "kept")
    save_file(network.state_dict(), tmp_path / "named.safetensors")
    approx = tmp_path / "vae_approx"
    approx.mkdir()
    save_file(encoder, approx / "taef1_encoder.safetensors")
    save_file(decoder, approx / "taef1_decoder.safetensors")
    joined = {f"taesd_encoder.{name}": one for name, one in encoder.items()}
    joined |= {f"taesd_decoder.{name}": one for name, one in decoder.items()}
    scales = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}
    save_file(joined | scales, tmp_path / "combined.safetensors")
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoded, encoded = network.decode(latents).sample, network.encode(pixels).latents
    plain = load(flux)
    revisions: set[str] = set()
    for path, name in (
        (tmp_path / "kept", "kept"),
        (tmp_path / "named.safetensors", "named"),
        (tmp_path / "combined.safetensors", "combined"),
        (approx, "vae_approx"),
        (approx / "taef1_decoder.safetensors", "taef1"),
        (approx / "taef1_encoder.safetensors", "taef1"),
    ):
        model = load(flux, path)
        torch.testing.assert_close(model.decode(latents), decoded)
        torch.testing.assert_close(model.encode_image(pixels), encoded)
        assert model.facts.vae == name
        assert model.facts.denoiser == plain.facts.denoiser
        revisions.add(model.facts.revision)
    assert plain.facts.revision not in revisions


@torch.inference_mode()
def test_a_model_folder_of_any_family_may_have_a_tiny_autoencoder(tmp_path: Path) -> None:
    pipeline = tiny_z_image.make(tiny_z_image.BASE_SHIFT)
    pipeline.vae = tiny()
    pipeline.save_pretrained(tmp_path / "z")
    latents = torch.randn(1, *SHAPE)
    theirs = pipeline.vae.decode(latents).sample
    torch.testing.assert_close(load(tmp_path / "z").decode(latents), theirs)


@torch.inference_mode()
def test_a_masked_picture_is_encoded_by_it_too(tmp_path: Path) -> None:
    pipeline = tiny_sd.make(tiny_sdxl.BASE, in_channels=9)
    pipeline.save_pretrained(tmp_path / "inpaint")
    network = tiny()
    model = load(tmp_path / "inpaint", saved(network, tmp_path / "tiny"))
    picture = torch.rand(3, SIDE, SIDE) * 2 - 1
    channels = model.channels(picture, torch.zeros(SIDE, SIDE), SIDE, SIDE)
    assert channels is not None
    torch.testing.assert_close(channels[1:], network.encode(picture[None]).latents[0])


@torch.inference_mode()
def test_a_large_picture_passes_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of diffusers' class are for latents of four channels alone."""
    network = tiny(latent_channels=16)
    autoencoder = Autoencoder(network, torch.device("cpu"))
    pixels = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    monkeypatch.setattr(tiling, "MAX_UNTILED_PIXELS", SIDE**2 - 1)
    latents = autoencoder.encode(pixels)
    torch.testing.assert_close(latents, network.encode(pixels).latents)
    torch.testing.assert_close(autoencoder.decode(latents), network.decode(latents).sample)


def rewritten(folder: Path, **entries: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def test_one_whose_latents_are_not_the_models_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_z_image.make(tiny_z_image.BASE_SHIFT)
    pipeline.save_pretrained(tmp_path / "z")
    encoder, decoder = original(tiny())
    lone, several = tmp_path / "lone", tmp_path / "several"
    for folder in (lone, several):
        folder.mkdir()
        save_file(decoder, folder / "taesd_decoder.safetensors")
    for name in ("taesd_encoder", "taef1_encoder"):
        save_file(encoder, several / f"{name}.safetensors")
    save_file(tiny().state_dict(), tmp_path / "small.safetensors")
    levels: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
    }
    (tmp_path / "b").mkdir()
    for path, says in (
        (
            saved(tiny(latent_channels=16), tmp_path / "16"),
            "^vae '16' has latents of 16 channels, but those of model 'one' have 4",
        ),
        (
            saved(tiny(**levels), tmp_path / "levels"),
            "encodes 4 and decodes 2 pixels .* but a cell of model 'one' has 2",
        ),
        (
            saved(tiny(in_channels=4), tmp_path / "rgba"),
            "encodes pictures of 4 channels and decodes 3; allowed are 3",
        ),
        (
            saved(tiny(scaling_factor=0.13025), tmp_path / "scaled"),
            "0.13025 and 0; allowed are 1 and 0, .* of model 'one', 0.3611 and 0.1159",
        ),
        (
            rewritten(saved(tiny(), tmp_path / "deep"), num_encoder_blocks=[1, 3]),
            "differs from the AutoencoderTiny that is described by its config: .*encoder.layers",
        ),
        (
            rewritten(saved(tiny(), tmp_path / "kl"), _class_name="AutoencoderKL"),
            "has the config of a AutoencoderKL, but the weights of an AutoencoderTiny",
        ),
        (
            rewritten(saved(tiny(), tmp_path / "odd"), num_encoder_blocks=[1]),
            "'odd' has a config of no AutoencoderTiny",
        ),
        (tmp_path / "small.safetensors", "differs from the AutoencoderTiny that is published"),
        (lone, "whose encoder is missing: there is no taesd_encoder.safetensors beside it"),
        (several, "the tiny autoencoders taef1, taesd; name one of the files, such as taef1_dec"),
    ):
        with pytest.raises(ModelMismatch, match=says):
            load(tmp_path / "z", path)


def test_a_family_whose_latents_no_tiny_autoencoder_makes_says_so(tmp_path: Path) -> None:
    tiny_flux2.make(distilled=True).save_pretrained(tmp_path / "klein")
    path = saved(tiny(), tmp_path / "tiny")
    with pytest.raises(ModelMismatch, match="model 'one' has latents that no AutoencoderTiny"):
        load(tmp_path / "klein", path)
