"""Tags for extra networks in a prompt, in AUTOMATIC1111's syntax: `<lora:name:weight>`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

__all__ = ["Tagged", "read_tags"]

_TAG: Final = re.compile(r"<(\w+):([^<>]+)>")
"""AUTOMATIC1111's pattern for extra networks (modules/extra_networks.py)."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """A prompt without its tags, and the contents of the tags.

    Attributes:
        prompt: rest of the text.
        loras: weight of each LoRA by its name; for a repeated name, the last weight.
        others: tags of other kinds, such as hypernetworks, or with a weight that is not a number.
    """

    prompt: str
    loras: dict[str, float]
    others: tuple[str, ...]


def read_tags(prompt: str) -> Tagged:
    """Separate the tags from a prompt.

    `<lora:name>` has weight 1. For `<lora:name:te:unet>` and `<lora:name:te=0.5:unet=0.8>` the
    weight of the U-Net is used, since here one weight applies to both networks.
    """
    loras: dict[str, float] = {}
    others: list[str] = []

    def take(match: re.Match[str]) -> str:
        kind, (name, *arguments) = match[1].lower(), match[2].split(":")
        weight = _weight(arguments)
        if kind != "lora" or weight is None:
            others.append(match[0])
        else:
            loras[name.strip()] = weight
        return ""

    rest = _TAG.sub(take, prompt)
    return Tagged(rest.strip() if rest != prompt else prompt, loras, tuple(others))


def _weight(arguments: list[str]) -> float | None:
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    plain = [argument for argument in arguments if "=" not in argument]
    text = named.get("unet") or (plain[1:2] or plain[:1] or [named.get("te", "1")])[0]
    try:
        return float(text)
    except ValueError:
        return None
