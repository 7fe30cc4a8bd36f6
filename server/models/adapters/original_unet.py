"""Names of a U-Net's layers in the original code of Stable Diffusion.

The original code numbers its blocks consecutively, one for each ResNet and each change of
resolution. ComfyUI and OneTrainer write these names unchanged, kohya's scripts with underscores
instead of dots.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["original_names"]

ENDS: Final = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
}
RESNET: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK: Final = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<level>\d+)\."
    r"(?:(?P<kind>resnets|attentions)\.(?P<place>\d+)\.(?P<rest>.+)|(?:down|up)samplers\.0\.conv)"
)
MIDDLE: Final = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<place>\d+)\.(?P<rest>.+)")


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """The original name of each layer that the original code has, by diffusers' name.

    Args:
        layers: names of all layers of a U-Net in diffusers.
    """
    names = list(layers)
    blocks = {name: match for name in names if (match := BLOCK.fullmatch(name))}
    counts: dict[tuple[str, int], int] = {}
    attentive = set[tuple[str, int]]()
    for match in blocks.values():
        of = match["side"], int(match["level"])
        if match["kind"] == "resnets":
            counts[of] = max(counts.get(of, 0), int(match["place"]) + 1)
        elif match["kind"] == "attentions":
            attentive.add(of)
    made = {name: ENDS[name] for name in names if name in ENDS}
    for name in names:
        if match := MIDDLE.fullmatch(name):
            place = 1 if match["kind"] == "attentions" else 2 * int(match["place"])
            made[name] = f"middle_block.{place}.{_within(match)}"
    for name, match in blocks.items():
        side, level = of = match["side"], int(match["level"])
        down = side == "down"
        # After the ResNets of each level of the encoder, a separate block halves the resolution.
        first = down + sum(counts.get((side, i), 0) + down for i in range(level))
        begun = f"{'input' if down else 'output'}_blocks."
        if match["kind"]:
            number = first + int(match["place"])
            part = 1 if match["kind"] == "attentions" else 0
            made[name] = f"{begun}{number}.{part}.{_within(match)}"
        elif down:
            made[name] = f"{begun}{first + counts.get(of, 0)}.0.op"
        else:
            made[name] = f"{begun}{first + counts.get(of, 0) - 1}.{1 + (of in attentive)}.conv"
    return made


def _within(match: re.Match[str]) -> str:
    """Name of a layer within its block."""
    rest = match["rest"]
    return RESNET.get(rest, rest) if match["kind"] == "resnets" else rest
