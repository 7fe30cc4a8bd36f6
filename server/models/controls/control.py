"""Controls, which steer images in addition to the prompt: loaded ControlNets and their images.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from server.models.window import in_window

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Control", "ControlUse", "Precedence"]

Precedence: TypeAlias = Literal["prompt", "control"]
"""Which one has more weight where a prompt and a control image disagree."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Control:
    """A ControlNet, loaded for one model.

    Attributes:
        name: name that requests use.
        network: diffusers module, in inference mode on the model's device; None for images that
            are only counted.
        nbytes: memory of its weights, in bytes.
        cost: cost of one of its rows, in rows of the denoiser: the ratio of their weights.
    """

    name: str
    network: Any
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True, eq=False)
class ControlUse:
    """A control of a request's images: a ControlNet, its image, its strength and its window.

    Attributes:
        control: the ControlNet.
        picture: ``[3, H, W]`` float32 in [-1, 1], of the size of the generated images.
        scale: factor on the residuals that it adds.
        start: fraction of the run after which it begins to act.
        end: fraction of the run after which it no longer acts.
        precedence: `prompt` lets it add less the nearer a layer is to the network's input, so that
            it determines what there is rather than how it looks; `control` does so too, and lets
            it act only on predictions for the prompt, so that guidance amplifies what it adds. None
            for neither.
    """

    control: Control
    picture: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    precedence: Precedence | None = None

    def acts(self, stage: int, stages: int) -> bool:
        """Whether it acts at a stage of this many, counted from 0."""
        return in_window(self.start, self.end, stage, stages)

    def acts_on(self, *, prompted: bool) -> bool:
        """Whether it acts on a prediction for the prompt (``prompted``), or on another one."""
        return prompted or self.precedence != "control"
