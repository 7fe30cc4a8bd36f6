"""Encoding of prompts to conditioning: in batches, with a bounded cache."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from server.engine.faults import attempt, free_memory, is_out_of_memory
from server.lru import ByteBoundedLRU
from server.models.adapters.adapter import RowAdapters
from server.models.text_options import AS_USUAL, TextKey, TextOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from server.models.adapters.adapter import Weighted
    from server.models.conditioning import Conditioning
    from server.models.hosted import HostedModel

log = logging.getLogger(__name__)

Key: TypeAlias = "tuple[str | None, int, int, tuple[tuple[str, float], ...], TextKey]"
"""A prompt, and the width, height, adapters and options that it was encoded with.

Adapters are identified by revision and weight, since references would keep them in memory.
"""

PROMPT_CACHE_BYTES = 256 * 2**20
"""Bound for one model: 64 encodings of 512 tokens by T5 XXL in half precision, or 2,000 by CLIP."""

ENCODER_BATCH = 16


class PromptCache:
    """Cache of one model's encoded prompts, with least-recently-used eviction.

    Args:
        model: model whose text encoder is used.
        fixed: whether to encode at a fixed batch size, so that a prompt's bits do not depend on the
            other prompts of its batch.
        max_bytes: bound on the size of all cached encodings.
    """

    def __init__(
        self, model: HostedModel, *, fixed: bool, max_bytes: int = PROMPT_CACHE_BYTES
    ) -> None:
        self._model = model
        self._fixed = fixed
        self._kept: ByteBoundedLRU[Key, Conditioning] = ByteBoundedLRU(
            max_bytes, lambda conditioning: conditioning.nbytes
        )

    def of(
        self,
        prompts: Iterable[str | None],
        width: int,
        height: int,
        adapters: tuple[Weighted, ...] = (),
        options: TextOptions = AS_USUAL,
    ) -> dict[str | None, Conditioning | Exception]:
        """Return the conditioning of each prompt, or its own error.

        Args:
            prompts: prompts, which may repeat; None is the model's unconditional input.
            width: width of the pictures in pixels.
            height: height of the pictures in pixels.
            adapters: adapters that all of them are encoded with.
            options: options for encoding all of them.

        Raises:
            DeviceLost: the device no longer answers.
        """
        revisions = tuple((one.adapter.revision, one.weight) for one in adapters)
        found: dict[str | None, Conditioning | Exception] = {}
        missing: list[str | None] = []
        for prompt in dict.fromkeys(prompts):
            kept = self._kept.find((prompt, width, height, revisions, options.key(prompt)))
            if kept is None:
                missing.append(prompt)
            else:
                found[prompt] = kept
        for first in range(0, len(missing), ENCODER_BATCH):
            chunk = missing[first : first + ENCODER_BATCH]
            for prompt, outcome in self._encoded(chunk, width, height, adapters, options):
                found[prompt] = outcome
                if not isinstance(outcome, Exception):
                    key = prompt, width, height, revisions, options.key(prompt)
                    self._kept.put(key, outcome)
        return found

    def _encoded(
        self,
        prompts: list[str | None],
        width: int,
        height: int,
        adapters: tuple[Weighted, ...],
        options: TextOptions,
    ) -> Iterator[tuple[str | None, Conditioning | Exception]]:
        """Encode a batch; on an error split it in halves, until the error is one prompt's."""
        filler = [None] * (ENCODER_BATCH - len(prompts)) if self._fixed else []
        texts, device = prompts + filler, self._model.device
        of_rows = RowAdapters((adapters,) * len(texts)) if adapters else None
        encoded = attempt(
            lambda: self._model.encode_prompts(texts, width, height, of_rows, options), device
        )
        if not isinstance(encoded, Exception):
            yield from zip(prompts, map(_on_its_own, encoded), strict=False)
            return
        if is_out_of_memory(encoded):
            free_memory(device)
        if len(prompts) == 1:
            log.error("a prompt could not be encoded", exc_info=encoded)
            yield prompts[0], encoded
            return
        half = len(prompts) // 2
        yield from self._encoded(prompts[:half], width, height, adapters, options)
        yield from self._encoded(prompts[half:], width, height, adapters, options)


def _on_its_own(conditioning: Conditioning) -> Conditioning:
    """Copy a conditioning to memory of its own, since a view would keep the whole batch alive."""
    return replace(
        conditioning,
        tensors={name: tensor.clone() for name, tensor in conditioning.tensors.items()},
    )
