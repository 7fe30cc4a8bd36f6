"""Several prompts in one text, in AUTOMATIC1111's syntax: `a cat AND a hat :0.8`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from guidance.composed import Composed

__all__ = ["composed_of", "conjoined", "split_prompt"]

_AND: Final = re.compile(r"\bAND\b")
_NUMBER: Final = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
"""Both patterns are those of AUTOMATIC1111's modules/prompt_parser.py
(``get_multicond_prompt_list``)."""


def split_prompt(text: str) -> list[tuple[str, float]]:
    """Split a text into prompts with weights, by default 1; without `AND` it is a single prompt.

    Args:
        text: prompt of a request.
    """
    parts = _AND.split(text)
    return [_weighted(part) for part in parts] if len(parts) > 1 else [(text, 1.0)]


def composed_of(parts: Sequence[tuple[str, float]], scale: float | None) -> dict[str, Any]:
    """Return the fields `prompt` and `guidance` that compose several prompts.

    AUTOMATIC1111's prediction is ``Du + sum_i scale weight_i (D_i - Du)``, the same as that of the
    rule ``composed``, whose first prompt is the request's own.

    Args:
        parts: prompts with their weights, more than one.
        scale: scale of classifier-free guidance; None for the rule's default.
    """
    by = Composed().scale if scale is None else scale
    # The weight of the request's own prompt cannot be negative.
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
    """Return the text of a composed request, the inverse of :func:`split_prompt`.

    Args:
        prompt: prompt of the request.
        scale: scale of the rule, by which the weights are divided; 0 leaves the other prompts out.
        prompts: prompts of the rule, with their weights.
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
