"""Branches: the predictions of a stage in addition to the prompt's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from guidance.edits import Edit

Prompt = TypeVar("Prompt")


@dataclass(frozen=True, slots=True)
class Branch:
    """One prediction: its conditioning, and the change made inside the network for it.

    Attributes:
        told: conditioning of the network: the request's prompt, its negative prompt, nothing, or a
            text of the rule's own. Without a negative prompt, ``negative`` means nothing, too.
        prompt: the rule's own text, where ``told`` is ``own``.
        edit: change made inside the network for this prediction, if any.
    """

    told: Literal["prompt", "negative", "empty", "own"]
    prompt: str = ""
    edit: Edit | None = None

    def text(self, prompt: Prompt, negative_prompt: str | None) -> Prompt | str | None:
        """The text that the network is conditioned on; None for the unconditional prediction.

        Args:
            prompt: prompt of the request: a text, or any other conditioning that the caller uses.
            negative_prompt: negative prompt of the request, if it has one.
        """
        match self.told:
            case "prompt":
                return prompt
            case "negative":
                return negative_prompt
            case "empty":
                return None
            case "own":
                return self.prompt


NEGATIVE = Branch("negative")
"""The prediction for the negative prompt."""

EMPTY = Branch("empty")
"""The prediction without any prompt."""
