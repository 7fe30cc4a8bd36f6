"""Models that consist of a transformer, an autoencoder and a family's text side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import override

from guidance.edits import SkippedBlocks
from server.errors import ModelMismatch
from server.models.autoencoder import Autoencoder
from server.models.hosted import HostedModel, ModelFacts
from server.models.reference_tokens import add_references
from server.models.row_changes import RowChanges
from server.models.text_options import AS_USUAL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from guidance.edits import Edit
    from samplers import NoiseSchedule
    from samplers.levels import F64
    from server.models.adapters.adapter import RowAdapters
    from server.models.conditioning import Conditioning, StackedConditioning
    from server.models.controls.control_kind import ControlKind
    from server.models.inputs import RowInputs
    from server.models.text_options import TextOptions
    from server.models.text_side import TextSide

__all__ = ["Denoiser", "LatentCoder", "StacksConditioning", "TransformerModel"]

TRANSFORMER = "transformer"
"""Name of the denoiser in a model folder."""

DEFAULT_SIDE = 1024
"""Image width and height in pixels where the configs specify no size."""


ADAPTED_TEXT = "CLIP"
"""Prefix of text encoder classes that adapters may change; LoRA files leave others unchanged."""


class StacksConditioning(Protocol):
    """Stacks conditioning for a family."""

    def __call__(self, rows: Sequence[Conditioning], *, fixed: bool) -> StackedConditioning:
        """See ``HostedModel.stack``."""
        ...


class Denoiser(Protocol):
    """Calls a family's transformer; hides packing and the sign of its output."""

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        ...

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        ...


class SizesDenoiser(Protocol):
    """Calls a transformer for rows of several latent shapes."""

    def __call__(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
        """See ``HostedModel.evaluate_sizes``."""
        ...


class LatentCoder(Protocol):
    """Converts between images and a family's latents, see ``HostedModel``."""

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
    """A transformer with its family's text side, latents and schedules.

    Args:
        facts: facts about the model.
        device: device on which it runs.
        dtype: dtype of the transformer and the text encoders.
        schedule: noise schedule for a width and height in pixels and a number of steps.
        denoiser: calls the transformer.
        sizes: calls it for several latent shapes at once; None where this is unsupported.
        autoencoder: decodes and encodes images.
        text: encodes prompts.
        stack: stacks the conditioning of rows; by default all have one shape.
        network_time: values that the transformer receives for times of the schedule; by default
            those of the schedule itself.
        negative: marks a negative prompt; None where it is encoded like any other.
        control: ControlNets that the denoiser accepts; None where it accepts none.
        picture_tokens: converts latents ``[C, h, w]`` of a reference image to tokens
            ``[height, width, features]``; None where the denoiser takes none.
    """

    def __init__(
        self,
        facts: ModelFacts,
        device: torch.device,
        dtype: torch.dtype,
        *,
        schedule: Callable[[int, int, int], NoiseSchedule],
        denoiser: Denoiser,
        sizes: SizesDenoiser | None = None,
        autoencoder: LatentCoder,
        text: TextSide,
        stack: StacksConditioning | None = None,
        network_time: Callable[[F64], F64] | None = None,
        negative: Callable[[str | None], str | None] | None = None,
        control: ControlKind | None = None,
        picture_tokens: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(facts, device, dtype)
        self._schedule = schedule
        self._denoiser = denoiser
        self._sizes = sizes
        self._autoencoder = autoencoder
        self._text = text
        self._stack = stack
        self._network_time = network_time
        self._negative = negative
        self._control = control
        self._picture_tokens = picture_tokens
        self._changes = RowChanges(TRANSFORMER, self.adaptable(), device)

    @override
    def schedule(self, width: int, height: int, steps: int) -> NoiseSchedule:
        return self._schedule(width, height, steps)

    @override
    def network_time(self, t: F64) -> F64:
        return super().network_time(t) if self._network_time is None else self._network_time(t)

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
        options: TextOptions = AS_USUAL,
    ) -> list[Conditioning]:
        with self._changes.of_texts(adapters):
            return self._text.encode(prompts, width, height, options)

    @override
    def negative(self, prompt: str | None) -> str | None:
        return prompt if self._negative is None else self._negative(prompt)

    @override
    def stack(self, rows: Sequence[Conditioning], *, fixed: bool = False) -> StackedConditioning:
        return super().stack(rows) if self._stack is None else self._stack(rows, fixed=fixed)

    @override
    def add_references(self, text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        if self._picture_tokens is None:
            return super().add_references(text, references)
        return add_references(text, [self._picture_tokens(one) for one in references])

    @override
    def in_tensors(self, inputs: RowInputs) -> RowInputs:
        return self._changes.in_tensors(super().in_tensors(inputs))

    @override
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        with self._changes.of_rows(inputs, x), self.blocks_running(inputs):
            return self._denoiser(x, t, inputs)

    @property
    @override
    def mixes_sizes(self) -> bool:
        return self._sizes is not None

    @override
    def evaluate_sizes(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
        if self._sizes is None:
            return super().evaluate_sizes(x, t, inputs)
        with self._changes.of_rows(inputs, x[0]), self.blocks_running(inputs):
            return self._sizes(x, t, inputs)

    @override
    def adaptable(self) -> Mapping[str, nn.Module]:
        texts = {
            part: network
            for part, network in self._text.modules().items()
            if type(network).__name__.startswith(ADAPTED_TEXT)
        }
        return {TRANSFORMER: self._denoiser.network, **texts}

    @property
    @override
    def autoencoder(self) -> Autoencoder | None:
        return self._autoencoder if isinstance(self._autoencoder, Autoencoder) else None

    @property
    @override
    def control_kind(self) -> ControlKind | None:
        return self._control

    @override
    def layers(self) -> tuple[str, ...]:
        return self._changes.edits.layers()

    @override
    def refuses(self, edit: Edit) -> str | None:
        skips = bool(self.layers())
        if skips and isinstance(edit, SkippedBlocks):
            return self._changes.edits.refuses(edit)
        inside = "attention" if skips else "attention and blocks"
        instead = "`slg`, which skips blocks, or " if skips else ""
        return (
            f"has a {type(self._denoiser.network).__name__}, whose {inside} cannot be edited; use "
            f"{instead}guidance without it, such as `cfg` or `apg`"
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


def check_channels(folder: Path, taken: int, coded: int) -> None:
    """Refuse a transformer whose input is not just the autoencoder's latents.

    Args:
        folder: model folder.
        taken: number of channels that the transformer takes.
        coded: number of channels of the autoencoder's latents.

    Raises:
        ModelMismatch: they differ.
    """
    if taken != coded:
        raise ModelMismatch(
            f"{TRANSFORMER} of model folder {str(folder)!r} takes latents of {taken} channels; "
            f"its autoencoder makes latents of {coded}, and transformers that read anything else "
            "are not hosted."
        )


def default_side(vae: Any, size_multiple: int) -> int:
    """Default image width and height in pixels, by the autoencoder's config.

    Args:
        vae: the autoencoder.
        size_multiple: the result is rounded down to a multiple of this.
    """
    side = getattr(vae.config, "sample_size", None) or DEFAULT_SIDE
    return max(side // size_multiple, 1) * size_multiple
