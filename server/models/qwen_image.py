"""Qwen-Image: a transformer of joint blocks on packed latents, and Qwen2.5-VL as text encoder.

Qwen Team, arXiv 2508.02324. It runs as in diffusers' ``QwenImagePipeline``,
``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline``, of which the latter two take reference
images.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from server.errors import ModelMismatch
from server.models.chat_text import TEXT, ChatTemplate, ChatText
from server.models.conditioning import MASK, stack_padded
from server.models.controls.qwen_control import QwenControl
from server.models.conventions import defaults_by
from server.models.distilled import stated
from server.models.flow_matching import SCHEDULER, FlowSchedules
from server.models.flux1 import THOUSAND, packed, token_grid, unpacked
from server.models.folder import Revisions, read_json
from server.models.hosted import ModelFacts
from server.models.parts import load_network, load_text_encoder, load_tokenizer
from server.models.pictured_text import (
    PicturedTemplate,
    PicturedText,
    load_picture_processor,
)
from server.models.qwen_positions import cache_positions_per_network
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
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from server.models.conditioning import Conditioning, StackedConditioning
    from server.models.defaults import ModelDefaults
    from server.models.inputs import RowInputs

PATCH = 2
"""Latent cells along one side of a token."""

TEMPLATE = ChatTemplate(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    places=512,
    dropped=34,
)
"""The template of the pipeline; the dropped tokens are those of its head."""

EDIT_HEAD = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
)
EDIT_PLACES = 1024
"""Maximum number of tokens of a prompt, including the template, without images."""

ONE_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"

MEGAPIXEL = 1024 * 1024

EDITS = {
    "QwenImageEditPipeline": (ONE_PICTURE, ReferencesRead(1, (), MEGAPIXEL, MEGAPIXEL)),
    "QwenImageEditPlusPipeline": (
        f"Picture {{number}}: {ONE_PICTURE}",
        ReferencesRead(3, (), MEGAPIXEL, 384 * 384),
    ),
}
"""Text for each image at the beginning of the prompt, and accepted reference images, as in the
pipelines. Models of the second class were trained with up to three images (the model card of
Qwen-Image-Edit-2509)."""

UNCONDITIONAL = " "
"""Negative prompt used in the model card; the pipeline has no unconditional of its own."""

UNSUPPORTED = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
"""Entries of the transformer's config for inputs that the pipeline does not provide."""


class QwenDenoiser:
    """The transformer, on latents packed to tokens of 2 x 2 cells.

    Args:
        network: a ``QwenImageTransformer2DModel`` in inference mode.
        control: ControlNets for this transformer.
    """

    def __init__(self, network: Any, control: QwenControl) -> None:
        self.network = network
        self._control = control
        cache_positions_per_network(network)

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        tensors, network = inputs.conditioning.tensors, self.network
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        references = tokens_beside(tensors)
        rows = {
            "hidden_states": with_references(packed(x), references).to(network.dtype),
            # Rounded to the network's dtype before the division, as in diffusers' pipeline.
            "timestep": t.to(network.dtype) / THOUSAND,
            "encoder_hidden_states": tensors[TEXT],
        }
        if MASK in tensors:
            rows["encoder_hidden_states_mask"] = tensors[MASK]
        shape, added = (1, height, width), dict[str, Any]()
        shapes = [shape, *((1, one.shape[1], one.shape[2]) for one in references)]
        if inputs.controls is not None:
            added = self._control.residuals(rows, shape, inputs.controls)
        velocity = network(**rows, **added, img_shapes=[shapes] * len(x), return_dict=False)[0]
        return unpacked(velocity[:, : height * width], height, width).float()


class QwenAutoencoder:
    """A video autoencoder applied to images, as videos of one frame.

    Args:
        network: an ``AutoencoderKLQwenImage`` in inference mode.
        device: device on which it runs.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network = network.to(device)
        self._mean, self._deviation = (
            torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (network.config.latents_mean, network.config.latents_std)
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents ``[rows, C, h, w]`` to images ``[rows, 3, H, W]`` in [-1, 1].

        The images are float32.
        """
        frames = (latents * self._deviation + self._mean)[:, :, None]
        network = with_tiles(self.network, frames, pixels_a_cell(self.network.config))
        return network.decode(frames.to(network.dtype), return_dict=False)[0][:, :, 0].float()

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images ``[rows, 3, H, W]`` in [-1, 1] to clean latents ``[rows, C, h, w]``.

        The latents are float32.
        """
        network = with_tiles(self.network, pixels, scale=1)
        encoded = network.encode(pixels[:, :, None].to(network.dtype)).latent_dist
        # The mean of the posterior, not a sample, so that the same image gives the same latent.
        return (encoded.mode()[:, :, 0].float() - self._mean) / self._deviation


def load_qwen_image(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    transformer = load_network(folder, TRANSFORMER, [QwenImageTransformer2DModel], dtype)
    for entry in UNSUPPORTED:
        if transformer.config[entry]:
            raise ModelMismatch(
                f"{TRANSFORMER} of model folder {str(folder)!r} has {entry} true; Qwen-Image has "
                "false, and its relatives are not hosted."
            )
    encoder = load_text_encoder(folder, "text_encoder", Qwen2_5_VLForConditionalGeneration, dtype)
    # The language model head is not needed and not kept.
    encoder = encoder.model
    language = encoder.language_model

    def states(tokens: Tensor) -> Tensor:
        return language(tokens, use_cache=False).last_hidden_state

    positions = language.config.max_position_embeddings
    tokenizer = load_tokenizer(folder, "tokenizer", Qwen2Tokenizer, positions)
    picture, references = EDITS.get(
        read_json(folder, "model_index.json")["_class_name"], ("", None)
    )
    if references is None:
        # The vision encoder is not needed either.
        text = ChatText(language, states, tokenizer, TEMPLATE, device, UNCONDITIONAL)
    else:
        template = PicturedTemplate(EDIT_HEAD, picture, TEMPLATE.tail, EDIT_PLACES, dropped=64)
        processor = load_picture_processor(folder)
        text = PicturedText(encoder, tokenizer, processor, template, device, UNCONDITIONAL)
    vae = load_network(folder, "vae", [AutoencoderKLQwenImage], dtype)
    latent_scale = 2 ** len(vae.config.temperal_downsample)
    multiple = PATCH * latent_scale
    side = default_side(vae, multiple)
    channels = transformer.config.in_channels // PATCH**2
    check_channels(folder, channels, vae.config.z_dim)
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
        defaults=_defaults_of(folder),
        references=references,
    )
    autoencoder = QwenAutoencoder(vae, device)
    control = QwenControl(transformer, autoencoder.encode, packed, device)
    # A ControlNet's residuals cover only the tokens of the generated image, not of references.
    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=FlowSchedules(folder, multiple),
        denoiser=QwenDenoiser(transformer, control),
        autoencoder=autoencoder,
        control=control if references is None else None,
        picture_tokens=None if references is None else token_grid,
        text=text,
        stack=stack if references is None else partial(stack, places=_places_of(references)),
    )


def stack(
    rows: Sequence[Conditioning], *, fixed: bool, places: int = TEMPLATE.places
) -> StackedConditioning:
    """Stack texts of several lengths, with a mask; none may be longer than ``places``."""
    return stack_padded(rows, TEXT, places=places if fixed else None)


def _places_of(references: ReferencesRead) -> int:
    """Maximum length of a text, in which each image has one token for 28 x 28 pixels."""
    # Rounding to the encoder's multiples of 28 pixels may enlarge an image a little.
    of_a_picture = ceil(1.2 * (references.seen_area or 0) / 28**2)
    return EDIT_PLACES + references.max_images * of_a_picture


def _defaults_of(folder: Path) -> ModelDefaults:
    scheduler = read_json(folder, SCHEDULER)
    if said := stated(folder, scheduler, embeds_scale=False, flow=True):
        return said
    kind = read_json(folder, "model_index.json")["_class_name"]
    plus = kind == "QwenImageEditPlusPipeline"
    return defaults_by("qwen_image_edit_plus" if plus else "qwen_image", f"it is a {kind}")
