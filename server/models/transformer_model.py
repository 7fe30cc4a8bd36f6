"""Models of a transformer, an autoencoder and a family's text side."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import override

from server.models.adapters.adapted_network import AdaptedNetwork
from server.models.hosted import HostedModel, ModelFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from guidance.edits import Edit
    from samplers import NoiseSchedule
    from server.models.adapters.adapter import RowAdapters
    from server.models.conditioning import Conditioning
    from server.models.inputs import RowInputs
    from server.models.text_side import TextSide

__all__ = ["Denoiser", "LatentCoder", "TransformerModel"]

TRANSFORMER = "transformer"
"""Name of the denoiser in a model folder."""

DEFAULT_SIDE = 1024
"""Pixels along a side of a picture where the configs say no size."""


class Denoiser(Protocol):
    """How a family's transformer is called; packing and the output's sign stay inside."""

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        ...

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        ...


class LatentCoder(Protocol):
    """Between pictures and the latents of a family, see ``HostedModel``."""

    @property
    def network(self) -> nn.Module:
        """The autoencoder."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """See ``HostedModel.decode``."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """See ``HostedModel.encode_image``."""
        ...


class TransformerModel(HostedModel):
    """A transformer with what its family says of text, latents and schedules.

    Args:
        facts: what is known of the model.
        device: where it runs.
        dtype: of the transformer and the text encoders.
        schedule: of a width and a height in pixels and a number of steps.
        denoiser: calls the transformer.
        autoencoder: decodes and encodes.
        text: encodes prompts.
    """

    def __init__(
        self,
        facts: ModelFacts,
        device: torch.device,
        dtype: torch.dtype,
        *,
        schedule: Callable[[int, int, int], NoiseSchedule],
        denoiser: Denoiser,
        autoencoder: LatentCoder,
        text: TextSide,
    ) -> None:
        super().__init__(facts, device, dtype)
        self._schedule = schedule
        self._denoiser = denoiser
        self._autoencoder = autoencoder
        self._text = text
        self._adapted = {
            part: AdaptedNetwork(part, network, device)
            for part, network in self.adaptable().items()
        }

    @override
    def schedule(self, width: int, height: int, steps: int) -> NoiseSchedule:
        return self._schedule(width, height, steps)

    @override
    def count_tokens(self, text: str) -> int:
        return self._text.count_tokens(text)

    @override
    def encode_prompts(
        self,
        prompts: Sequence[str | None],
        width: int,
        height: int,
        adapters: RowAdapters | None = None,
    ) -> list[Conditioning]:
        with ExitStack() as adapted:
            for part in self._text.modules():
                adapted.enter_context(self._adapted[part].applied(adapters))
            return self._text.encode(prompts, width, height)

    @override
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        with self._adapted[TRANSFORMER].applied(inputs.adapters):
            return self._denoiser(x, t, inputs)

    @override
    def adaptable(self) -> Mapping[str, nn.Module]:
        return {TRANSFORMER: self._denoiser.network, **self._text.modules()}

    @override
    def refuses(self, edit: Edit) -> str | None:
        return (
            f"has a {type(self._denoiser.network).__name__}, whose attention and blocks cannot be "
            "edited; use guidance without it, such as `cfg` or `apg`"
        )

    @override
    def decode(self, latents: Tensor) -> Tensor:
        return self._autoencoder.decode(latents)

    @override
    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._autoencoder.encode(pixels)

    @override
    def modules(self) -> Mapping[str, nn.Module]:
        return {
            TRANSFORMER: self._denoiser.network,
            "vae": self._autoencoder.network,
            **self._text.modules(),
        }


def default_side(vae: Any, size_multiple: int) -> int:
    """Pixels along a side of a picture that a request leaves out, by the autoencoder's config.

    Args:
        vae: the network.
        size_multiple: that the number must be a multiple of; it is rounded down to one.
    """
    side = getattr(vae.config, "sample_size", None) or DEFAULT_SIDE
    return max(side // size_multiple, 1) * size_multiple
