"""Predictions of a stage beside the prompt's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from guidance.edits import Edit

Prompt = TypeVar("Prompt")


@dataclass(frozen=True, slots=True)
class Branch:
    """One prediction: what the network is told, and what is changed inside it.

    Attributes:
        told: the request's prompt, its negative prompt, nothing, or a text of the rule's own. A
            request without a negative prompt tells nothing there, too.
        prompt: that text, where ``told`` is ``own``.
        edit: what is changed inside the network for this prediction.
    """

    told: Literal["prompt", "negative", "empty", "own"]
    prompt: str = ""
    edit: Edit | None = None

    def text(self, prompt: Prompt, negative_prompt: str | None) -> Prompt | str | None:
        """What the network is told; None is the model's unconditional.

        Args:
            prompt: of the request: a text, or whatever else the caller tells the network.
            negative_prompt: of the request, if it has one.
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
"""The negative prompt's prediction."""

EMPTY = Branch("empty")
"""The prediction without any prompt."""
