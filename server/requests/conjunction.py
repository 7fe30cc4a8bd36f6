"""Several prompts in one, as AUTOMATIC1111 writes them: `a cat AND a hat :0.8`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from guidance.composed import Composed

__all__ = ["composed_of", "conjoined", "split_prompt"]

_AND: Final = re.compile(r"\bAND\b")
_NUMBER: Final = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
"""Both as its modules/prompt_parser.py (``get_multicond_prompt_list``)."""


def split_prompt(text: str) -> list[tuple[str, float]]:
    """The prompts of a text and their weights, by default 1; a text without `AND` is one as it is.

    Args:
        text: of a request.
    """
    parts = _AND.split(text)
    return [_weighted(part) for part in parts] if len(parts) > 1 else [(text, 1.0)]


def composed_of(parts: Sequence[tuple[str, float]], scale: float | None) -> dict[str, Any]:
    """The fields `prompt` and `guidance` that draw several prompts together.

    AUTOMATIC1111's prediction is ``Du + sum_i scale weight_i (D_i - Du)``, as that of the rule
    ``composed``, whose first prompt is the request's own.

    Args:
        parts: prompts with their weights, more than one.
        scale: of classifier-free guidance; None for the rule's own.
    """
    by = Composed().scale if scale is None else scale
    # The request's own prompt leads away from nothing.
    lead = next((i for i, (_, weight) in enumerate(parts) if weight >= 0), None)
    others = [
        {"prompt": prompt, "weight": by * weight}
        for i, (prompt, weight) in enumerate(parts)
        if i != lead
    ]
    prompt, weight = parts[0 if lead is None else lead]
    own = 0.0 if lead is None else by * weight
    return {"prompt": prompt, "guidance": {"name": "composed", "scale": own, "prompts": others}}


def conjoined(prompt: str, scale: float, prompts: Sequence[tuple[str, float]]) -> str:
    """The text that :func:`split_prompt` reads a composed request from.

    Args:
        prompt: of the request.
        scale: of the rule, by which the weights are divided; 0 leaves the other prompts out.
        prompts: of the rule, with their weights.
    """
    if not prompts or not scale:
        return prompt
    others = [f"{text} :{weight / scale:.6g}" for text, weight in prompts]
    return " AND ".join([f"{prompt} :1", *others])


def _weighted(part: str) -> tuple[str, float]:
    text, colon, number = part.rpartition(":")
    if colon and _NUMBER.fullmatch(number.strip()):
        return text.strip(), float(number)
    return part.strip(), 1.0
