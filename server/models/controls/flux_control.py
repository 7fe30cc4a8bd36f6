"""ControlNets of FLUX.1, whose block outputs are added to those of the transformer's blocks.

They run as in diffusers' ``FluxControlNetPipeline``: only on the prompt's row, for both branches of
true classifier-free guidance. An image is encoded to the mean of the autoencoder's posterior, where
the pipeline draws a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.models.controls.control_kind import first_misfit, first_outside
from server.models.controls.row_controls import summed
from server.models.controls.spread import in_runs, in_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from server.models.controls.row_controls import ControlGroup, RowControls

__all__ = ["FluxControl"]

SHARED_CONFIG = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "axes_dims_rope",
)
"""Entries of a ControlNet's config that must equal those of the transformer's."""


PATCH = 2
"""Latent cells along one side of a token."""


class FluxControl:
    """The ControlNets of a FLUX.1 transformer.

    Args:
        transformer: a ``FluxTransformer2DModel``.
        encode: encodes images to clean latents ``[rows, C, h, w]``.
        packed: packs latents into tokens.
        device: device on which the ControlNets run.
    """

    knows_precedence = False
    once = True

    def __init__(
        self,
        transformer: Any,
        encode: Callable[[Tensor], Tensor],
        packed: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        from diffusers import FluxControlNetModel

        self.kind: Any = FluxControlNetModel
        self.denoiser: nn.Module = transformer
        self._layers = len(transformer.transformer_blocks)
        self._single_layers = len(transformer.single_transformer_blocks)
        self._encode = encode
        self._packed = packed
        self._device = device
        self._expected = {name: transformer.config[name] for name in SHARED_CONFIG} | {
            # A union of several kinds would have to be told which of them is meant.
            "num_mode": None,
        }

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """See ``ControlKind.misfit``."""
        if differs := first_misfit(self.kind, config, self._expected):
            return differs
        layers = {
            "num_layers": range(1, self._layers + 1),
            "num_single_layers": range(self._single_layers + 1),
        }
        if differs := first_outside(config, layers):
            return differs
        embeds = config.get("conditioning_embedding_channels") is not None
        if embeds and config.get("patch_size") != PATCH:
            return f"embeds pictures, and has a patch_size other than {PATCH}"
        return None

    def config_of_file(self, tensors: Collection[str]) -> None:
        """See ``ControlKind.config_of_file``; these ControlNets are read only from folders."""
        del tensors

    def prepared(self, network: Any) -> Any:
        """See ``ControlKind.prepared``; the image is embedded outside the forward pass."""
        network.embed_picture, network.input_hint_block = network.input_hint_block, None
        return network.to(self._device)

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        """The image's tokens ``[tokens, 4 C]``."""
        pixels = picture.to(self._device)[None]
        if network.embed_picture is None:
            cells = self._encode(pixels)
        else:
            cells = network.embed_picture(pixels.to(network.dtype))
        return self._packed(cells)[0].to(network.dtype)

    def residuals(
        self,
        rows: Mapping[str, Tensor],
        positions: Mapping[str, Tensor],
        scale: Tensor,
        controls: RowControls,
    ) -> dict[str, Any]:
        """Compute the residuals for the rows, by the names of the transformer's arguments.

        Args:
            rows: arguments of the transformer that have one entry per row.
            positions: arguments that are the same for all rows.
            scale: guidance scale ``[rows]``, passed to ControlNets that embed it.
            controls: controls of each row.
        """

        def evaluate(same: ControlGroup) -> Sequence[Tensor | None]:
            network = same.control.network
            conditioning = {name: one.index_select(0, same.rows) for name, one in rows.items()}
            guided = network.config.guidance_embeds
            blocks, single_blocks = network(
                **conditioning,
                **positions,
                controlnet_cond=same.hints,
                guidance=scale.index_select(0, same.rows) if guided else None,
                return_dict=False,
            )
            # Outputs of ControlNets that embed the image themselves (XLabs) are assigned in turn.
            spread = in_runs if network.embed_picture is None else in_turn
            return [
                *spread(blocks or (), self._layers),
                *in_runs(single_blocks or (), self._single_layers),
            ]

        added = summed(controls, evaluate, once=self.once)
        parts = added[: self._layers], added[self._layers :]
        names = "controlnet_block_samples", "controlnet_single_block_samples"
        return {
            # A ControlNet adds to all blocks of a kind or to none.
            name: None if any(one is None for one in part) else part
            for name, part in zip(names, parts, strict=True)
        }
