"""PixArt-alpha and PixArt-Sigma: T5's text without padding, and a transformer that predicts noise.

Chen et al., arXiv 2310.00426 and 2403.04692. They run as in diffusers' ``PixArtAlphaPipeline`` and
``PixArtSigmaPipeline``, but at the requested size, and with prompts that are lowercased and
stripped instead of cleaned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from server.errors import ModelMismatch
from server.models.autoencoder import Autoencoder
from server.models.conditioning import MASK, Conditioning, StackedConditioning, stack_padded
from server.models.conventions import CONVENTIONS, defaults_by
from server.models.distilled import distilled_spacing, stated
from server.models.folder import component_class, read_json
from server.models.hosted import ModelFacts
from server.models.parts import build_network, load_autoencoder
from server.models.t5 import MARKERS, T5
from server.models.text_side import to_lowercase
from server.models.transformer_model import TRANSFORMER, TransformerModel, check_channels
from server.models.unet_model import SCHEDULER, schedule_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from server.models.defaults import ModelDefaults
    from server.models.folder import Revisions
    from server.models.inputs import RowInputs
    from server.models.text_options import TextOptions

__all__ = ["PixArtDenoiser", "load_pixart"]

TEXT = "text"
"""Name of the conditioning tensor with T5's hidden states, ``[tokens, features]``."""

LENGTHS: Mapping[str, int] = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Maximum number of tokens of a prompt, including the end marker, by pipeline class."""

TRANSFORMERS = "PixArtTransformer2DModel", "Transformer2DModel"
"""Names that folders use for the transformer's class; the second is from before diffusers 0.28."""


class MaskedT5:
    """Encodes prompts to the last hidden states of their tokens, without padding.

    The unconditional is the empty prompt.

    Args:
        t5: text encoder, whose attention is masked for padding.
    """

    def __init__(self, t5: T5) -> None:
        self._t5 = t5

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding the end marker."""
        return self._t5.max_tokens

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding the end marker; safe from any thread."""
        return self._t5.count_tokens(to_lowercase(text))

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt at its own length; it does not depend on the image size."""
        encoded = self._t5.encode([to_lowercase(prompt or "") for prompt in prompts], masked=True)
        # Indexing by the mask copies: a view would keep the whole batch of prompts in memory.
        texts = [states[mask] for states, mask in zip(*encoded, strict=True)]
        return [Conditioning({TEXT: text}, len(text)) for text in texts]

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoder by its name in a model folder."""
        return {"text_encoder": self._t5.encoder}


class PixArtDenoiser:
    """The transformer, without the learned variance that is half of its output.

    Args:
        network: a ``PixArtTransformer2DModel`` in inference mode.
        latent_scale: pixels along one side of a latent cell.
    """

    def __init__(self, network: Any, latent_scale: int) -> None:
        self.network = network
        self._latent_scale = latent_scale

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        tensors, dtype = inputs.conditioning.tensors, self.network.dtype
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            height, width = (size * self._latent_scale for size in x.shape[2:])
            # Filled on the device, as creating a tensor from a list would synchronize with it.
            one = x.new_ones(len(x), 1, dtype=dtype)
            added = {
                "resolution": torch.cat([height * one, width * one], 1),
                "aspect_ratio": (height / width) * one,
            }
        raw = self.network(
            x.to(dtype),
            encoder_hidden_states=tensors[TEXT],
            encoder_attention_mask=tensors.get(MASK),
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return raw[:, : x.shape[1]].float()


def load_pixart(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import PixArtTransformer2DModel

    length = LENGTHS[read_json(folder, "model_index.json")["_class_name"]]
    text = MaskedT5(T5.load(folder, "", length, device, dtype))
    component_class(folder, TRANSFORMER, frozenset(TRANSFORMERS))
    transformer = build_network(folder, TRANSFORMER, PixArtTransformer2DModel, dtype)
    channels = transformer.config.in_channels
    if transformer.out_channels not in (channels, 2 * channels):
        raise ModelMismatch(
            f"transformer of model folder {str(folder)!r} has {transformer.out_channels} output "
            f"channels; allowed are {channels}, and {2 * channels} with a learned variance."
        )
    vae = load_autoencoder(folder, dtype)
    check_channels(folder, channels, vae.config.latent_channels)
    latent_scale = 2 ** (len(vae.config.block_out_channels) - 1)
    side = transformer.config.sample_size * latent_scale
    facts = ModelFacts(
        name=name,
        revision=revisions.weights,
        denoiser=revisions.denoiser,
        prediction="epsilon",
        latent_channels=channels,
        latent_scale=latent_scale,
        size_multiple=transformer.config.patch_size * latent_scale,
        default_width=side,
        default_height=side,
        max_tokens=text.max_tokens,
        defaults=_defaults_of(folder),
    )
    schedule = schedule_of(folder)
    predicts = read_json(folder, SCHEDULER).get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise ModelMismatch(
            f"{SCHEDULER} of model folder {str(folder)!r} has the prediction_type "
            f"{str(predicts)[:40]!r}; PixArt predicts noise, so only epsilon is allowed."
        )

    def stack(rows: Sequence[Conditioning], *, fixed: bool) -> StackedConditioning:
        return stack_padded(rows, TEXT, places=text.max_tokens + MARKERS if fixed else None)

    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=lambda *_: schedule,
        denoiser=PixArtDenoiser(transformer, latent_scale),
        autoencoder=Autoencoder(vae, device),
        text=text,
        stack=stack,
    )


def _defaults_of(folder: Path) -> ModelDefaults:
    scheduler = read_json(folder, SCHEDULER)
    if said := stated(folder, scheduler, embeds_scale=False):
        return said
    if scheduler.get("_class_name") == "LCMScheduler":
        spacing = distilled_spacing(folder, scheduler)
        steps = min(CONVENTIONS["lcm_lora"].steps, spacing.distilled_steps)
        reason = "its scheduler is an LCMScheduler"
        return defaults_by("lcm_lora", reason, spacing=spacing, steps=steps)
    return defaults_by("pixart", "it is a PixArt pipeline whose scheduler is not an LCMScheduler")
