"""FLUX.1 dev, schnell and Kontext: CLIP's pooled vector, T5's tokens, and a transformer.

The transformer works on packed latents. It runs as in diffusers' ``FluxPipeline`` and
``FluxKontextPipeline``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from server.models.autoencoder import Autoencoder
from server.models.clip import CLIP
from server.models.conditioning import Conditioning
from server.models.controls.flux_control import FluxControl
from server.models.conventions import defaults_by
from server.models.distilled import stated
from server.models.flow_matching import SCHEDULER, FlowSchedules
from server.models.folder import Revisions, read_json
from server.models.hosted import ModelFacts
from server.models.parts import load_autoencoder, load_network, load_text_encoder, load_tokenizer
from server.models.reference_tokens import tokens_beside, with_references
from server.models.references import ReferencesRead
from server.models.t5 import T5
from server.models.transformer_model import (
    TRANSFORMER,
    TransformerModel,
    check_channels,
    default_side,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from server.models.defaults import ModelDefaults
    from server.models.inputs import RowInputs
    from server.models.text_options import TextOptions

PATCH = 2
"""Latent cells along one side of a token."""

TEXT = "encoder_hidden_states"
POOLED = "pooled_projections"

LENGTH = 512
LENGTH_OF_SCHNELL = 256
"""Number of tokens of every prompt; schnell was trained on fewer (its model card)."""

KONTEXT_SIZES = tuple(
    (width, height)
    for one, other in (
        (672, 1568),
        (688, 1504),
        (720, 1456),
        (752, 1392),
        (800, 1328),
        (832, 1248),
        (880, 1184),
        (944, 1104),
        (1024, 1024),
    )
    for width, height in sorted({(one, other), (other, one)})
)
"""Width and height in pixels of the images that Kontext was trained to edit."""

THOUSAND = 1000
"""Number of trained timesteps, by which the transformer multiplies its timestep input."""


class ClipAndT5:
    """T5's last hidden states, including padding, and CLIP's pooled vector.

    The unconditional is the empty prompt.
    """

    def __init__(self, clip: CLIP, t5: T5) -> None:
        self._clip = clip
        self._t5 = t5

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt for T5; CLIP reads only the first 75 or so."""
        return self._t5.max_tokens

    def count_tokens(self, text: str) -> int:
        """Number of T5 tokens of a prompt, excluding the marker; safe from any thread."""
        return self._t5.count_tokens(text)

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt; it does not depend on the image size."""
        texts = [prompt or "" for prompt in prompts]
        pooled: Tensor = self._clip.encode(texts).pooler_output
        # T5 attends to its padding here, and so does the transformer.
        states = self._t5.encode(texts, masked=False).states
        return [
            # Cloned, as views would keep the whole batch of prompts in memory.
            Conditioning({TEXT: row.clone(), POOLED: vector.clone()}, len(row))
            for row, vector in zip(states, pooled, strict=True)
        ]

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoders by their names in a model folder."""
        return {"text_encoder": self._clip.encoder, "text_encoder_2": self._t5.encoder}


class FluxDenoiser:
    """The transformer, on latents packed to tokens of 2 x 2 cells.

    Args:
        network: a ``FluxTransformer2DModel`` in inference mode.
        control: ControlNets for this transformer.
    """

    def __init__(self, network: Any, control: FluxControl) -> None:
        self.network = network
        self._control = control

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``; a row without an embedded scale gets the scale 1."""
        network, conditioning = self.network, inputs.conditioning.tensors
        text, scales = conditioning[TEXT], inputs.scale_embedding
        guidance = torch.ones_like(t) if scales is None else scales + 1
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        references = tokens_beside(conditioning)
        own = positions(height, width, x.device)
        others = [positions(one.shape[1], one.shape[2], x.device, first=1) for one in references]
        rows = {
            "hidden_states": with_references(packed(x), references).to(network.dtype),
            # Rounded to the network's dtype before the division, as in diffusers' pipeline.
            "timestep": t.to(network.dtype) / THOUSAND,
            "pooled_projections": conditioning[POOLED],
            "encoder_hidden_states": text,
        }
        places = {
            "txt_ids": torch.zeros(text.shape[1], 3, device=x.device),
            "img_ids": torch.cat([own, *others]),
        }
        added: dict[str, Any] = {}
        if inputs.controls is not None:
            added = self._control.residuals(rows, places, guidance, inputs.controls)
        velocity = network(
            **rows,
            **places,
            **added,
            guidance=guidance if network.config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return unpacked(velocity[:, : height * width], height, width).float()


def packed(latents: Tensor) -> Tensor:
    """Pack latents ``[rows, C, h, w]`` to tokens ``[rows, h/2 * w/2, 4 C]`` of (channel, y, x)."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def token_grid(latents: Tensor) -> Tensor:
    """Pack latents ``[C, h, w]`` to tokens ``[h/2, w/2, 4 C]``."""
    return F.pixel_unshuffle(latents, PATCH).permute(1, 2, 0)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens ``[rows, height * width, 4 C]`` to latents ``[rows, C, 2 height, 2 width]``."""
    cells = tokens.transpose(1, 2).unflatten(2, (height, width))
    return F.pixel_shuffle(cells, PATCH)


def positions(height: int, width: int, device: torch.device, *, first: int = 0) -> Tensor:
    """Positions ``(first, y, x)`` of an image's tokens, ``[height * width, 3]`` float32."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.full_like(rows, first), rows, columns], -1).flatten(0, 1).float()


def load_flux1(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer

    edits = read_json(folder, "model_index.json").get("_class_name") == "FluxKontextPipeline"
    transformer = load_network(folder, TRANSFORMER, [FluxTransformer2DModel], dtype)
    vae = load_autoencoder(folder, dtype)
    clip = load_text_encoder(folder, "text_encoder", CLIPTextModel, dtype)
    tokenizer = load_tokenizer(
        folder, "tokenizer", CLIPTokenizer, clip.config.max_position_embeddings
    )
    guided = bool(transformer.config.guidance_embeds)
    length = LENGTH_OF_SCHNELL if _is_schnell(folder, guided=guided) else LENGTH
    t5 = T5.load(folder, "_2", length, device, dtype)
    text = ClipAndT5(CLIP(clip, tokenizer, device), t5)
    latent_scale = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = PATCH * latent_scale
    side = default_side(vae, multiple)
    channels = transformer.config.in_channels // PATCH**2
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
        embeds_scale=guided,
        defaults=_defaults_of(folder, guided=guided, edits=edits),
        references=ReferencesRead(1, KONTEXT_SIZES) if edits else None,
    )
    autoencoder = Autoencoder(vae, device)
    control = FluxControl(transformer, autoencoder.encode, packed, device)
    # A ControlNet's residuals cover only the tokens of the generated image, not of references.
    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=FlowSchedules(folder, multiple),
        denoiser=FluxDenoiser(transformer, control),
        autoencoder=autoencoder,
        control=None if edits else control,
        picture_tokens=token_grid if edits else None,
        text=text,
    )


def _defaults_of(folder: Path, *, guided: bool, edits: bool) -> ModelDefaults | None:
    """The settings that the model was distilled for; None for the server's defaults."""
    scheduler = read_json(folder, SCHEDULER)
    if said := stated(folder, scheduler, embeds_scale=guided, flow=True):
        return said
    if edits and guided:
        return defaults_by("flux_kontext", "it is a FluxKontextPipeline")
    if guided:
        return defaults_by("flux_dev", "its transformer takes a guidance scale as an input")
    if _is_schnell(folder, guided=guided):
        reason = "its transformer takes no guidance scale and its shift is the same for all sizes"
        return defaults_by("flux_schnell", reason)
    return None


def _is_schnell(folder: Path, *, guided: bool) -> bool:
    """Whether a model is schnell, and not a dev without a guidance scale as an input."""
    return not guided and not read_json(folder, SCHEDULER).get("use_dynamic_shifting")
