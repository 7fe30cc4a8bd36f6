"""Loads a model folder into a hosted model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from server.errors import ModelMismatch
from server.models.classifier import LatentClassifier
from server.models.flux1 import load_flux1
from server.models.flux2 import load_flux2_klein
from server.models.folder import (
    INDEX,
    classifier_file,
    parts_of,
    read_json,
    revisions_of,
    stamp_of,
    weights_in,
    without_folder,
)
from server.models.given_autoencoder import give_autoencoder, with_autoencoder
from server.models.latent_consistency import load_latent_consistency
from server.models.libraries import import_libraries
from server.models.linear_fits import LinearFits
from server.models.parts import check_loaded
from server.models.pixart import load_pixart
from server.models.placement import Placement
from server.models.placing import move_to_device
from server.models.qwen_image import load_qwen_image
from server.models.sana import load_sana, load_sana_sprint
from server.models.stable_diffusion import load_stable_diffusion
from server.models.stable_diffusion_3 import load_stable_diffusion_3
from server.models.stable_diffusion_xl import load_stable_diffusion_xl
from server.models.statistics import ModelStatistics
from server.models.z_image import load_z_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.models.hosted import HostedModel

logger = logging.getLogger(__name__)

FAMILIES = {
    "Flux2KleinPipeline": load_flux2_klein,
    "FluxKontextPipeline": load_flux1,
    "FluxPipeline": load_flux1,
    "LatentConsistencyModelPipeline": load_latent_consistency,
    "PixArtAlphaPipeline": load_pixart,
    "PixArtSigmaPipeline": load_pixart,
    "QwenImageEditPipeline": load_qwen_image,
    "QwenImageEditPlusPipeline": load_qwen_image,
    "QwenImagePipeline": load_qwen_image,
    "SanaPipeline": load_sana,
    "SanaSprintPipeline": load_sana_sprint,
    "StableDiffusion3Pipeline": load_stable_diffusion_3,
    "StableDiffusionInpaintPipeline": load_stable_diffusion,
    "StableDiffusionPipeline": load_stable_diffusion,
    "StableDiffusionXLInpaintPipeline": load_stable_diffusion_xl,
    "StableDiffusionXLPipeline": load_stable_diffusion_xl,
    "ZImagePipeline": load_z_image,
}
"""Loader of each supported pipeline class."""

IN_BFLOAT16 = frozenset(
    {
        "Flux2KleinPipeline",
        "FluxKontextPipeline",
        "FluxPipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImagePipeline",
        "SanaPipeline",
        "SanaSprintPipeline",
        "StableDiffusion3Pipeline",
        "ZImagePipeline",
    }
)
"""Pipeline classes whose text encoders or transformers may overflow in float16.

Their model cards and diffusers' documentation run them in bfloat16. T5 was trained in it, and
transformers keeps a layer of each of its blocks in float32 nevertheless; diffusers' page on FLUX.1
says that activations of its text encoders are clipped in float16.
"""


def load_model(
    folder: Path,
    *,
    name: str,
    device: str,
    dtype: str,
    placement: Placement | None = None,
    vae: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> HostedModel:
    """Load a diffusers-format folder: weights only from safetensors or GGUF files, and no code.

    Args:
        folder: folder that contains ``model_index.json``.
        name: name that requests use for the model.
        device: ``auto`` (CUDA if available), ``cpu``, ``cuda``, ``cuda:1``.
        dtype: ``auto`` (on CUDA float16, or bfloat16 where the family needs its range; otherwise
            float32), ``float32``, ``float16``, ``bfloat16``.
        placement: how its networks are kept; by default without further quantization, on the
            device.
        vae: safetensors file or diffusers folder of an autoencoder whose weights replace its own.
        on_progress: called with the number of bytes of weights read so far, and with that of all
            weights.

    Raises:
        ModelMismatch: the folder is not a model that can be hosted; the sentence says why.
    """
    family = family_of(folder)
    import_libraries()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place = choose_device(device)
    half = torch.bfloat16 if family in IN_BFLOAT16 else torch.float16
    chosen = choose_dtype(dtype, place, half)
    if chosen == torch.float16 and half == torch.bfloat16:
        logger.warning(
            "%s: a %s may overflow in float16, which spoils pictures; bfloat16 and auto are safe",
            name,
            family,
        )
    before = _stamps(folder)
    revisions = revisions_of(folder, on_progress)
    if vae is not None:
        revisions = with_autoencoder(revisions, vae)
    try:
        model = FAMILIES[family](folder, name, revisions, place, chosen)
        check_loaded(folder, model.modules())
        if vae is not None:
            give_autoencoder(model, vae)
        move_to_device(model, placement or Placement())
        if _stamps(folder) != before:
            # Its parts may be from before or after the change, and so have no revision.
            raise ModelMismatch(
                f"model folder {str(folder)!r} changed while it was read; try again."
            )
    except ModelMismatch:
        raise
    except Exception as error:
        raise ModelMismatch(f"model folder {str(folder)!r} could not be loaded: {error}") from error
    model.statistics = ModelStatistics.of(folder, revisions.denoiser, model.default_schedule)
    _add_classifier(model, folder)
    model.linear_fits = LinearFits(folder)
    return model


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Stamps of all files that a model is loaded from, by which a change is detected."""
    parts = (file for part in parts_of(folder) for file in (folder / part).glob("*"))
    return {file: stamp_of(file) for file in (folder / INDEX, *parts, *weights_in(folder))}


def family_of(folder: Path) -> str:
    """The pipeline class that a folder names.

    Raises:
        ModelMismatch: it names none, or one that is not supported.
    """
    family = read_json(folder, INDEX).get("_class_name")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelMismatch(
            f"model folder {str(folder)!r} names the pipeline {str(family)[:80]!r}; "
            f"allowed are {', '.join(sorted(FAMILIES))}."
        )
    return family


def _add_classifier(model: HostedModel, folder: Path) -> None:
    """Load the classifier of the model's latents, if the folder has one for these weights."""
    file = classifier_file(folder)
    if not file.exists():
        model.classifier_lacks = f"its folder has no {file.relative_to(folder)}"
        return
    try:
        classifier = LatentClassifier.load(file)
        classifier.check(model.facts.denoiser)
    except ModelMismatch as error:
        logger.warning("%s is left out: %s", file, error)
        model.classifier_lacks = without_folder(error, file).rstrip(".")
        return
    model.classifier = classifier.to(model.device)


def choose_device(device: str) -> torch.device:
    """The torch device for a setting.

    Raises:
        ModelMismatch: CUDA is requested but not available, or the name is invalid.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelMismatch(
            f"device is {device!r}; allowed are auto, cpu, cuda and cuda:N."
        ) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelMismatch(f"device is {device!r}, but this machine has no CUDA device; use cpu.")
    return chosen


def choose_dtype(
    dtype: str, device: torch.device, half: torch.dtype = torch.float16
) -> torch.dtype:
    """The torch dtype for a setting.

    Args:
        dtype: the setting.
        device: device of the model.
        half: dtype for ``auto`` on CUDA.
    """
    if dtype == "auto":
        return half if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
