"""ControlNets of Qwen-Image, whose block outputs are added to those of the transformer's blocks.

They run as in diffusers' ``QwenImageControlNetPipeline``: only on the prompt's row, for both
branches of classifier-free guidance. An image is encoded to the mean of the autoencoder's
posterior, where the pipeline draws a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.models.controls.control_kind import first_misfit, first_outside
from server.models.controls.row_controls import summed
from server.models.controls.spread import in_runs
from server.models.qwen_positions import cache_positions_per_network

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from server.models.controls.row_controls import ControlGroup, RowControls

__all__ = ["QwenControl"]

SHARED_CONFIG = (
    "in_channels",
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "axes_dims_rope",
)
"""Entries of a ControlNet's config that must equal those of the transformer's."""


class QwenControl:
    """The ControlNets of a Qwen-Image transformer.

    Args:
        transformer: a ``QwenImageTransformer2DModel``.
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
        from diffusers import QwenImageControlNetModel

        self.kind: Any = QwenImageControlNetModel
        self.denoiser: nn.Module = transformer
        self._layers = len(transformer.transformer_blocks)
        self._encode = encode
        self._packed = packed
        self._device = device
        self._expected = {name: transformer.config[name] for name in SHARED_CONFIG} | {
            # ControlNets for inpainting also take a mask.
            "extra_condition_channels": 0,
        }

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """See ``ControlKind.misfit``."""
        differs = first_misfit(self.kind, config, self._expected)
        return differs or first_outside(config, {"num_layers": range(1, self._layers + 1)})

    def config_of_file(self, tensors: Collection[str]) -> None:
        """See ``ControlKind.config_of_file``; these ControlNets are read only from folders."""
        del tensors

    def prepared(self, network: Any) -> Any:
        """See ``ControlKind.prepared``."""
        cache_positions_per_network(network)
        return network.to(self._device)

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        """The image's tokens ``[tokens, 4 C]``."""
        latents = self._encode(picture.to(self._device)[None])
        return self._packed(latents)[0].to(network.dtype)

    def residuals(
        self, rows: Mapping[str, Tensor], shape: tuple[int, int, int], controls: RowControls
    ) -> dict[str, Any]:
        """Compute the residuals for the rows, by the name of the transformer's argument.

        Args:
            rows: arguments of the transformer that have one entry per row.
            shape: size of the image in tokens: frames, height and width.
            controls: controls of each row.
        """

        def evaluate(same: ControlGroup) -> Sequence[Tensor | None]:
            blocks = same.control.network(
                **{name: one.index_select(0, same.rows) for name, one in rows.items()},
                img_shapes=[[shape]] * len(same.rows),
                controlnet_cond=same.hints,
                return_dict=False,
            )
            return in_runs(blocks or (), self._layers)

        return {"controlnet_block_samples": summed(controls, evaluate, once=self.once)}
