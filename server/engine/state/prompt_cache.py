"""Prompts to conditioning: encoded in batches, kept while they are in use."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from server.models.hosted import HostedModel

PROMPTS_KEPT = 1024
ENCODED_AT_ONCE = 16


class Conditioning:
    """Least-recently-used cache of one model's encoded prompts.

    Args:
        model: whose text encoder.
        fixed: encode at one batch size always, so that a prompt's bits do not depend on the
            prompts that came with it.
    """

    def __init__(self, model: HostedModel, *, fixed: bool) -> None:
        self._model = model
        self._fixed = fixed
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def of(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Conditioning ``[tokens, features]`` of each prompt."""
        wanted = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in wanted if prompt not in self._kept]
        for first in range(0, len(missing), ENCODED_AT_ONCE):
            chunk = missing[first : first + ENCODED_AT_ONCE]
            filler = [""] * (ENCODED_AT_ONCE - len(chunk)) if self._fixed else []
            encoded = self._model.encode_prompts(chunk + filler)
            self._kept.update(zip(chunk, encoded, strict=False))
        for prompt in wanted:
            self._kept.move_to_end(prompt)
        found = {prompt: self._kept[prompt] for prompt in wanted}
        while len(self._kept) > PROMPTS_KEPT:
            self._kept.popitem(last=False)
        return found
