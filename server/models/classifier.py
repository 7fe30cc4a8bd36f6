"""A small classifier of latents at any noise level, for classifier guidance."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from typing_extensions import override

from samplers.whole_file import write_whole
from server.errors import ModelMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

FORMAT = "weft.classifier.1"
DERIVE_COMMAND = "python -m embedded.derive classifier"
"""Command that derives the embedded model's classifier."""
SOFTPLUS_BETA = 3.0
"""Softplus instead of ReLU keeps gradients smooth (EluCD, arXiv 2310.11311, section 3.2)."""
WIDTHS = (32, 48, 64)
GROUPS = 8
LEVEL_FEATURES = 16
UNREADABLE = (
    *(SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError),
    # Raised by torch; and by Python for JSON that is nested too deeply.
    RuntimeError,
)
LEVEL_REACH = 8.0
"""Absolute half-log-SNR beyond which noise levels are no longer distinguished."""


class LatentClassifier(nn.Module):
    """Predicts logits of several attributes of the image from its noisy latent.

    Args:
        channels: number of latent channels.
        heads: class names of each attribute.
        model: revision of the model weights that the latents belong to.
    """

    def __init__(self, channels: int, heads: Mapping[str, tuple[str, ...]], model: str) -> None:
        super().__init__()
        self.channels = channels
        self.heads = dict(heads)
        self.model = model
        first, *_, last = WIDTHS
        self.level = nn.Sequential(nn.Linear(2 * LEVEL_FEATURES, last), _Smooth())
        self.enter = nn.Conv2d(channels, first, 3, padding=1)
        self.blocks = nn.ModuleList(
            _Block(before, after, last)
            for before, after in zip((first, *WIDTHS), (*WIDTHS, last), strict=True)
        )
        self.leave = nn.Sequential(nn.GroupNorm(GROUPS, last), _Smooth())
        self.logits = nn.ModuleDict(
            {name: nn.Linear(2 * last, len(classes)) for name, classes in self.heads.items()}
        )

    @override
    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Logits ``[rows, classes]`` of each attribute.

        Args:
            x: ``[rows, C, h, w]``.
            alpha: signal scale of each row, ``[rows]``.
            sigma: noise scale of each row, 0 for clean latents, ``[rows]``.
        """
        scale = (alpha.square() + sigma.square()).rsqrt()
        level = self.level(_features_of(alpha, sigma))
        hidden = self.enter(x * scale.view(-1, 1, 1, 1))
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, level)
            if number < len(WIDTHS) - 1:
                hidden = F.avg_pool2d(hidden, 2)
        left = self.leave(hidden)
        pooled = torch.cat([left.mean((2, 3)), left.amax((2, 3))], 1)
        return {name: head(pooled) for name, head in self.logits.items()}

    def save(self, file: Path) -> None:
        """Write a safetensors file in float16, atomically."""
        tensors = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        identity = {"channels": self.channels, "heads": self.heads, "model": self.model}
        metadata = {"format": FORMAT, "identity": json.dumps(identity)}
        write_whole(file, save(tensors, metadata))

    @classmethod
    def load(cls, file: Path) -> LatentClassifier:
        """Read a file written by ``save``, in float32, for inference.

        Raises:
            ModelMismatch: the file does not hold such a classifier.
        """
        try:
            with safe_open(file, "pt") as content:
                metadata: dict[str, str] = content.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ModelMismatch(f"{str(file)!r} contains no classifier in the format {FORMAT}.")
            identity: dict[str, Any] = json.loads(metadata["identity"])
            heads = {name: tuple(classes) for name, classes in identity["heads"].items()}
            classifier = cls(int(identity["channels"]), heads, str(identity["model"]))
            weights = {name: value.float() for name, value in load_file(file).items()}
            classifier.load_state_dict(weights)
        except UNREADABLE as error:
            raise ModelMismatch(f"classifier {str(file)!r} cannot be read: {error}.") from None
        return classifier.eval().requires_grad_(requires_grad=False)

    def check(self, revision: str) -> None:
        """Refuse to classify latents of other model weights than those it was trained for.

        Raises:
            ModelMismatch: it belongs to another model.
        """
        if self.model != revision:
            raise ModelMismatch(
                f"its classifier is for model revision {self.model}, but the weights are "
                f"{revision}; `{DERIVE_COMMAND}` makes it again."
            )


class _Smooth(nn.Module):
    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x, SOFTPLUS_BETA)


class _Block(nn.Module):
    """A residual block whose inner activations are scaled and shifted by the noise level."""

    def __init__(self, before: int, after: int, level: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(GROUPS, before), _Smooth(), nn.Conv2d(before, after, 3, padding=1)
        )
        self.norm = nn.GroupNorm(GROUPS, after)
        self.level = nn.Linear(level, 2 * after)
        self.second = nn.Sequential(_Smooth(), nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    @override
    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level)[:, :, None, None].chunk(2, 1)
        hidden = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(hidden)


def _features_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Sines and cosines of the half-log-SNR, ``[rows, 2 LEVEL_FEATURES]``."""
    snr = (alpha.clamp(min=1e-8).log() - sigma.clamp(min=1e-8).log()).clamp(
        -LEVEL_REACH, LEVEL_REACH
    )
    frequencies = torch.linspace(0.1, 2.0, LEVEL_FEATURES, device=snr.device)
    angles = snr[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
