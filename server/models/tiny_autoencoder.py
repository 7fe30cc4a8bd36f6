"""Tiny autoencoders: TAESD and its kin, which encode and decode in a fraction of the time.

They read and write the denoiser's own latents, so they have neither a scale nor a shift. Their
original code (https://github.com/madebyollin/taesd) keeps the encoder and the decoder in two files,
each a plain sequence of layers; ComfyUI joins the two in one file. diffusers' ``AutoencoderTiny``
is the same network under other names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from server.errors import ModelMismatch
from server.models.parts import known_entries

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from server.models.autoencoder import Autoencoder
    from server.models.hosted import ModelFacts

__all__ = [
    "HALVES",
    "TINY",
    "check_tiny",
    "halves_at",
    "name_of",
    "tiny_as_diffusers",
    "tiny_network",
    "whole_of",
]

TINY: Final = "AutoencoderTiny"

HALVES: Final = ("encoder", "decoder")
SUFFIX: Final = ".safetensors"
HALF: Final = re.compile(rf"(?P<name>.+)_(?:{'|'.join(HALVES)})$")
"""Name of an original file, without its suffix: that of the autoencoder, then that of the half."""

ORIGINAL: Final = re.compile(r"taesd_(?P<half>encoder|decoder)\.(?P<place>\d+)\.(?P<rest>.+)")
"""Name of a tensor where both halves are in one file; of two files, each lacks the first part."""

FIRST: Final = "decoder.layers.0.weight"
"""A tensor that every ``AutoencoderTiny`` has, ``[width, C, 3, 3]``, and no other autoencoder."""

CLAMPED: Final = 1
"""Number of layers that precede the first with weights in the original decoder alone: diffusers
limits the latents outside of the sequence."""

RGB: Final = 3

NAMES_SHOWN: Final = 3


def halves_at(path: Path) -> tuple[Path, Path] | None:
    """The original files of a tiny autoencoder: its encoder and its decoder.

    Args:
        path: either of the files, or a folder with one such pair.

    Returns:
        None where the path is neither.

    Raises:
        ModelMismatch: one of the two is missing, or the folder has several pairs.
    """
    if path.is_dir():
        found = sorted({name for file in path.glob(f"*{SUFFIX}") if (name := _name(file))})
        if len(found) > 1:
            raise ModelMismatch(
                f"vae {path.name!r} is a folder with the tiny autoencoders {', '.join(found)}; "
                f"name one of the files, such as {found[0]}_decoder{SUFFIX}."
            )
        folder, name = path, found[0] if found else None
    else:
        folder, name = path.parent, _name(path)
    if name is None:
        return None
    encoder, decoder = (folder / f"{name}_{half}{SUFFIX}" for half in HALVES)
    for half, file in zip(HALVES, (encoder, decoder), strict=True):
        if not file.is_file():
            raise ModelMismatch(
                f"vae {path.name!r} is half of a tiny autoencoder, whose {half} is missing: there "
                f"is no {file.name} beside it."
            )
    return encoder, decoder


def name_of(path: Path) -> str:
    """The name of an autoencoder, by the path that the operator specifies."""
    return path.stem if path.is_dir() else _name(path) or path.stem


def whole_of(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of both original files, with the names that they have in one file."""
    both = zip(HALVES, (encoder, decoder), strict=True)
    return {f"taesd_{half}.{name}": one for half, own in both for name, one in own.items()}


def tiny_as_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights of a tiny autoencoder with diffusers' names; None for those of any other network.

    Args:
        weights: all weights of its file, with diffusers' names or the original ones.
    """
    if FIRST in weights:
        return dict(weights)
    # Other entries of ComfyUI's files are the scale and the shift of the full autoencoder.
    found = {
        _named_by_diffusers(match): tensor
        for name, tensor in weights.items()
        if (match := ORIGINAL.match(name))
    }
    return found if FIRST in found else None


def tiny_network(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    called: str,
    dtype: torch.dtype,
) -> Any:
    """Build an ``AutoencoderTiny`` in inference mode.

    Args:
        weights: its weights, with diffusers' names.
        config: its config; None for that of all published ones, which differ in their latent
            channels alone.
        called: kind and name of the autoencoder, for errors.
        dtype: dtype of the weights.

    Raises:
        ModelMismatch: the config describes no such network, or not that of the weights.
    """
    from diffusers import AutoencoderTiny

    entries = {"latent_channels": weights[FIRST].shape[1]} if config is None else config
    if (kind := entries.get("_class_name", TINY)) != TINY:
        raise ModelMismatch(
            f"{called} has the config of a {str(kind)[:80]}, but the weights of an {TINY}."
        )
    try:
        network = AutoencoderTiny(**known_entries(entries, AutoencoderTiny.__init__))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ModelMismatch(f"{called} has a config of no {TINY}: {error}.") from None
    expected = network.state_dict()
    wrong = sorted(
        name
        for name in weights.keys() | expected.keys()
        if name not in weights
        or name not in expected
        or weights[name].shape != expected[name].shape
    )
    if wrong:
        which = "published for its latents" if config is None else "described by its config"
        raise ModelMismatch(
            f"{called} differs from the {TINY} that is {which}: these tensors are in only one of "
            f"them or have different shapes: {', '.join(wrong[:NAMES_SHOWN])}."
        )
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    network.load_state_dict(cast, assign=True)
    return network.eval().requires_grad_(requires_grad=False)


def check_tiny(network: Any, called: str, facts: ModelFacts, own: Autoencoder) -> None:
    """Refuse a tiny autoencoder whose latents are not those of a model.

    Args:
        network: the ``AutoencoderTiny``.
        called: kind and name of the autoencoder, for errors.
        facts: facts about the model.
        own: the model's own autoencoder.

    Raises:
        ModelMismatch: it has other channels, cells, scale or shift. Nothing tells two apart that
            were trained for the latents of different models with all of these in common.
    """
    config = network.config
    if config.latent_channels != facts.latent_channels:
        raise ModelMismatch(
            f"{called} has latents of {config.latent_channels} channels, but those of model "
            f"{facts.name!r} have {facts.latent_channels}."
        )
    cells = (
        2 ** (len(config.encoder_block_out_channels) - 1),
        config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1),
    )
    if set(cells) != {facts.latent_scale}:
        raise ModelMismatch(
            f"{called} encodes {cells[0]} and decodes {cells[1]} pixels along each side of a "
            f"latent cell, but a cell of model {facts.name!r} has {facts.latent_scale}."
        )
    if (config.in_channels, config.out_channels) != (RGB, RGB):
        raise ModelMismatch(
            f"{called} encodes pictures of {config.in_channels} channels and decodes "
            f"{config.out_channels}; allowed are {RGB}."
        )
    told = config.scaling_factor, config.shift_factor
    if told not in ((1.0, 0.0), own.scaling):
        raise ModelMismatch(
            f"{called} has the scaling_factor and shift_factor {told[0]:g} and {told[1]:g}; "
            f"allowed are 1 and 0, for the latents of the denoiser, and those of the autoencoder "
            f"of model {facts.name!r}, {own.scaling[0]:g} and {own.scaling[1]:g}."
        )


def _name(file: Path) -> str | None:
    match = HALF.match(file.stem) if file.suffix == SUFFIX else None
    return match["name"] if match else None


def _named_by_diffusers(match: re.Match[str]) -> str:
    place = int(match["place"]) - (CLAMPED if match["half"] == "decoder" else 0)
    return f"{match['half']}.layers.{place}.{match['rest']}"
