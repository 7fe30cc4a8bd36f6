"""Stable Diffusion XL, base and Turbo: two CLIP text encoders, and sizes as added conditioning.

Podell et al., arXiv 2307.01952. It runs as in diffusers' ``StableDiffusionXLPipeline``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from server.errors import ModelMismatch
from server.models.clip import CLIP, clip_skips
from server.models.conditioning import Conditioning
from server.models.conventions import defaults_by
from server.models.distilled import distilled_as
from server.models.emphasis import EmphasizedPrompt, plain_text, rescaled
from server.models.folder import Revisions, read_json
from server.models.parts import load_autoencoder, load_network, load_text_encoder, load_tokenizer
from server.models.unet_model import (
    SCHEDULER,
    TEXT,
    UNetModel,
    facts_of,
    load_companion,
    schedule_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from server.models.defaults import ModelDefaults
    from server.models.text_options import TextOptions

FIRST, SECOND = "text_encoder", "text_encoder_2"

OWN_LAYER = 2
"""Layer, counted from the last, whose hidden states the U-Net reads without the final norm."""

TURBO_SCHEDULER: Mapping[str, str] = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "trailing",
    "prediction_type": "epsilon",
}
TURBO_SIZE = 64
"""Latent height and width that the U-Net was trained at; the base model has 128."""


class TwoEncoders:
    """Concatenated hidden states of two CLIP text encoders, and the second one's pooled vector.

    Args:
        first: CLIP ViT-L.
        second: OpenCLIP ViT-bigG, with a projection.
        zero_unconditional: whether the unconditional is all zeros instead of the empty prompt.
    """

    def __init__(self, first: CLIP, second: CLIP, *, zero_unconditional: bool) -> None:
        self._first = first
        self._second = second
        self._zero_unconditional = zero_unconditional

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt for both encoders, excluding markers."""
        return min(self._first.max_tokens, self._second.max_tokens)

    @property
    def clip_skips(self) -> range:
        """See ``ModelFacts``."""
        return clip_skips(OWN_LAYER, self._first, self._second)

    @property
    def widths(self) -> Mapping[str, int]:
        """See ``EmbeddingTarget``."""
        return {FIRST: self._first.width, SECOND: self._second.width}

    def count_tokens(self, text: str, embeddings: Mapping[str, int]) -> int:
        """See ``EmbeddableText``."""
        clips = self._first, self._second
        return max(clip.count_tokens(text, embeddings) for clip in clips)

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt, for an uncropped image of the generated size."""
        texts = [plain_text(prompt) for prompt in prompts]
        first = self._first.encode(texts, options.vectors(FIRST))
        second = self._second.encode(texts, options.vectors(SECOND))
        layer = -(options.clip_skip or OWN_LAYER)
        hidden = torch.cat([first.hidden_states[layer], second.hidden_states[layer]], -1)
        pooled: Tensor = second.text_embeds
        # Original height and width, top and left of the crop, target height and width.
        sizes = hidden.new_tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        made: list[Conditioning] = []
        for prompt, states, vector in zip(prompts, hidden, pooled, strict=True):
            factor = 0 if prompt is None and self._zero_unconditional else 1
            encoded = factor * states, factor * vector
            if isinstance(prompt, EmphasizedPrompt):
                encoded = self._weighted(prompt, layer, options)
            tensors = {TEXT: encoded[0], "text_embeds": encoded[1], "time_ids": sizes}
            made.append(Conditioning(tensors, len(encoded[0])))
        return made

    def _weighted(
        self, prompt: EmphasizedPrompt, layer: int, options: TextOptions
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of all chunks, and the pooled vector of the first chunk."""
        first, weights = self._first.encode_weighted(prompt, options.vectors(FIRST))
        second, weights_2 = self._second.encode_weighted(prompt, options.vectors(SECOND))
        states = torch.cat(
            [
                rescaled(first.hidden_states[layer], weights),
                rescaled(second.hidden_states[layer], weights_2),
            ],
            -1,
        )
        return states.flatten(0, 1), second.text_embeds[0]

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoders by their names in a model folder."""
        return {FIRST: self._first.encoder, SECOND: self._second.encoder}


def load_stable_diffusion_xl(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> UNetModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    clips: list[CLIP] = []
    for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        encoder = load_text_encoder(folder, f"text_encoder{suffix}", kind, dtype)
        positions = encoder.config.max_position_embeddings
        tokenizer = load_tokenizer(folder, f"tokenizer{suffix}", CLIPTokenizer, positions)
        clips.append(CLIP(encoder, tokenizer, device))
    first, second = clips
    unet = load_network(folder, "unet", [UNet2DConditionModel], dtype)
    if unet.config.addition_embed_type != "text_time":
        raise ModelMismatch(
            f"unet of model folder {str(folder)!r} has the addition_embed_type "
            f"{unet.config.addition_embed_type!r}; Stable Diffusion XL has 'text_time'."
        )
    vae = load_autoencoder(folder, dtype)
    index = read_json(folder, "model_index.json")
    text = TwoEncoders(
        first,
        second,
        zero_unconditional=index.get("force_zeros_for_empty_prompt", True) is not False,
    )
    return UNetModel(
        facts_of(folder, name, revisions, unet, vae, text, _defaults_of(folder, unet)),
        device,
        dtype,
        schedule=schedule_of(folder),
        unet=unet,
        vae=vae,
        text=text,
        weak=load_companion(folder, dtype),
    )


def _defaults_of(folder: Path, unet: Any) -> ModelDefaults | None:
    """The settings that the model was distilled for; None for the server's defaults.

    SDXL Turbo is recognized by its scheduler and its size together: multi-step models may be saved
    with ancestral Euler as well.
    """
    scheduler = read_json(folder, SCHEDULER)
    embeds_scale = unet.config.time_cond_proj_dim is not None
    if defaults := distilled_as(folder, scheduler, embeds_scale=embeds_scale):
        return defaults
    as_turbo = all(scheduler.get(entry) == value for entry, value in TURBO_SCHEDULER.items())
    if not as_turbo or unet.config.sample_size != TURBO_SIZE:
        return None
    return defaults_by("sdxl_turbo", "its scheduler and its size are those of SDXL Turbo")
