"""Image prompts: loaded IP-Adapters, and the images that they are given beside the prompt.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",
arXiv 2308.06721.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from server.models.window import in_window

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from torch import Tensor

__all__ = [
    "UNLOADED",
    "IPAdapter",
    "ImageEncoder",
    "ImagePromptKV",
    "ImagePromptUse",
    "Kind",
    "Widths",
]

Kind: TypeAlias = Literal["plain", "plus"]
"""`plain` adapters read an encoder's projected embedding, `plus` adapters the hidden states of all
patches before its last layer."""


class Widths(NamedTuple):
    """Widths of a denoiser that an adapter must fit.

    Attributes:
        text: features of a text token.
        layers: features of the keys of each cross-attention layer, in diffusers' order of layers.
    """

    text: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ImageEncoder:
    """A loaded image encoder.

    Attributes:
        network: a ``CLIPVisionModelWithProjection`` in inference mode on the model's device.
        mean: mean of each channel, for values from 0 to 1, subtracted from images; ``[3, 1, 1]``.
        std: standard deviation of each channel, by which images are then divided; ``[3, 1, 1]``.
        nbytes: memory of its weights, in bytes.
    """

    network: Any
    mean: Tensor
    std: Tensor
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class IPAdapter:
    """An IP-Adapter, loaded for one model.

    Attributes:
        name: name that requests use.
        kind: which output of the encoder it reads.
        encoder: encoder of the images.
        projection: projects the encoder's output to tokens as wide as text tokens: diffusers'
            ``ImageProjection`` or ``IPAdapterPlusImageProjection``.
        keys_and_values: key and value projections of all layers, concatenated,
            ``[features, text width]``.
        identity: distinguishes an adapter from others, and from changed files of the same name.
        nbytes: memory of its weights without those of the encoder, in bytes.
    """

    name: str
    kind: Kind
    encoder: ImageEncoder
    projection: Any
    keys_and_values: Tensor
    identity: Hashable
    nbytes: int


_NOTHING: Any = None

UNLOADED = IPAdapter("", "plain", _NOTHING, None, _NOTHING, None, 0)
"""Placeholder for the adapter of images that are only counted."""


class ImagePromptKV(NamedTuple):
    """Keys and values that the cross-attention layers read from the images of one image prompt.

    Attributes:
        picture: keys and values of all layers, ``[tokens, features]``.
        nothing: keys and values where the images are left out, as for a negative prompt.
        region: factors on the attention output of each query, ``[queries, 1]``, by a layer's
            number of queries; None for the whole image.
    """

    picture: Tensor
    nothing: Tensor
    region: Mapping[int, Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImagePromptUse:
    """An image prompt of a request: an adapter, its images, its strength and its window.

    Attributes:
        adapter: the IP-Adapter.
        pictures: images, each ``[3, side, side]`` float32 in [-1, 1], of the size that the encoder
            reads; the layers attend to the tokens of all of them together.
        kv_bytes: memory of the keys and values computed from them, in bytes.
        scale: factor on the attention output.
        start: fraction of the run after which it begins to act.
        end: fraction of the run after which it no longer acts.
        region: ``[H, W]`` float32, 1 where it acts and 0 elsewhere, of the size of the generated
            images; None for the whole image.
        digests: digests that identify the pictures; empty where they have no content yet.
    """

    adapter: IPAdapter
    pictures: tuple[Tensor, ...]
    kv_bytes: int
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    region: Tensor | None = None
    digests: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Computed here, as the engine would otherwise compute it in its own thread.
        known = [one for one in self.pictures if not one.is_meta]
        digests = tuple(sha256(one.numpy().tobytes()).digest() for one in known)
        object.__setattr__(self, "digests", digests)

    @property
    def nbytes(self) -> int:
        """Memory of the images, of the region and of the keys and values, in bytes."""
        region = 0 if self.region is None else self.region.nbytes
        return self.kv_bytes + region + sum(one.nbytes for one in self.pictures)

    def acts(self, stage: int, stages: int) -> bool:
        """Whether it acts at a stage of this many, counted from 0."""
        return in_window(self.start, self.end, stage, stages)
