"""Predictions of a stage beside the prompt's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from guidance.edits import Edit


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

    def text(self, prompt: str, negative_prompt: str | None) -> str | None:
        """What the network is told, in words; None is the model's unconditional."""
        texts = {"prompt": prompt, "negative": negative_prompt, "empty": None, "own": self.prompt}
        return texts[self.told]


NEGATIVE = Branch("negative")
"""The negative prompt's prediction."""

EMPTY = Branch("empty")
"""The prediction without any prompt."""
