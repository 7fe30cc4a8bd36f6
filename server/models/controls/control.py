"""What steers images beside their prompt: ControlNets once they are loaded, and their pictures.

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
"""What counts for more where a prompt and a picture differ."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Control:
    """A ControlNet, loaded for one model.

    Attributes:
        name: as requests say it.
        network: of diffusers, in inference mode on the model's device; None of images that are only
            counted.
        nbytes: memory of its weights.
        cost: what a row of it costs, in rows of the denoiser: the ratio of their weights.
    """

    name: str
    network: Any
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True, eq=False)
class ControlUse:
    """What steers the images of a request: a ControlNet and its picture, how strongly and when.

    Attributes:
        control: the ControlNet.
        picture: ``[3, H, W]`` float32 in [-1, 1], of the size of the images.
        scale: factor on what it adds.
        start: share of the run after which it begins to act.
        end: share of the run after which it no longer acts.
        precedence: `prompt` lets it add less, the nearer a place is to the network's input, so that
            it says what there is rather than how it looks; `control` does so too, and lets it act
            on predictions of the prompt alone, so that guidance magnifies what it adds. None for
            neither.
    """

    control: Control
    picture: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    precedence: Precedence | None = None

    def acts(self, stage: int, stages: int) -> bool:
        """Whether it acts at a stage of so many, counted from 0."""
        return in_window(self.start, self.end, stage, stages)

    def acts_on(self, *, prompted: bool) -> bool:
        """Whether it acts on a prediction of the prompt, or on another one."""
        return prompted or self.precedence != "control"
