"""ControlNets of Stable Diffusion 3, whose outputs are added to those of the transformer's blocks.

They run as in diffusers' ``StableDiffusion3ControlNetPipeline``, in both branches of guidance. An
image is encoded to the mean of the autoencoder's posterior, where the pipeline draws a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from server.models.controls.control_kind import first_misfit, first_outside
from server.models.controls.row_controls import summed
from server.models.controls.spread import stretched

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

    from server.models.controls.row_controls import ControlGroup, RowControls

__all__ = ["SD3Control"]

SHARED_CONFIG = (
    "in_channels",
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
)
"""Entries of a ControlNet's config that must equal those of the transformer's."""

OF_TEXT = "joint_attention_dim", "caption_projection_dim"
"""Further such entries of ControlNets that take text embeddings."""


class SD3Control:
    """The ControlNets of a Stable Diffusion 3 transformer.

    Args:
        transformer: an ``SD3Transformer2DModel``.
        encode: encodes images to clean latents ``[rows, C, h, w]``.
        shift: offset that the autoencoder's shift has subtracted from these latents.
        device: device on which the ControlNets run.
    """

    knows_precedence = False
    once = False

    def __init__(
        self,
        transformer: Any,
        encode: Callable[[Tensor], Tensor],
        shift: float,
        device: torch.device,
    ) -> None:
        from diffusers import SD3ControlNetModel

        self.kind: Any = SD3ControlNetModel
        self.denoiser: Any = transformer
        self._layers = len(transformer.transformer_blocks)
        self._encode = encode
        self._shift = shift
        self._device = device
        self._expected = {name: transformer.config[name] for name in SHARED_CONFIG} | {
            "extra_conditioning_channels": 0,
        }
        self._of_text = {name: transformer.config[name] for name in OF_TEXT}

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """See ``ControlKind.misfit``."""
        reads_text = config.get("joint_attention_dim", 0) is not None
        expected = self._expected | (self._of_text if reads_text else {})
        differs = first_misfit(self.kind, config, expected)
        return differs or first_outside(config, {"num_layers": range(1, self._layers + 1)})

    def config_of_file(self, tensors: Collection[str]) -> None:
        """See ``ControlKind.config_of_file``; these ControlNets are read only from folders."""
        del tensors

    def prepared(self, network: Any) -> Any:
        """See ``ControlKind.prepared``; without a position embedding, it gets the transformer's."""
        if network.pos_embed is None:
            positions = network._get_pos_embed_from_transformer(self.denoiser)
            network.pos_embed = positions.to(network.dtype).requires_grad_(requires_grad=False)
        return network.to(self._device)

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        """The image's latents ``[C, h, w]``."""
        latents = self._encode(picture.to(self._device)[None])[0]
        if network.config.force_zeros_for_pooled_projection:
            # InstantX's ControlNets take latents without the shift.
            latents = latents + self._shift
        return latents.to(network.dtype)

    def residuals(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, controls: RowControls
    ) -> dict[str, Any]:
        """Compute the residuals for the rows, by the name of the transformer's argument.

        Args:
            x: latents in the form that the transformer takes, ``[rows, C, h, w]``.
            t: timesteps in the form that the transformer takes, ``[rows]``.
            text: text embeddings, ``[rows, tokens, features]``.
            pooled: pooled text embeddings, ``[rows, features]``.
            controls: controls of each row.
        """

        def evaluate(same: ControlGroup) -> Sequence[Tensor | None]:
            network = same.control.network
            reads_text = network.context_embedder is not None
            vectors = pooled.index_select(0, same.rows)
            if network.config.force_zeros_for_pooled_projection:
                vectors = torch.zeros_like(vectors)
            [blocks] = network(
                hidden_states=x.index_select(0, same.rows),
                timestep=t.index_select(0, same.rows),
                encoder_hidden_states=text.index_select(0, same.rows) if reads_text else None,
                pooled_projections=vectors,
                controlnet_cond=same.hints,
                return_dict=False,
            )
            return stretched(blocks, self._layers)

        return {"block_controlnet_hidden_states": summed(controls, evaluate, once=self.once)}
