"""LoRA files under peft's names, by diffusers' own converters.

A converter may keep a file's tensors as they are, or make new ones of them: halves of a joint
projection, factors times alpha / rank. Given stand-ins without memory, it says the same names and
shapes, and each stand-in remembers which tensors of the file it was made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from server.errors import AdapterMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CONVERTERS", "PARTS", "StandIn", "converted"]

PARTS: Final = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Networks that the converters know, by which converted names begin."""

CONVERTERS: Final[Mapping[str, str]] = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
"""Class of diffusers that converts files for a denoiser; all others go through a U-Net's."""


SAME_NUMBERS: Final = (Tensor.reshape, Tensor.float, Tensor.flatten)


class StandIn(Tensor):
    """A tensor without memory that knows the tensors of a file that it was made of.

    Attributes:
        sources: their names.
        kept: whether it stands for one of them as it is.
    """

    sources: frozenset[str]
    kept: bool

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> StandIn:
        """In place of a tensor of the file."""
        made = torch.empty(shape, device="meta").as_subclass(cls)
        made.sources, made.kept = frozenset([name]), True
        return made

    @classmethod
    @override
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__:
            # Whether a second factor has blocks of zeros, which only makes ranks smaller.
            return False
        given = tree_leaves((args, kwargs))
        own = [one for one in given if isinstance(one, cls)]
        sources = frozenset[str]().union(*(one.sources for one in own))
        # Of another shape or type it still stands for the same numbers.
        kept = func in SAME_NUMBERS and all(one.kept for one in own)

        def traced(made: Any) -> Any:
            if isinstance(made, cls):
                made.sources, made.kept = sources, kept
            return made

        return tree_map(traced, super().__torch_function__(func, types, args, kwargs or {}))


def converted(
    tensors: Mapping[str, Tensor], converter: str | None, unet_config: Any
) -> dict[str, dict[str, Tensor]]:
    """The tensors under peft's names, by network and by name in that network.

    Args:
        tensors: of a file, or stand-ins for them.
        converter: name of the class in diffusers, one of ``CONVERTERS``; None for U-Nets.
        unet_config: of a U-Net, by which its converter numbers blocks.

    Raises:
        AdapterMismatch: the names are of no known format; the sentence goes on after the adapter's
            name.
    """
    try:
        state = _state_of(tensors, converter, unet_config)
        return {part: _own(state, part) for part in PARTS}
    except Exception as error:
        # The converters raise whatever their string handling comes across.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise AdapterMismatch(f"is in no known LoRA format ({reason})") from error


def _state_of(
    tensors: Mapping[str, Tensor], converter: str | None, unet_config: Any
) -> Mapping[str, Tensor]:
    from diffusers.loaders import lora_pipeline

    if converter is None:
        known = lora_pipeline.StableDiffusionLoraLoaderMixin
        return known.lora_state_dict(dict(tensors), unet_config=unet_config)[0]
    return getattr(lora_pipeline, converter).lora_state_dict(dict(tensors))


def _own(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    prefix = f"{part}."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not own or all("lora_A" in name or "lora_B" in name for name in own):
        return own
    if part in ("unet", "transformer"):
        return convert_unet_state_dict_to_peft(own)
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
