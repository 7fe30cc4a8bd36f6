"""Single-file checkpoints of Stable Diffusion, converted once to a folder in the diffusers layout.

Tensors are renamed by diffusers' own converters. Configs and the vocabulary of the text encoders
ship with Weft (``single_file/``), so nothing is downloaded. The folder is then read like any other:
an error names tensors that are missing or unexpected.
"""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import shutil
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from server.errors import ModelMismatch
from server.models.checkpoint_prediction import V_PREDICTION, ZERO_TERMINAL_SNR, prediction_of
from server.models.folder import GGUF, INDEX, stamp_of
from server.models.scaled_weights import unscaled
from server.models.unfinished import unfinished
from server.models.weight_files import NETWORK, TEXT_ENCODER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from server.models.checkpoint_prediction import TrainedPrediction

__all__ = ["converted", "write_tokenizer"]

log = logging.getLogger("weft")

TEMPLATES: Final = {
    "v1": "sd15",
    "inpainting": "sd15",
    "v2": "sd21",
    "inpainting_v2": "sd21",
    "xl_base": "sdxl",
    "xl_inpaint": "sdxl",
}
"""Folder of configs for each kind of checkpoint, by diffusers' names of the kinds."""

INPAINTING: Final = ("inpainting", "inpainting_v2", "xl_inpaint")
SIZE_OF_VELOCITIES: Final = 96
"""Latent height and width of images of Stable Diffusion 2.x with velocity prediction."""

UNET: Final = "model.diffusion_model."
AUTOENCODER: Final = "first_stage_model."
CLIP: Final = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP: Final = "conditioner.embedders.1.model."
SECOND_CLIP: Final = "cond_stage_model.model."
"""Prefix in checkpoints of Stable Diffusion 2.x, whose U-Net reads the last layer but one."""

LAST_LAYER: Final = f"{SECOND_CLIP}transformer.resblocks.23."
NETWORKS: Final = (UNET, AUTOENCODER, *CLIP, OPEN_CLIP, SECOND_CLIP)
OF_TRAINING: Final = (
    "model_ema.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "cond_stage_model.logit_scale",
    "conditioner.embedders.0.logit_scale",
    "alphas_cumprod",
    "betas",
    "denoiser.sigmas",
    "epoch",
    "global_step",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "posterior_",
    "sqrt_",
    "scale_factor",
)
"""Prefixes of tensors in checkpoints that are not used for sampling."""

OF_CLIP_ALONE: Final = tuple(f"{one}text_projection.weight" for one in CLIP)
"""A layer of CLIP that is not used for sampling; some merges keep it."""

PROJECTION: Final = f"{OPEN_CLIP}text_projection"

BY_EDM: Final = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Tensors of models with EDM preconditioning (Karras et al.): Playground v2.5, CosXL."""

IGNORED_TENSORS: Final = ("position_ids", "logit_scale")
COPIED: Final = (".in_proj_weight", ".in_proj_bias", ".text_projection")
"""OpenCLIP tensors that the converters split or transpose, so their memory is not reused."""

NAMES_SHOWN: Final = 3

CONVERTERS: Final = ("checkpoint", "checkpoint_prediction", "scaled_weights")
"""Modules that, with diffusers and the templates, determine the contents of a converted folder."""


def converted(
    file: Path,
    cache: Path,
    templates: Path | None = None,
    on_convert: Callable[[], None] | None = None,
) -> Path:
    """Convert a checkpoint, unless it has been converted before, and return the folder.

    Args:
        file: ``.safetensors`` file with the names of the original Stable Diffusion 1.x, 2.x or XL.
        cache: folder in which converted checkpoints are kept.
        templates: folder with the configs of each kind; by default those that ship with Weft.
        on_convert: called if the checkpoint has to be converted.

    Raises:
        ModelMismatch: the file is of another kind, or has tensors that belong to no network.
        OSError: the folder cannot be written.
    """
    if file.suffix == GGUF:
        raise ModelMismatch(
            f"model file {str(file)!r} is a GGUF file, which holds one network; host a folder in "
            "the diffusers layout, and give it this network by `--denoiser name=path`."
        )
    templates = templates or Path(str(files("server.models") / "single_file"))
    identity = f"{file.resolve()} {stamp_of(file)} {_version(templates)}"
    folder = cache / f"{file.stem}-{sha256(identity.encode()).hexdigest()[:16]}"
    if (folder / INDEX).is_file():
        return folder
    if on_convert is not None:
        on_convert()
    cache.mkdir(parents=True, exist_ok=True)
    with unfinished(cache) as made:
        _convert(file, made, templates)
        _sync(made)
        _put(made, folder)
    return folder


def _version(templates: Path) -> str:
    """Hash of everything that determines the contents of a converted folder, besides the file."""
    digest = sha256(version("diffusers").encode())
    own = (Path(__file__).with_name(f"{name}.py") for name in CONVERTERS)
    for file in (*own, *sorted(one for one in templates.rglob("*") if one.is_file())):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Write a folder to the disk: a loss of power must not leave one that only looks complete."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put(made: Path, folder: Path) -> None:
    """Rename the folder, unless another process (there may be one per GPU) has already made it."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / INDEX).is_file():
            raise
        shutil.rmtree(made, ignore_errors=True)


def write_tokenizer(folder: Path) -> None:
    """Write the vocabulary of CLIP's text encoders in the form that their tokenizers read."""
    packed = files("server.models") / "single_file" / "clip_merges.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().splitlines()
    letters = _letters()
    words = [*letters, *(f"{one}</w>" for one in letters)]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def _letters() -> list[str]:
    """The characters that stand for the 256 bytes: printable ones first, then substitutes."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printed), *(chr(256 + i) for i in range(256 - len(printed)))]


def _convert(file: Path, folder: Path, templates: Path) -> None:
    weights, metadata = _read(file)
    kind = _kind(file, weights)
    shutil.copytree(templates / TEMPLATES[kind], folder, dirs_exist_ok=True)
    for tokenizer in folder.glob("tokenizer*"):
        if not (tokenizer / "tokenizer.json").exists():
            write_tokenizer(tokenizer)
    prediction = _adapt_configs(folder, kind, weights, metadata)
    if prediction.guessed:
        log.warning(
            "%s does not say whether it predicts noise or a velocity; by its weights it is %s. If "
            "its pictures are noise, host a folder in the diffusers layout, whose scheduler tells",
            file,
            "a velocity" if prediction.velocity else "noise",
        )
    try:
        parts = _parts(folder, weights)
    except KeyError as error:
        raise ModelMismatch(f"model file {str(file)!r} lacks the tensor {error}.") from None
    if unknown := _left_over(weights, parts):
        raise ModelMismatch(
            f"model file {str(file)!r} has tensors that its networks do not: "
            f"{', '.join(unknown[:NAMES_SHOWN])}."
        )
    for part, own in parts.items():
        stem = TEXT_ENCODER if part.startswith("text_encoder") else NETWORK
        _write(folder / part / f"{stem}.safetensors", own)


def _write(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from None


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors needed for sampling, and the file's metadata."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelMismatch(f"model file {str(file)!r} cannot be read: {error}.") from None
    unused = (*OF_TRAINING, *OF_CLIP_ALONE)
    used = {name: tensor for name, tensor in weights.items() if not name.startswith(unused)}
    if (turned := used.pop(f"{PROJECTION}.weight", None)) is not None:
        # A linear layer's weight is the transpose of OpenCLIP's matrix.
        used[PROJECTION] = turned.T
    return unscaled(used, f"model file {str(file)!r}"), metadata


def _kind(file: Path, weights: Mapping[str, Tensor]) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    # diffusers classifies everything it does not recognize as Stable Diffusion 1.
    kind = infer_diffusers_model_type(weights)
    if by_edm := [name for name in BY_EDM if name in weights]:
        raise ModelMismatch(
            f"model file {str(file)!r} has {by_edm[0]}: it predicts by the preconditioning of EDM, "
            "which is not supported for Stable Diffusion XL."
        )
    stands = f"{UNET}input_blocks.0.0.weight" in weights
    networks = {"text encoder": (*CLIP, SECOND_CLIP), "autoencoder": (AUTOENCODER,)}
    lacking = [
        name for name, own in networks.items() if not any(k.startswith(own) for k in weights)
    ]
    if stands and lacking:
        raise ModelMismatch(
            f"model file {str(file)!r} has a U-Net and no {' and no '.join(lacking)}; host a "
            "folder in the diffusers layout, and give it this U-Net by `--denoiser name=path`."
        )
    if kind not in TEMPLATES or not stands:
        other = "" if kind in TEMPLATES else f" (diffusers takes it for {kind})"
        raise ModelMismatch(
            f"model file {str(file)!r} is not a complete checkpoint of Stable Diffusion 1.x, 2.x "
            f"or XL{other}; models of other families are hosted as folders in the diffusers "
            "layout, whose transformer `--denoiser name=path` replaces by one in a file."
        )
    known = (*NETWORKS, V_PREDICTION, ZERO_TERMINAL_SNR)
    strange = sorted(name for name in weights if not name.startswith(known))
    if strange := [name for name in strange if not name.endswith(IGNORED_TENSORS)]:
        raise ModelMismatch(
            f"model file {str(file)!r} has tensors that belong to none of its networks: "
            f"{', '.join(strange[:NAMES_SHOWN])}."
        )
    return kind


def _adapt_configs(
    folder: Path, kind: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> TrainedPrediction:
    if kind in INPAINTING:
        _change(folder / "unet" / "config.json", in_channels=9)
        index = json.loads((folder / INDEX).read_text("utf-8"))
        family = index["_class_name"].replace("Pipeline", "InpaintPipeline")
        _change(folder / INDEX, _class_name=family)
    prediction = prediction_of(kind, weights, metadata)
    _change(folder / "scheduler" / "scheduler_config.json", **prediction.scheduler)
    if kind == "v2" and prediction.velocity:
        _change(folder / "unet" / "config.json", sample_size=SIZE_OF_VELOCITIES)
    return prediction


def _change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | entries, indent=2), "utf-8")


def _parts(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of each network under diffusers' names."""
    from diffusers.loaders import single_file_utils as theirs

    unet = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
    vae = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
    parts = {
        "unet": theirs.convert_ldm_unet_checkpoint(_of(weights, UNET), unet),
        "vae": theirs.convert_ldm_vae_checkpoint(_of(weights, AUTOENCODER), vae),
        "text_encoder": _text_encoder(folder, weights),
    }
    if (folder / "text_encoder_2").is_dir():
        if PROJECTION not in weights:
            raise KeyError(PROJECTION)
        second = theirs.convert_open_clip_checkpoint(None, _of(weights, OPEN_CLIP), OPEN_CLIP)
        parts["text_encoder_2"] = second
    return parts


def _text_encoder(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders import single_file_utils as theirs

    if not (own := _of(weights, SECOND_CLIP)):
        return theirs.convert_ldm_clip_checkpoint(_of(weights, *CLIP))
    config = json.loads((folder / "text_encoder" / "config.json").read_text("utf-8"))
    # All that the converter reads from a model, for files without a projection.
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return theirs.convert_open_clip_checkpoint(model, own, SECOND_CLIP)


def _left_over(
    weights: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor]]
) -> list[str]:
    """Names of tensors that were not converted; the converters ignore them silently."""
    used = {tensor.data_ptr() for own in parts.values() for tensor in own.values()}
    of_networks = _of(weights, *NETWORKS)
    return sorted(
        name
        for name, tensor in of_networks.items()
        if tensor.data_ptr() not in used
        and not name.endswith(COPIED)
        # Not used for sampling.
        and not name.startswith(LAST_LAYER)
    )


def _of(weights: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith(prefixes) and not name.endswith(IGNORED_TENSORS)
    }
