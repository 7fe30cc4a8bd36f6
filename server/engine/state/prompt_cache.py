"""Prompts to conditioning: encoded in batches, kept while they are in use."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.models.conditioning import Conditioning
    from server.models.hosted import HostedModel

Key: TypeAlias = "tuple[str | None, int, int]"
"""A prompt, and the width and height that it was encoded for."""

PROMPTS_KEPT = 1024
ENCODED_AT_ONCE = 16


class PromptCache:
    """Least-recently-used cache of one model's encoded prompts.

    Args:
        model: whose text encoder.
        fixed: encode at one batch size always, so that a prompt's bits do not depend on the
            prompts that came with it.
    """

    def __init__(self, model: HostedModel, *, fixed: bool) -> None:
        self._model = model
        self._fixed = fixed
        self._kept: OrderedDict[Key, Conditioning] = OrderedDict()

    def of(
        self, prompts: Iterable[str | None], width: int, height: int
    ) -> dict[str | None, Conditioning]:
        """Conditioning of each prompt, for pictures of a size in pixels."""
        wanted = [(prompt, width, height) for prompt in dict.fromkeys(prompts)]
        missing = [key for key in wanted if key not in self._kept]
        for first in range(0, len(missing), ENCODED_AT_ONCE):
            chunk = missing[first : first + ENCODED_AT_ONCE]
            told = [prompt for prompt, _, _ in chunk]
            filler = [None] * (ENCODED_AT_ONCE - len(chunk)) if self._fixed else []
            encoded = self._model.encode_prompts(told + filler, width, height)
            self._kept.update(zip(chunk, encoded, strict=False))
        for key in wanted:
            self._kept.move_to_end(key)
        found = {key[0]: self._kept[key] for key in wanted}
        while len(self._kept) > PROMPTS_KEPT:
            self._kept.popitem(last=False)
        return found
