"""FLUX.2 klein, 4B and 9B: hidden states of three layers of Qwen3, and a transformer.

The transformer works on packed latents. It runs as in diffusers' ``Flux2KleinPipeline``.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from server.errors import ModelMismatch
from server.models.conditioning import Conditioning
from server.models.conventions import defaults_by
from server.models.distilled import stated
from server.models.flow_matching import SCHEDULER, FlowSchedules, empirical_mu
from server.models.flux1 import THOUSAND
from server.models.folder import Revisions, read_json
from server.models.hosted import ModelFacts
from server.models.parts import load_network, load_text_encoder, load_tokenizer
from server.models.reference_tokens import tokens_beside, with_references
from server.models.references import ReferencesRead
from server.models.tiling import pixels_a_cell, with_tiles
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
"""Autoencoder cells along one side of a latent cell, which is one token."""

TEXT = "encoder_hidden_states"

MAX_REFERENCES = 4
"""Maximum number of reference images. The transformer has positions for more, but each costs as
much as a generated image."""

POSITION_STRIDE = 10
"""Difference between the first coordinates of successive images; the generated image has 0."""

LENGTH = 512
"""Number of tokens of every prompt, including the template and the padding."""

LAYERS = (9, 18, 27)
"""Indices of the text encoder's hidden states that the transformer reads, concatenated."""

HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Qwen3's chat template around a prompt, with thinking disabled."""


class Qwen3Layers:
    """Encodes prompts to hidden states of three layers of Qwen3, including padding.

    The unconditional is the empty prompt.

    Args:
        encoder: a ``Qwen3ForCausalLM`` in inference mode.
        tokenizer: its tokenizer, whose ``model_max_length`` is the length.
        device: device of the encoder.
    """

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        # The layers after the last one that is read, and the language model head, are not needed.
        self._encoder = encoder.model
        del self._encoder.layers[LAYERS[-1] + 1 :]
        self._encoder.config.num_hidden_layers = len(self._encoder.layers)
        self._tokenizer = tokenizer
        self._device = device
        # A fast tokenizer raises an error if two threads use it at once.
        self._tokenizing = Lock()
        self._template = self._count("")

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding the template."""
        return self._tokenizer.model_max_length - self._template

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding the template; safe from any thread."""
        return self._count(text) - self._template

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt; it does not depend on the image size."""
        with self._tokenizing:
            tokens = self._tokenizer(
                [_as_message(prompt or "") for prompt in prompts],
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).to(self._device)
        states = self._encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        # Prompts do not attend to their padding, but the transformer reads the padding's states.
        joined = torch.cat([states[layer] for layer in LAYERS], -1)
        return [Conditioning({TEXT: row.clone()}, len(row)) for row in joined]

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoder by its name in a model folder."""
        return {"text_encoder": self._encoder}

    def _count(self, prompt: str) -> int:
        with self._tokenizing:
            return len(self._tokenizer(_as_message(prompt), verbose=False).input_ids)


class Flux2Denoiser:
    """The transformer, on latents whose cells are its tokens.

    Args:
        network: a ``Flux2Transformer2DModel`` in inference mode.
    """

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        tensors, network = inputs.conditioning.tensors, self.network
        text, (height, width) = tensors[TEXT], x.shape[-2:]
        references = tokens_beside(tensors)
        places = [positions(height, width, 1, x.device)]
        for number, one in enumerate(references, start=1):
            size = one.shape[1], one.shape[2]
            places.append(positions(*size, 1, x.device, first=POSITION_STRIDE * number))
        velocity = network(
            hidden_states=with_references(_tokens(x), references).to(network.dtype),
            # Rounded to the network's dtype before the division, as in diffusers' pipeline.
            timestep=t.to(network.dtype) / THOUSAND,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=positions(1, 1, text.shape[1], x.device),
            img_ids=torch.cat(places),
            return_dict=False,
        )[0][:, : height * width]
        return velocity.transpose(1, 2).unflatten(2, (height, width)).float()


class Flux2Autoencoder:
    """An autoencoder whose latents are packed 2 x 2 and normalized channel by channel.

    Args:
        network: an ``AutoencoderKLFlux2`` in inference mode.
        device: device on which it runs.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network = network.to(device, memory_format=torch.channels_last)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents ``[rows, C, h, w]`` to images ``[rows, 3, H, W]`` in [-1, 1].

        The images are float32.
        """
        mean, deviation = self._statistics()
        cells = F.pixel_shuffle(latents * deviation + mean, PATCH)
        network = with_tiles(self.network, cells, pixels_a_cell(self.network.config))
        return network.decode(cells.to(network.dtype), return_dict=False)[0].float()

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images ``[rows, 3, H, W]`` in [-1, 1] to clean latents ``[rows, C, h, w]``.

        The latents are float32.
        """
        # The mean of the posterior, not a sample, so that the same image gives the same latent.
        network = with_tiles(self.network, pixels, scale=1)
        cells = network.encode(pixels.to(network.dtype)).latent_dist.mode().float()
        mean, deviation = self._statistics()
        return (F.pixel_unshuffle(cells, PATCH) - mean) / deviation

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel: weights, which another file may replace."""
        network = self.network
        variance = network.bn.running_var.float() + network.config.batch_norm_eps
        mean = network.bn.running_mean.float()
        return mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


def positions(
    height: int, width: int, words: int, device: torch.device, *, first: int = 0
) -> Tensor:
    """Positions ``(first, y, x, word)`` of tokens, int64 ``[height * width * words, 4]``."""
    sizes = (1, height, width, words)
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
    places[:, 0] = first
    return places


def _token_grid(latents: Tensor) -> Tensor:
    """Arrange latents ``[C, h, w]`` as tokens ``[h, w, C]``."""
    return latents.permute(1, 2, 0)


def _tokens(latents: Tensor) -> Tensor:
    """One token for each cell, ``[rows, h * w, C]``."""
    return latents.flatten(2).transpose(1, 2)


def load_flux2_klein(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

    encoder = load_text_encoder(folder, "text_encoder", Qwen3ForCausalLM, dtype)
    if encoder.config.num_hidden_layers <= LAYERS[-1]:
        raise ModelMismatch(
            f"text_encoder of model folder {str(folder)!r} has {encoder.config.num_hidden_layers} "
            f"layers; the transformer needs more than {LAYERS[-1]}, since it reads hidden states "
            "up to that layer."
        )
    tokenizer = load_tokenizer(folder, "tokenizer", Qwen2Tokenizer, LENGTH)
    text = Qwen3Layers(encoder, tokenizer, device)
    transformer = load_network(folder, TRANSFORMER, [Flux2Transformer2DModel], dtype)
    vae = load_network(folder, "vae", [AutoencoderKLFlux2], dtype)
    latent_scale = PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
    side = default_side(vae, latent_scale)
    channels = transformer.config.in_channels
    check_channels(folder, channels, PATCH**2 * vae.config.latent_channels)
    facts = ModelFacts(
        name=name,
        revision=revisions.weights,
        denoiser=revisions.denoiser,
        prediction="flow",
        latent_channels=channels,
        latent_scale=latent_scale,
        size_multiple=latent_scale,
        default_width=side,
        default_height=side,
        max_tokens=text.max_tokens,
        defaults=_defaults_of(folder),
        references=ReferencesRead(MAX_REFERENCES),
    )
    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=FlowSchedules(folder, latent_scale, empirical_mu),
        denoiser=Flux2Denoiser(transformer),
        autoencoder=Flux2Autoencoder(vae, device),
        text=text,
        picture_tokens=_token_grid,
    )


def _as_message(prompt: str) -> str:
    return f"{HEAD}{prompt}{TAIL}"


def _defaults_of(folder: Path) -> ModelDefaults:
    """Settings of the base model, with many steps and guidance, or of the distilled one."""
    if said := stated(folder, read_json(folder, SCHEDULER), embeds_scale=False, flow=True):
        return said
    if read_json(folder, "model_index.json").get("is_distilled") is True:
        return defaults_by("flux2_klein", "its model_index.json has is_distilled true")
    return defaults_by("flux2_klein_base", "it is a Flux2KleinPipeline that is not distilled")
