"""Pictures that stand beside a prompt: IP-Adapters once they are loaded, and what they are shown.

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

__all__ = ["UNLOADED", "IPAdapter", "ImageEncoder", "ImagePromptUse", "Kind", "Shown", "Widths"]

Kind: TypeAlias = Literal["plain", "plus"]
"""Whether an adapter reads an encoder's projected embedding, or the hidden states of all patches
before its last layer."""


class Widths(NamedTuple):
    """What an adapter must fit in a denoiser.

    Attributes:
        text: features of a token of the text.
        layers: features of the keys of each cross-attention layer, in the order in which
            diffusers counts them.
    """

    text: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ImageEncoder:
    """An image encoder, loaded.

    Attributes:
        network: a ``CLIPVisionModelWithProjection`` in inference mode on the model's device.
        mean: of each channel of its pictures, whose values are from 0 to 1; ``[3, 1, 1]``.
        std: likewise, what they are divided by.
        nbytes: memory of its weights.
    """

    network: Any
    mean: Tensor
    std: Tensor
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class IPAdapter:
    """An IP-Adapter, loaded for one model.

    Attributes:
        name: as requests say it.
        kind: what it reads of a picture.
        encoder: of the pictures.
        projection: of what the encoder puts out to tokens as wide as those of a text: diffusers'
            ``ImageProjection`` or ``IPAdapterPlusImageProjection``.
        keys_and_values: of a token, for one layer after another, ``[features, text width]``.
        identity: by which an adapter is told from others and from changed files of its name.
        nbytes: memory of its weights, without those of the encoder.
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
"""Stands for an adapter of images that are only counted."""


class Shown(NamedTuple):
    """What the cross-attention layers attend to of the pictures of one use.

    Attributes:
        picture: keys and values of all layers, ``[tokens, features]``.
        nothing: those where the picture is left out, as for a negative prompt.
        region: factors on what each query attends to, ``[queries, 1]``, by the number of queries of
            a layer; None for all of the image.
    """

    picture: Tensor
    nothing: Tensor
    region: Mapping[int, Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImagePromptUse:
    """What stands beside the prompt of a request's images, how strongly and when.

    Attributes:
        adapter: the IP-Adapter.
        pictures: each ``[3, side, side]`` float32 in [-1, 1], of the size that its encoder reads;
            their tokens are attended to together.
        shown_bytes: memory of what is made of them.
        scale: factor on what is attended to.
        start: share of the run after which it begins to act.
        end: share of the run after which it no longer acts.
        region: ``[H, W]`` float32, 1 where it acts and 0 elsewhere, of the size of the images; None
            for all of them.
        digests: of the pictures, by which they are known again; none where they have no content
            yet.
    """

    adapter: IPAdapter
    pictures: tuple[Tensor, ...]
    shown_bytes: int
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    region: Tensor | None = None
    digests: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Here, as the engine asks for it in its own thread.
        known = [one for one in self.pictures if not one.is_meta]
        digests = tuple(sha256(one.numpy().tobytes()).digest() for one in known)
        object.__setattr__(self, "digests", digests)

    @property
    def nbytes(self) -> int:
        """Memory of the pictures, of the region and of what is made of them."""
        region = 0 if self.region is None else self.region.nbytes
        return self.shown_bytes + region + sum(one.nbytes for one in self.pictures)

    def acts(self, stage: int, stages: int) -> bool:
        """Whether it acts at a stage of so many, counted from 0."""
        return in_window(self.start, self.end, stage, stages)
