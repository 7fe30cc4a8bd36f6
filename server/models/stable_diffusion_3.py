"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, and a transformer of joint blocks.

Esser et al., arXiv 2403.03206. It runs as in diffusers' ``StableDiffusion3Pipeline``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from samplers import Linspace
from server.errors import ModelMismatch
from server.models.autoencoder import Autoencoder
from server.models.clip import CLIP, clip_skips
from server.models.conditioning import Conditioning
from server.models.controls.sd3_control import SD3Control
from server.models.conventions import defaults_by
from server.models.distilled import has_turbo_name, stated
from server.models.flow_matching import SCHEDULER, FlowSchedules
from server.models.folder import Revisions, read_json
from server.models.hosted import ModelFacts
from server.models.parts import load_autoencoder, load_network, load_text_encoder, load_tokenizer
from server.models.t5 import T5
from server.models.transformer_model import TRANSFORMER, TransformerModel, check_channels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from server.models.defaults import ModelDefaults
    from server.models.inputs import RowInputs
    from server.models.text_options import TextOptions

TEXT = "encoder_hidden_states"
POOLED = "pooled_projections"

OWN_LAYER = 2
"""CLIP layer, counted from the last, whose hidden states the transformer reads."""

T5_LENGTH = 256
"""Number of T5 tokens of every prompt, including padding."""


class ClipsAndT5:
    """Concatenates both CLIPs' hidden states by feature, T5's after them, and both pooled vectors.

    The unconditional is the empty prompt.

    Args:
        first: CLIP ViT-L with a projection.
        second: OpenCLIP ViT-bigG with a projection.
        t5: T5; None for a model that is run without it, whose T5 states are then zeros.
        width: features of a token.
    """

    def __init__(self, first: CLIP, second: CLIP, t5: T5 | None, width: int) -> None:
        self._clips = first, second
        self._t5 = t5
        self._width = width

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt for T5; CLIP reads only the first 75 or so."""
        return self._readers[0].max_tokens

    @property
    def clip_skips(self) -> range:
        """See ``ModelFacts``."""
        return clip_skips(OWN_LAYER, *self._clips)

    def count_tokens(self, text: str) -> int:
        """T5's tokens of a prompt, or CLIP's, excluding markers; safe from any thread."""
        return max(reader.count_tokens(text) for reader in self._readers)

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt; it does not depend on the image size."""
        texts = [prompt or "" for prompt in prompts]
        encoded = [clip.encode(texts) for clip in self._clips]
        layer = -(options.clip_skip or OWN_LAYER)
        clips = torch.cat([one.hidden_states[layer] for one in encoded], -1)
        clips = F.pad(clips, (0, self._width - clips.shape[-1]))
        pooled = torch.cat([one.text_embeds for one in encoded], -1)
        if self._t5 is None:
            states = clips.new_zeros(len(texts), T5_LENGTH, self._width)
        else:
            # T5 attends to its padding here, and so does the transformer.
            states = self._t5.encode(texts, masked=False).states
        hidden = torch.cat([clips, states], 1)
        return [
            # Cloned, as views would keep the whole batch of prompts in memory.
            Conditioning({TEXT: row.clone(), POOLED: vector.clone()}, len(row))
            for row, vector in zip(hidden, pooled, strict=True)
        ]

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoders by their names in a model folder."""
        first, second = self._clips
        found = {"text_encoder": first.encoder, "text_encoder_2": second.encoder}
        return found if self._t5 is None else found | {"text_encoder_3": self._t5.encoder}

    @property
    def _readers(self) -> tuple[T5] | tuple[CLIP, CLIP]:
        """The encoders that determine the maximum length."""
        return self._clips if self._t5 is None else (self._t5,)


class SD3Denoiser:
    """The transformer, which packs latents itself and predicts their velocity.

    Args:
        network: an ``SD3Transformer2DModel`` in inference mode.
        control: ControlNets for this transformer.
    """

    def __init__(self, network: Any, control: SD3Control) -> None:
        self.network = network
        self._control = control

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        tensors, latents = inputs.conditioning.tensors, x.to(self.network.dtype)
        added: dict[str, Any] = {}
        if inputs.controls is not None:
            rows = latents, t, tensors[TEXT], tensors[POOLED]
            added = self._control.residuals(*rows, inputs.controls)
        return self.network(
            hidden_states=latents,
            timestep=t,
            encoder_hidden_states=tensors[TEXT],
            pooled_projections=tensors[POOLED],
            **added,
            return_dict=False,
        )[0].float()


def load_stable_diffusion_3(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    _check_scheduler(folder)
    clips: list[CLIP] = []
    for suffix in ("", "_2"):
        encoder = load_text_encoder(
            folder, f"text_encoder{suffix}", CLIPTextModelWithProjection, dtype
        )
        positions = encoder.config.max_position_embeddings
        tokenizer = load_tokenizer(folder, f"tokenizer{suffix}", CLIPTokenizer, positions)
        clips.append(CLIP(encoder, tokenizer, device))
    first, second = clips
    t5 = T5.load(folder, "_3", T5_LENGTH, device, dtype) if _has_t5(folder) else None
    transformer = load_network(folder, TRANSFORMER, [SD3Transformer2DModel], dtype)
    vae = load_autoencoder(folder, dtype)
    text = ClipsAndT5(first, second, t5, transformer.config.joint_attention_dim)
    latent_scale = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = transformer.config.patch_size * latent_scale
    side = transformer.config.sample_size * latent_scale
    channels = transformer.config.in_channels
    check_channels(folder, channels, vae.config.latent_channels)
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
        longest_side=multiple * transformer.config.pos_embed_max_size,
        clip_skips=text.clip_skips,
        defaults=_defaults_of(folder),
    )
    autoencoder = Autoencoder(vae, device)
    shift = (vae.config.shift_factor or 0.0) * vae.config.scaling_factor
    control = SD3Control(transformer, autoencoder.encode, shift, device)
    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=FlowSchedules(folder, multiple),
        denoiser=SD3Denoiser(transformer, control),
        autoencoder=autoencoder,
        text=text,
        control=control,
    )


def _has_t5(folder: Path) -> bool:
    """Whether the folder names a third text encoder; if absent, the entry is a pair of nulls."""
    named = read_json(folder, "model_index.json").get("text_encoder_3")
    return named not in (None, [None, None])


def _defaults_of(folder: Path) -> ModelDefaults:
    scheduler = read_json(folder, SCHEDULER)
    made = stated(folder, scheduler, embeds_scale=False, flow=True)
    if made is None and has_turbo_name(folder, TRANSFORMER):
        made = defaults_by("sd35_turbo", "its configs are named after a Turbo model")
    elif made is None:
        made = defaults_by("sd3", "it is a StableDiffusion3Pipeline and nothing names it Turbo")
    if scheduler.get("use_dynamic_shifting") and isinstance(made.spacing, Linspace):
        # A scheduler whose shift depends on the size shifts each sigma once.
        return replace(made, spacing=Linspace())
    return made


def _check_scheduler(folder: Path) -> None:
    """Refuse a terminal sigma, to which only sigmas of the spacing ``trailing`` are stretched."""
    terminal = read_json(folder, SCHEDULER).get("shift_terminal")
    if terminal:
        raise ModelMismatch(
            f"{SCHEDULER} of model folder {str(folder)!r} has the shift_terminal "
            f"{str(terminal)[:40]!r}; for Stable Diffusion 3 only null is supported."
        )
