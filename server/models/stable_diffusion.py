"""Stable Diffusion 1.x and 2.x, and models with the same parts: one CLIP text encoder, a U-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.models.clip import CLIP, clip_skips
from server.models.conditioning import Conditioning
from server.models.distilled import distilled_as
from server.models.emphasis import EmphasizedPrompt, plain_text, rescaled
from server.models.folder import Revisions, read_json
from server.models.parts import load_network, load_text_encoder, load_tokenizer
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

    import torch
    from torch import Tensor, nn

    from server.models.defaults import ModelDefaults
    from server.models.text_options import TextOptions


PART = "text_encoder"

LAST_LAYER = 1
"""CLIP layer, counted from the last, that the U-Net reads unless a request chooses another."""


class OneEncoder:
    """Normalized hidden states of one CLIP text encoder; the unconditional is the empty prompt."""

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding markers."""
        return self._clip.max_tokens

    @property
    def clip_skips(self) -> range:
        """See ``ModelFacts``."""
        return clip_skips(LAST_LAYER, self._clip)

    @property
    def widths(self) -> Mapping[str, int]:
        """See ``EmbeddingTarget``."""
        return {PART: self._clip.width}

    def count_tokens(self, text: str, embeddings: Mapping[str, int]) -> int:
        """See ``EmbeddableText``."""
        return self._clip.count_tokens(text, embeddings)

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt; it does not depend on the image size."""
        skip = options.clip_skip or LAST_LAYER
        vectors = options.vectors(PART)
        output = self._clip.encode([plain_text(prompt) for prompt in prompts], vectors)
        hidden = self._clip.normalised(output, skip)
        # Cloned, as a view would keep the whole batch of prompts in memory.
        rows = [
            self._weighted(prompt, skip, vectors)
            if isinstance(prompt, EmphasizedPrompt)
            else row.clone()
            for prompt, row in zip(prompts, hidden, strict=True)
        ]
        return [Conditioning({TEXT: row}, len(row)) for row in rows]

    def _weighted(
        self, prompt: EmphasizedPrompt, skip: int, vectors: Mapping[str, Tensor]
    ) -> Tensor:
        output, weights = self._clip.encode_weighted(prompt, vectors)
        return rescaled(self._clip.normalised(output, skip), weights).flatten(0, 1)

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoder by its name in a model folder."""
        return {PART: self._clip.encoder}


def load_stable_diffusion(
    folder: Path,
    name: str,
    revisions: Revisions,
    device: torch.device,
    dtype: torch.dtype,
    defaults: ModelDefaults | None = None,
) -> UNetModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Args:
        folder: model folder.
        name: name that requests use for the model.
        revisions: revisions of its weights.
        device: device of the model.
        dtype: dtype of the U-Net and the text encoder.
        defaults: settings of requests that leave them out; None for those derived from the folder.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = load_network(folder, "unet", [UNet2DConditionModel], dtype)
    vae = load_network(folder, "vae", [AutoencoderKL, AutoencoderTiny], dtype)
    encoder = load_text_encoder(folder, PART, CLIPTextModel, dtype)
    positions = encoder.config.max_position_embeddings
    tokenizer = load_tokenizer(folder, "tokenizer", CLIPTokenizer, positions)
    text = OneEncoder(CLIP(encoder, tokenizer, device))
    if defaults is None:
        embeds_scale = unet.config.time_cond_proj_dim is not None
        defaults = distilled_as(folder, read_json(folder, SCHEDULER), embeds_scale=embeds_scale)
    return UNetModel(
        facts_of(folder, name, revisions, unet, vae, text, defaults),
        device,
        dtype,
        schedule=schedule_of(folder),
        unet=unet,
        vae=vae,
        text=text,
        weak=load_companion(folder, dtype),
    )
