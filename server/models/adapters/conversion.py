"""Renames the tensors of LoRA files to peft's names, by diffusers' own converters.

A converter may keep a file's tensors or derive new ones from them: parts of a fused projection,
factors times alpha / rank. Given stand-ins on the meta device, it yields the same names and shapes,
and each stand-in keeps track of the tensors of the file from which it was derived.
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

__all__ = ["CONVERTERS", "PARTS", "TrackedTensor", "converted"]

PARTS: Final = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Networks that the converters support, with whose names converted names begin."""

CONVERTERS: Final[Mapping[str, str]] = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
"""Class of diffusers that converts files for a transformer; all others use a U-Net's converter."""


SAME_NUMBERS: Final = (Tensor.reshape, Tensor.float, Tensor.flatten)


class TrackedTensor(Tensor):
    """A tensor on the meta device that tracks the tensors of a file from which it was derived.

    Attributes:
        sources: names of these tensors.
        kept: whether it has the numbers of one of them unchanged.
    """

    sources: frozenset[str]
    kept: bool

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> TrackedTensor:
        """Create the stand-in of a tensor of the file."""
        made = torch.empty(shape, device="meta").as_subclass(cls)
        made.sources, made.kept = frozenset([name]), True
        return made

    @classmethod
    @override
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__:
            # Asks whether a second factor has blocks of zeros, which would only reduce ranks.
            return False
        given = tree_leaves((args, kwargs))
        own = [one for one in given if isinstance(one, cls)]
        sources = frozenset[str]().union(*(one.sources for one in own))
        # With another shape or dtype it still has the same numbers.
        kept = func in SAME_NUMBERS and all(one.kept for one in own)

        def traced(made: Any) -> Any:
            if isinstance(made, cls):
                made.sources, made.kept = sources, kept
            return made

        return tree_map(traced, super().__torch_function__(func, types, args, kwargs or {}))


def converted(
    tensors: Mapping[str, Tensor], converter: str | None, unet_config: Any
) -> dict[str, dict[str, Tensor]]:
    """Rename tensors to peft's names, by network and by name in that network.

    Args:
        tensors: tensors of a file, or stand-ins for them.
        converter: name of the class in diffusers, one of ``CONVERTERS``; None for U-Nets.
        unet_config: config of the U-Net, from which its converter derives block numbers.

    Raises:
        AdapterMismatch: the names are in no known format; the message continues a sentence that
            begins with the adapter's name.
    """
    try:
        state = _state_of(tensors, converter, unet_config)
        return {part: _own(state, part) for part in PARTS}
    except Exception as error:
        # Converters raise various exceptions for names they do not expect.
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
