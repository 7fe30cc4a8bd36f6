"""Z-Image, base and Turbo: a single-stream flow-matching transformer, a Qwen3 text encoder.

Z-Image Team, arXiv 2511.22699; as ``ZImagePipeline`` of diffusers runs it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from server.errors import ModelMismatch
from server.models.autoencoder import Autoencoder
from server.models.chat_text import TEXT, ChatTemplate, ChatText
from server.models.conditioning import LENGTHS, MASK, stack_padded
from server.models.conventions import defaults_by
from server.models.distilled import stated
from server.models.flow_matching import SCHEDULER, FlowSchedules
from server.models.folder import Revisions, read_json
from server.models.hosted import ModelFacts
from server.models.parts import load_autoencoder, load_network, load_text_encoder, load_tokenizer
from server.models.transformer_model import (
    TRANSFORMER,
    TransformerModel,
    check_channels,
    default_side,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from samplers.levels import F64
    from server.models.conditioning import Conditioning, StackedConditioning
    from server.models.defaults import ModelDefaults
    from server.models.inputs import RowInputs

MULTIPLE = 32
"""Tokens of a text and of a picture are filled up to multiples of this with learned ones."""

PATCH = 2
KEY = f"{PATCH}-1"
"""Of the layers for tokens of so many cells along a side, of one frame."""

TEMPLATE = ChatTemplate("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", places=512)
"""Qwen3's own around a prompt, with thinking enabled."""

LAYER = -2
"""Of the text encoder's hidden states, those that the transformer reads."""

TURBO_SHIFT = 3.0
"""Of Turbo's scheduler; that of the base model is 6."""


class ZImageDenoiser:
    """Calls the transformer, which is told the share of signal and puts out a negative velocity.

    Args:
        network: a ``ZImageTransformer2DModel`` in inference mode.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        # Called through the network, whose hooks then run.
        network.forward = partial(evaluate, network)

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        told = inputs.conditioning.tensors
        texts = told[TEXT], told[LENGTHS], told.get(MASK)
        return -self.network(x.to(self.network.dtype), t, *texts).float()


def load_z_image(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder from safetensors alone.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen2Tokenizer, Qwen3Model

    encoder = load_text_encoder(folder, "text_encoder", Qwen3Model, dtype)
    positions = encoder.config.max_position_embeddings
    tokenizer = load_tokenizer(folder, "tokenizer", Qwen2Tokenizer, positions)

    def states(tokens: Tensor) -> Tensor:
        return encoder(tokens, output_hidden_states=True, use_cache=False).hidden_states[LAYER]

    text = ChatText(encoder, states, tokenizer, TEMPLATE, device)
    transformer = load_network(folder, TRANSFORMER, [ZImageTransformer2DModel], dtype)
    vae = load_autoencoder(folder, [AutoencoderKL], dtype)
    latent_scale = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = PATCH * latent_scale
    side = default_side(vae, multiple)
    channels = transformer.config.in_channels
    check_channels(folder, channels, vae.config.latent_channels)
    _check_positions(folder, transformer)
    facts = ModelFacts(
        name=name,
        revision=revisions.weights,
        denoiser=revisions.denoiser,
        prediction="flow",
        latent_channels=channels,
        latent_scale=latent_scale,
        size_multiple=multiple,
        default_width=side,
        default_height=side,
        max_tokens=text.max_tokens,
        longest_side=multiple * min(transformer.config.axes_lens[1:]),
        defaults=_defaults_of(folder),
    )
    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=FlowSchedules(folder, multiple),
        denoiser=ZImageDenoiser(transformer),
        autoencoder=Autoencoder(vae, device),
        text=text,
        stack=stack,
        told=alpha_of,
    )


def _check_positions(folder: Path, transformer: Any) -> None:
    """Refuse a transformer of other tokens, or of fewer positions than a text has.

    A position that it does not have would be an error of the device, which nobody survives.
    """
    if KEY not in transformer.all_x_embedder:
        raise ModelMismatch(
            f"{TRANSFORMER} of model folder {str(folder)!r} has no tokens of {PATCH} x {PATCH} "
            "cells; Z-Image has."
        )
    # A text begins at 1, and the picture stands behind it.
    needed, held = TEMPLATE.places + 2, transformer.config.axes_lens[0]
    if held < needed:
        raise ModelMismatch(
            f"{TRANSFORMER} of model folder {str(folder)!r} has axes_lens that begin with {held}; "
            f"texts of {TEMPLATE.places} tokens need at least {needed}."
        )


def stack(rows: Sequence[Conditioning], *, fixed: bool) -> StackedConditioning:
    """Texts of several lengths, each with the learned tokens behind it."""
    return stack_padded(rows, TEXT, multiple=MULTIPLE, places=TEMPLATE.places if fixed else None)


def alpha_of(t: F64) -> F64:
    """What the transformer is told at a sigma of ``t``."""
    return 1 - t


def _defaults_of(folder: Path) -> ModelDefaults:
    scheduler = read_json(folder, SCHEDULER)
    if said := stated(folder, scheduler, embeds_scale=False, flow=True):
        return said
    if scheduler.get("shift") == TURBO_SHIFT:
        return defaults_by("z_image_turbo", "the shift of its scheduler is 3")
    return defaults_by("z_image", "it is a ZImagePipeline whose scheduler's shift is not 3")


def evaluate(
    network: Any, x: Tensor, t: Tensor, text: Tensor, lengths: Tensor, mask: Tensor | None
) -> Tensor:
    """What ``ZImageTransformer2DModel`` puts out, for texts of several lengths at once.

    Its own forward takes lists, and so builds each row's positions and masks by itself and waits
    for the device to learn the lengths. Here the same layers get all rows as one tensor.

    Args:
        network: the transformer.
        x: ``[rows, C, h, w]`` of the network's type.
        t: what it is told, ``[rows]`` float32.
        text: hidden states, ``[rows, L, features]``; L is a multiple of ``MULTIPLE``.
        lengths: tokens of each text, int64 ``[rows]``.
        mask: which of the L places a row attends to, bool ``[rows, L]``; None for all.

    Returns:
        ``[rows, C, h, w]``.
    """
    time = network.t_embedder(t * network.t_scale).type_as(x)
    image = network.all_x_embedder[KEY](_patches(x))
    count, missing = image.shape[1], -image.shape[1] % MULTIPLE
    image = torch.cat([image, network.x_pad_token.expand(len(x), missing, -1)], 1)
    place = torch.arange(text.shape[1], device=x.device)
    words = network.cap_embedder(text)
    words = torch.where((place < lengths[:, None])[..., None], words, network.cap_pad_token)
    # A picture stands one place behind its text; learned tokens behind it stand at the origin.
    behind = lengths + -lengths % MULTIPLE + 1
    image_rope = _rope(network, _grid(x, behind, missing))
    text_rope = _rope(network, torch.stack([place + 1, 0 * place, 0 * place], -1)[None])
    for block in network.noise_refiner:
        image = block(image, None, image_rope, time)
    for block in network.context_refiner:
        words = block(words, mask, text_rope)
    joint = torch.cat([image, words], 1)
    rope = torch.cat([image_rope, text_rope.expand(len(x), -1, -1)], 1)
    if mask is not None:
        mask = torch.cat([mask.new_ones(image.shape[:2]), mask], 1)
    for block in network.layers:
        joint = block(joint, mask, rope, time)
    made = network.all_final_layer[KEY](joint, c=time)[:, :count]
    return _unpatched(made, *x.shape[-2:])


def _patches(x: Tensor) -> Tensor:
    """Tokens ``[rows, h/2 * w/2, 4 C]`` in the order of lines, channels last within a patch."""
    rows, channels, height, width = x.shape
    cells = x.view(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _unpatched(tokens: Tensor, height: int, width: int) -> Tensor:
    cells = tokens.view(len(tokens), height // PATCH, width // PATCH, PATCH, PATCH, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)


def _grid(x: Tensor, behind: Tensor, missing: int) -> Tensor:
    """Positions of a picture's tokens, int64 ``[rows, tokens + missing, 3]``."""
    lines, columns = (torch.arange(size // PATCH, device=x.device) for size in x.shape[-2:])
    grid = torch.cartesian_prod(lines, columns).expand(len(x), -1, -1)
    first = behind[:, None, None].expand(-1, grid.shape[1], 1)
    places = torch.cat([first, grid], -1)
    return torch.cat([places, places.new_zeros(len(x), missing, 3)], 1)


def _rope(network: Any, places: Tensor) -> Tensor:
    """Complex rotations ``[rows, tokens, half a head]``."""
    return network.rope_embedder(places.flatten(0, 1)).view(*places.shape[:2], -1)
