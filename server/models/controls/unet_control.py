"""ControlNets of U-Nets: a copy of the encoder, whose outputs are added to the skip connections.

They run as in diffusers' ``StableDiffusionControlNetPipeline`` and
``StableDiffusionXLControlNetPipeline``, in both branches of classifier-free guidance. The
pipelines' guess mode is the precedence `control`, with the factors of sd-webui-controlnet, which
differ from diffusers' by up to 0.6 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from server.models.controls.control_kind import first_misfit
from server.models.controls.row_controls import summed
from server.models.parts import known_entries

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from server.models.conditioning import StackedConditioning
    from server.models.controls.row_controls import ControlGroup, RowControls
    from server.models.hosted import ModelFacts

__all__ = ["UNetControl"]

TEXT = "encoder_hidden_states"

SHARED_CONFIG = (
    "block_out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
)
"""Entries of a ControlNet's config that must equal those of the U-Net's. It may have fewer
attention blocks than the U-Net, as the small ControlNets of Stable Diffusion XL do."""

FIRST_OUTPUT = ("zero_convs.0.0.weight", "controlnet_down_blocks.0.weight")
"""A tensor of every ControlNet, by its original name and by its diffusers name."""


class UNetControl:
    """The ControlNets of a U-Net.

    Args:
        unet: the U-Net.
        facts: facts of its model.
        device: device on which the ControlNets run.
    """

    knows_precedence = True
    once = False

    def __init__(self, unet: Any, facts: ModelFacts, device: torch.device) -> None:
        from diffusers import ControlNetModel

        self.kind: Any = ControlNetModel
        self.denoiser: Any = unet
        self._facts = facts
        self._device = device
        self._expected = {name: unet.config[name] for name in SHARED_CONFIG} | {
            "in_channels": facts.latent_channels,
            "conditioning_channels": 3,
            "layers_per_block": _number(unet.config.layers_per_block),
            # ControlNets that pool their outputs act only on the prompt's prediction.
            "global_pool_conditions": False,
        }

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """See ``ControlKind.misfit``."""
        if differs := first_misfit(self.kind, config, self._expected):
            return differs
        name = "conditioning_embedding_out_channels"
        widths = config.get(name, (16, 32, 96, 256))
        scale = self._facts.latent_scale
        if not isinstance(widths, list | tuple) or 2 ** (len(widths) - 1) != scale:
            return f"has {name} {str(widths)[:60]}, which does not reduce pictures {scale} times"
        return None

    def config_of_file(self, tensors: Collection[str]) -> Mapping[str, Any] | None:
        """See ``ControlKind.config_of_file``; it is that of a copy of the U-Net's encoder."""
        if not any(name.endswith(FIRST_OUTPUT) for name in tensors):
            return None
        return known_entries(self.denoiser.config, self.kind.__init__) | {
            "_class_name": self.kind.__name__,
            "in_channels": self._facts.latent_channels,
        }

    def prepared(self, network: Any) -> Any:
        """See ``ControlKind.prepared``; the image is embedded outside the forward pass."""
        network.embed_picture = network.controlnet_cond_embedding
        network.controlnet_cond_embedding = nn.Identity()
        network.reverses_channels = network.config.controlnet_conditioning_channel_order == "bgr"
        # Otherwise the forward pass would reverse the channels of the embedded image.
        network.register_to_config(controlnet_conditioning_channel_order="rgb")
        return network.to(self._device, memory_format=torch.channels_last)

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        """The embedded image, ``[features, h, w]``."""
        pixels = picture.to(self._device)[None] / 2 + 0.5
        pixels = pixels.flip(1) if network.reverses_channels else pixels
        return network.embed_picture(pixels.to(network.dtype))[0]

    def residuals(
        self, x: Tensor, t: Tensor, conditioning: StackedConditioning, controls: RowControls
    ) -> dict[str, Any]:
        """Compute the residuals for the rows, by the names of the U-Net's arguments.

        Args:
            x: latents in the form that the U-Net takes, without concatenated channels,
                ``[rows, C, h, w]``.
            t: timesteps in the form that the U-Net takes, ``[rows]``.
            conditioning: conditioning of each row.
            controls: controls of each row.
        """

        def evaluate(same: ControlGroup) -> Sequence[Tensor]:
            added = dict(conditioning.select(same.rows).tensors)
            text = added.pop(TEXT)
            network = same.control.network
            skips, middle = network(
                x.index_select(0, same.rows),
                t.index_select(0, same.rows),
                text,
                same.hints,
                added_cond_kwargs=added,
                return_dict=False,
            )
            return [*skips, middle]

        *skips, middle = summed(controls, evaluate, once=self.once)
        return {
            "down_block_additional_residuals": tuple(skips),
            "mid_block_additional_residual": middle,
        }


def _number(layers: Any) -> Any:
    """The number of layers if a config has the same for each block; otherwise its value."""
    alike = isinstance(layers, list | tuple) and len(set(layers)) == 1
    return layers[0] if alike else layers
