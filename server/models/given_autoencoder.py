"""Replaces a model's autoencoder by one that the operator specifies.

A tiny autoencoder takes the place of the network. Any other gives the network its weights alone.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file

from server.errors import ModelMismatch
from server.models.autoencoder import Autoencoder
from server.models.folder import AUTOENCODER, Revisions, chunks_of, read_json
from server.models.own_memory import copy_to_own_memory
from server.models.prefixes import own_prefix
from server.models.tiny_autoencoder import (
    HALVES,
    TINY,
    check_tiny,
    halves_at,
    name_of,
    tiny_as_diffusers,
    tiny_network,
    whole_of,
)
from server.models.weight_files import NETWORK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from server.models.hosted import HostedModel

__all__ = [
    "add_tiny_autoencoder",
    "files_of",
    "give_autoencoder",
    "named_as_by_diffusers",
    "with_autoencoder",
]

CONFIG: Final = "config.json"

WITHIN: Final = ("first_stage_model.", "vae.")
"""Prefixes of an autoencoder in a file that also contains other networks."""

ORIGINAL: Final = re.compile(r"(?:encoder\.down|decoder\.up)\.\d")
"""Names of an autoencoder's layers in the original Stable Diffusion and FLUX code."""

BLOCKS: Final = "down_block_types"
"""Config entry of autoencoders that have such layers."""

OF_WAN: Final = "decoder.middle.0.residual.0.gamma"
"""Name of a tensor in the original code of Wan, whose autoencoder is Qwen-Image's."""

USED: Final = re.compile(r"(?:encoder|decoder|quant_conv|post_quant_conv|bn)\.")
"""Names of the network's tensors; training files contain others as well."""

WITHIN_SIDES: Final = re.compile(r"(?:encoder|decoder)\.((?:post_)?quant_conv\.)")
"""Layers of FLUX.2 that its original code keeps within the encoder and decoder."""

STATISTICS: Final = "bn."
"""Prefix of the statistics of FLUX.2's latents, the same in both naming schemes."""

LATENTS: Final = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Entries of an autoencoder's config that determine its latent space."""

NAMES_SHOWN: Final = 3


def files_of(path: Path) -> tuple[Path, ...]:
    """The weight files of an autoencoder: one, or the original encoder and decoder of a tiny one.

    Args:
        path: a safetensors file or a folder with one; or one of those two, or a folder with both.

    Raises:
        ModelMismatch: there are no such files.
    """
    file = path / f"{NETWORK}.safetensors" if path.is_dir() else path
    if not (path.is_dir() and file.is_file()) and (halves := halves_at(path)) is not None:
        return halves
    if not file.is_file() or file.suffix != ".safetensors":
        raise ModelMismatch(
            f"vae {path.name!r} is neither a .safetensors file nor a folder with {NETWORK}"
            ".safetensors, or with the two files of a tiny autoencoder."
        )
    return (file,)


def with_autoencoder(revisions: Revisions, path: Path) -> Revisions:
    """The revisions of a model with another autoencoder.

    Raises:
        ModelMismatch: there are no such files.
    """
    digest = hashlib.sha256(revisions.weights.encode())
    for chunk in chain.from_iterable(map(chunks_of, files_of(path))):
        digest.update(chunk)
    return Revisions(digest.hexdigest()[:16], revisions.denoiser)


def give_autoencoder(model: HostedModel, path: Path) -> None:
    """Replace a model's autoencoder.

    Args:
        model: model that has just been loaded.
        path: a safetensors file with diffusers' names or the original ones, or a diffusers folder;
            for a tiny autoencoder see :func:`files_of`.

    Raises:
        ModelMismatch: the weights do not fit the network, or they or the folder's config describe
            another latent space.
    """
    own: Any = model.modules().get(AUTOENCODER)
    if own is None:
        raise ModelMismatch(
            f"model {model.facts.name!r} has no autoencoder that vae could replace."
        )
    weights = _read(path)
    if (tiny := tiny_as_diffusers(weights)) is not None:
        network, replaced = _tiny(model, path, tiny)
        replaced.replace(network)
    else:
        _give_weights(model, path, weights, own)
    model.facts = replace(model.facts, vae=name_of(path))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        read = [load_file(file) for file in files_of(path)]
    except (OSError, SafetensorError) as error:
        raise ModelMismatch(f"vae {path.name!r} cannot be read: {error}.") from None
    return whole_of(*read) if len(read) == len(HALVES) else read[0]


def add_tiny_autoencoder(model: HostedModel, path: Path) -> None:
    """Load a tiny autoencoder beside a model's own, for the requests that ask for it.

    Args:
        model: model that has just been loaded.
        path: see :func:`files_of`.

    Raises:
        ModelMismatch: it is no tiny autoencoder, or one of other latents.
    """
    weights = tiny_as_diffusers(_read(path))
    if weights is None:
        raise ModelMismatch(f"vae {path.name!r} is not a tiny autoencoder.")
    tiny = Autoencoder(_tiny(model, path, weights)[0], model.device)
    copy_to_own_memory(tiny.network, model.device)
    revisions = Revisions(model.facts.revision, model.facts.denoiser)
    revision = with_autoencoder(revisions, path).weights
    model.tiny = tiny
    model.facts = replace(model.facts, revision=revision, tiny_vae=name_of(path))


def _tiny(model: HostedModel, path: Path, weights: Mapping[str, Tensor]) -> tuple[Any, Autoencoder]:
    """A tiny autoencoder that fits a model, and the model's own autoencoder."""
    called, own = f"vae {path.name!r}", model.autoencoder
    if own is None:
        raise ModelMismatch(
            f"{called} is a tiny autoencoder; model {model.facts.name!r} has latents that no "
            f"{TINY} makes."
        )
    config = None
    if path.is_dir() and (path / CONFIG).is_file():
        config = read_json(path, CONFIG)
    elif type(own.network).__name__ == TINY:
        config = own.network.config
    network = tiny_network(weights, config, called, model.dtype)
    check_tiny(network, called, model.facts, own)
    return network, own


def _give_weights(
    model: HostedModel, path: Path, weights: Mapping[str, Tensor], network: Any
) -> None:
    if path.is_dir() and (path / CONFIG).is_file():
        _check_latents(path, network)
    try:
        weights = named_as_by_diffusers(weights, network)
    except (KeyError, ValueError) as error:
        raise ModelMismatch(f"vae {path.name!r} cannot be read: {error}.") from None
    expected = network.state_dict()
    wrong = {name for name in expected if name not in weights} | {
        name
        for name, one in weights.items()
        if name not in expected or one.shape != expected[name].shape
    }
    if wrong:
        raise ModelMismatch(
            f"vae {path.name!r} does not fit model {model.facts.name!r}: these tensors are in only "
            f"one of them or have different shapes: {', '.join(sorted(wrong)[:NAMES_SHOWN])}."
        )
    network.load_state_dict(weights)


def named_as_by_diffusers(weights: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Rename the weights of an autoencoder to diffusers' names, ignoring other networks' weights.

    Args:
        weights: weights of the file, with diffusers' names or the original ones.
        network: diffusers network into which they will be loaded.
    """
    from diffusers.loaders import single_file_utils as theirs

    prefix = own_prefix(weights.keys(), WITHIN)
    given = {k.removeprefix(prefix): one for k, one in weights.items() if k.startswith(prefix)}
    if OF_WAN in given:
        return theirs.convert_wan_vae_to_diffusers(given)
    own = {name: tensor for name, tensor in given.items() if USED.match(name)}
    if BLOCKS in network.config and any(map(ORIGINAL.match, own)):
        original = {WITHIN_SIDES.sub(r"\1", name): tensor for name, tensor in own.items()}
        statistics = {name: one for name, one in own.items() if name.startswith(STATISTICS)}
        return theirs.convert_ldm_vae_checkpoint(original, network.config) | statistics
    network._fix_state_dict_keys_on_load(own)
    return own


def _check_latents(folder: Path, network: Any) -> None:
    config = read_json(folder, CONFIG)
    for entry in LATENTS:
        told, own = config.get(entry), getattr(network.config, entry, None)
        if entry in config and told != own:
            raise ModelMismatch(
                f"vae {folder.name!r} has the {entry} {str(told)[:60]}, but the model's "
                f"autoencoder has {str(own)[:60]}, so that its latents differ."
            )
