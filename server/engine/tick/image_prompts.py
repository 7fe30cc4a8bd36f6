"""Encoding of image prompts for attention: once per request, batched over requests."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeAlias

import torch

from server.engine.faults import attempt
from server.engine.tick.pictures import encoded
from server.lru import ByteBoundedLRU
from server.models.image_prompts.region import region_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from torch import Tensor

    from server.engine.state.sequence import Sequence
    from server.models.hosted import HostedModel
    from server.models.image_prompts.image_prompt import ImagePromptKV, ImagePromptUse, IPAdapter
    from server.models.image_prompts.unet_image_prompts import UNetImagePrompts

__all__ = ["ImagePromptCache", "keys_and_values_for"]

log = logging.getLogger(__name__)

Key: TypeAlias = "tuple[Hashable, bytes]"
"""Identity of an adapter, and the digest of a picture.

A reference to the adapter itself would keep it in memory.
"""

TOKEN_CACHE_BYTES = 64 * 2**20
"""Bound for one model: 1,000 pictures of 16 tokens with a width of 2048 in half precision."""

NO_IMAGE_KEY = b""
"""Key in place of a picture's digest, for the tokens that stand for no picture."""


class ImagePromptCache:
    """Cache of the tokens of one model's pictures, with least-recently-used eviction.

    Args:
        model: model whose U-Net attends to them.
        fixed: whether to encode at a fixed batch size, so that a picture's bits do not depend on
            the other pictures of its batch.
        max_bytes: bound on the size of all cached tokens.
    """

    def __init__(
        self, model: HostedModel, *, fixed: bool, max_bytes: int = TOKEN_CACHE_BYTES
    ) -> None:
        self._model = model
        self._fixed = fixed
        self._kept: ByteBoundedLRU[Key, Tensor] = ByteBoundedLRU(
            max_bytes, lambda tokens: tokens.nbytes
        )

    def encode(self, members: Iterable[Sequence]) -> None:
        """Store what rows attend to, for all image prompts of some images, with their submissions.

        Raises:
            DeviceLost: the device no longer answers.
        """
        attention = self._model.image_attention
        if attention is None:
            return
        wanted: dict[IPAdapter, dict[tuple[int, int], tuple[Sequence, ImagePromptUse]]] = {}
        for sequence in members:
            submission = sequence.submission
            for use in sequence.task.image_prompts:
                if id(use) not in submission.shown:
                    of_adapter = wanted.setdefault(use.adapter, {})
                    of_adapter[id(submission), id(use)] = sequence, use
        for adapter, uses in wanted.items():
            tokens = self._tokens(adapter, attention, [use for _, use in uses.values()])
            for sequence, use in uses.values():
                size = sequence.task.width, sequence.task.height
                shown = self._shown(attention, use, tokens, self._model.latent_shape(*size)[1:])
                sequence.submission.shown[id(use)] = shown

    def _tokens(
        self, adapter: IPAdapter, attention: UNetImagePrompts, uses: Iterable[ImagePromptUse]
    ) -> dict[bytes, Tensor | Exception]:
        """Tokens by digest, of pictures and of no picture, or the error of each that failed."""
        pictures = {
            digest: picture
            for use in uses
            for digest, picture in zip(use.digests, use.pictures, strict=True)
        }
        found: dict[bytes, Tensor | Exception] = {}
        for digest in (NO_IMAGE_KEY, *pictures):
            kept = self._kept.find((adapter.identity, digest))
            if kept is not None:
                found[digest] = kept
        missing = [digest for digest in pictures if digest not in found]
        made = encoded(
            [pictures[digest] for digest in missing],
            lambda batch: attention.tokens(adapter, batch),
            self._model.device,
            fixed=self._fixed,
        )
        found.update(zip(missing, made, strict=True))
        if NO_IMAGE_KEY not in found:
            found[NO_IMAGE_KEY] = attempt(
                lambda: attention.tokens_of_nothing(adapter), self._model.device
            )
        for digest, tokens in found.items():
            if not isinstance(tokens, Exception):
                self._kept.put((adapter.identity, digest), tokens)
        return found

    def _shown(
        self,
        attention: UNetImagePrompts,
        use: ImagePromptUse,
        tokens: Mapping[bytes, Tensor | Exception],
        size: tuple[int, int],
    ) -> ImagePromptKV | Exception:
        """Tokens that rows of latents of a given size attend to for one image prompt."""
        nothing = tokens[NO_IMAGE_KEY]
        pictures: list[Tensor] = []
        for digest in use.digests:
            picture = tokens[digest]
            if isinstance(picture, Exception):
                return picture
            pictures.append(picture)
        if isinstance(nothing, Exception):
            log.error("no picture could be encoded", exc_info=nothing)
            return nothing

        def make() -> ImagePromptKV:
            both = torch.cat(pictures), nothing.repeat(len(pictures), 1)
            return attention.shown(use.adapter, *both, self._region(use, size))

        return attempt(make, self._model.device)

    def _region(self, use: ImagePromptUse, size: tuple[int, int]) -> dict[int, Tensor] | None:
        if use.region is None:
            return None
        found = region_of(use.region.to(self._model.device), *size)
        return {queries: part.to(self._model.dtype) for queries, part in found.items()}


def keys_and_values_for(sequence: Sequence) -> tuple[ImagePromptKV, ...]:
    """Tokens that rows of an image attend to for each of its image prompts, once encoded.

    Raises:
        Exception: the error that encoding one of them ended in.
    """
    return tuple(
        _without_error(sequence.submission.shown[id(use)]) for use in sequence.task.image_prompts
    )


def _without_error(shown: ImagePromptKV | Exception) -> ImagePromptKV:
    if isinstance(shown, Exception):
        raise shown
    return shown
