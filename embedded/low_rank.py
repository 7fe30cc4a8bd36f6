"""Low-rank changes of a U-Net's weights (LoRA, arXiv 2106.09685), trained and stored."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from embedded.checkpoint import save

TARGETS: Final = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Suffixes of the names of the layers that an LCM-LoRA changes (arXiv 2311.05556)."""


class TrainedLowRank(nn.Module):
    """Adds ``up @ down`` to a weight ``[out, in]`` or ``[out, in, k, k]``; zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, fan_in = weight.shape[0], weight[0].numel()
        self.down = nn.Parameter(torch.empty(rank, fan_in, device=weight.device))
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + (self.up @ self.down).view_as(weight)


def add_low_rank(unet: UNet2DConditionModel, rank: int) -> list[nn.Parameter]:
    """Freeze the U-Net and add a low-rank change to each target; returns trainable parameters."""
    unet.requires_grad_(requires_grad=False)
    for name, module in list(unet.named_modules()):
        if name.endswith(TARGETS):
            weight = cast("Tensor", module.weight)
            parametrize.register_parametrization(module, "weight", TrainedLowRank(weight, rank))
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def save_low_rank(unet: UNet2DConditionModel, file: Path) -> None:
    """Store the changes as diffusers' ``load_lora_weights`` reads them, in float16.

    Their alpha equals their rank, which readers assume for files that do not specify it. The
    metadata tells Weft how a model with these changes must be sampled.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            change = cast("TrainedLowRank", module.parametrizations.weight[0])
            tail = cast("Tensor", module.weight).shape[2:]
            down, up = change.down.detach().half(), change.up.detach().half()
            tensors[f"unet.{name}.lora_A.weight"] = down.view(len(down), -1, *tail)
            tensors[f"unet.{name}.lora_B.weight"] = up.view(*up.shape, *[1] * len(tail))
    file.parent.mkdir(parents=True, exist_ok=True)
    save(tensors, file, {"format": "pt", "weft.convention": "lcm_lora"})


@torch.no_grad()
def fuse(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel) -> None:
    """Add the changes stored by :func:`save_low_rank` to the weights of a U-Net."""
    for key, down in tensors.items():
        name, found, _ = key.removeprefix("unet.").partition(".lora_A.weight")
        if found:
            up = tensors[f"unet.{name}.lora_B.weight"]
            weight = unet.get_parameter(f"{name}.weight")
            weight.add_((up.float().flatten(1) @ down.float().flatten(1)).view_as(weight))
