"""ControlNets of Qwen-Image: blocks whose outputs are added to those of its transformer.

As ``QwenImageControlNetPipeline`` of diffusers runs them: over the prompt's row alone, for both
branches of classifier-free guidance. A picture is encoded to the mean of the autoencoder's
posterior, where the pipeline draws a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.models.controls.control_kind import first_misfit, first_outside
from server.models.controls.row_controls import summed
from server.models.controls.spread import in_runs
from server.models.qwen_positions import keep_own_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from server.models.controls.row_controls import RowControls, SameControl

__all__ = ["QwenControl"]

ALIKE = (
    "in_channels",
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "axes_dims_rope",
)
"""Entries of the transformer's config that a ControlNet's must equal."""


class QwenControl:
    """The ControlNets of a Qwen-Image transformer.

    Args:
        transformer: a ``QwenImageTransformer2DModel``.
        encode: clean latents ``[rows, C, h, w]`` of pictures.
        packed: tokens of latents.
        device: where it runs.
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
        self._expected = {name: transformer.config[name] for name in ALIKE} | {
            # Those for inpainting read a mask too.
            "extra_condition_channels": 0,
        }

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """See ``ControlKind.misfit``."""
        differs = first_misfit(self.kind, config, self._expected)
        return differs or first_outside(config, {"num_layers": range(1, self._layers + 1)})

    def config_of_file(self, tensors: Collection[str]) -> None:
        """See ``ControlKind.config_of_file``; they are read from folders alone."""
        del tensors

    def prepared(self, network: Any) -> Any:
        """See ``ControlKind.prepared``."""
        keep_own_positions(network)
        return network.to(self._device)

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        """The picture's tokens ``[tokens, 4 C]``."""
        latents = self._encode(picture.to(self._device)[None])
        return self._packed(latents)[0].to(network.dtype)

    def residuals(
        self, rows: Mapping[str, Tensor], shape: tuple[int, int, int], controls: RowControls
    ) -> dict[str, Any]:
        """What is added to the rows, by the name of the transformer's argument.

        Args:
            rows: arguments of the transformer that have an entry a row.
            shape: of the picture in tokens: frames, height and width.
            controls: of each row.
        """

        def evaluate(same: SameControl) -> Sequence[Tensor | None]:
            blocks = same.control.network(
                **{name: one.index_select(0, same.rows) for name, one in rows.items()},
                img_shapes=[[shape]] * len(same.rows),
                controlnet_cond=same.hints,
                return_dict=False,
            )
            return in_runs(blocks or (), self._layers)

        return {"controlnet_block_samples": summed(controls, evaluate, once=self.once)}
