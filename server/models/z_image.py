"""Z-Image, base and Turbo: a single-stream flow-matching transformer, and a Qwen3 text encoder.

Z-Image Team, arXiv 2511.22699. It runs as in diffusers' ``ZImagePipeline``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

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
from server.models.z_image_forward import KEY, MULTIPLE, PATCH, evaluate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from samplers.levels import F64
    from server.models.conditioning import Conditioning, StackedConditioning
    from server.models.defaults import ModelDefaults
    from server.models.inputs import RowInputs

TEMPLATE = ChatTemplate("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", places=512)
"""Qwen3's chat template around a prompt, with thinking enabled."""

LAYER = -2
"""Index of the text encoder's hidden states that the transformer reads."""

TURBO_SHIFT = 3.0
"""Shift of Turbo's scheduler; that of the base model is 6."""


class ZImageDenoiser:
    """Calls the transformer, which takes alpha as its time and predicts the negative velocity.

    Args:
        network: a ``ZImageTransformer2DModel`` in inference mode.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        # It replaces ``forward`` and is called through the network, so that its hooks run.
        network.forward = partial(evaluate, network)

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        return self.of_sizes([x], t, inputs)[0]

    def of_sizes(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
        """See ``HostedModel.evaluate_sizes``."""
        tensors = inputs.conditioning.tensors
        texts = tensors[TEXT], tensors[LENGTHS], tensors.get(MASK)
        cells = [part.to(self.network.dtype) for part in x]
        return [-made.float() for made in self.network(cells, t, *texts)]


def load_z_image(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen2Tokenizer, Qwen3Model

    encoder = load_text_encoder(folder, "text_encoder", Qwen3Model, dtype)
    positions = encoder.config.max_position_embeddings
    tokenizer = load_tokenizer(folder, "tokenizer", Qwen2Tokenizer, positions)

    def states(tokens: Tensor) -> Tensor:
        return encoder(tokens, output_hidden_states=True, use_cache=False).hidden_states[LAYER]

    text = ChatText(encoder, states, tokenizer, TEMPLATE, device)
    transformer = load_network(folder, TRANSFORMER, [ZImageTransformer2DModel], dtype)
    vae = load_autoencoder(folder, dtype)
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
    denoiser = ZImageDenoiser(transformer)
    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=FlowSchedules(folder, multiple),
        denoiser=denoiser,
        sizes=denoiser.of_sizes,
        autoencoder=Autoencoder(vae, device),
        text=text,
        stack=stack,
        network_time=alpha_of,
    )


def _check_positions(folder: Path, transformer: Any) -> None:
    """Refuse a transformer with another patch size, or with fewer positions than a text needs.

    Indexing a position that it does not have would be a device-side error, which is fatal.
    """
    if KEY not in transformer.all_x_embedder:
        raise ModelMismatch(
            f"{TRANSFORMER} of model folder {str(folder)!r} has no tokens of {PATCH} x {PATCH} "
            "cells; Z-Image has."
        )
    # A text starts at position 1, and the image follows it.
    needed, held = TEMPLATE.places + 2, transformer.config.axes_lens[0]
    if held < needed:
        raise ModelMismatch(
            f"{TRANSFORMER} of model folder {str(folder)!r} has axes_lens that begin with {held}; "
            f"texts of {TEMPLATE.places} tokens need at least {needed}."
        )


def stack(rows: Sequence[Conditioning], *, fixed: bool) -> StackedConditioning:
    """Stack texts of several lengths, each followed by learned padding tokens."""
    return stack_padded(rows, TEXT, multiple=MULTIPLE, places=TEMPLATE.places if fixed else None)


def alpha_of(t: F64) -> F64:
    """The time that the transformer receives at a sigma of ``t``, which is alpha."""
    return 1 - t


def _defaults_of(folder: Path) -> ModelDefaults:
    scheduler = read_json(folder, SCHEDULER)
    if said := stated(folder, scheduler, embeds_scale=False, flow=True):
        return said
    if scheduler.get("shift") == TURBO_SHIFT:
        return defaults_by("z_image_turbo", "the shift of its scheduler is 3")
    return defaults_by("z_image", "it is a ZImagePipeline whose scheduler's shift is not 3")
