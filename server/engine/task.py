"""What the service asks of the engine: one image, and what it has to do with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from server.engine.scheduler import Priority
from server.models.text_options import AS_USUAL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from guidance import Policy, Rule, StepCache
    from samplers import Plan
    from server.engine.state.noise import Variation
    from server.engine.terms.term import Term
    from server.models.adapters.adapter import Weighted
    from server.models.blend import Blend
    from server.models.controls.control import ControlUse
    from server.models.image_prompts.image_prompt import ImagePromptUse
    from server.models.text_options import TextOptions


RepaintedFrom: TypeAlias = Literal["image", "noise", "nothing"]
"""What is inside of a mask at the start: the image, noise in the place of its latents, or zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Images that run in lockstep: each tick takes all of them or none.

    They belong to one submission, side by side, and follow one plan and one guidance. Where their
    terms compare predictions of one image with those of another, no policy ends guidance for one of
    them alone. What they have to do with each other is their terms' business.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A live stream, by identity: frames of different streams share the device equally."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageTask:
    """One image, as the service gives it to the engine.

    Attributes:
        model: name of a hosted model.
        prompt: what the picture shows, or several such texts blended.
        negative_prompt: what the second branch is told; None is the model's unconditional.
        width: in pixels.
        height: in pixels.
        seed: of this image, 0 to 2^63 - 1.
        variation: turns the start noise towards that of another seed.
        noise_size: width and height in pixels of the picture whose start noise the middle of the
            image has.
        plan: the sampler's table.
        rule: how predictions are combined.
        policy: where the second prediction comes from.
        terms: what is added to the guidance beside the rule, in the order of
            ``server.engine.terms.registry.TERMS``.
        text: how all that its rows are told is encoded.
        adapters: that all its rows have, whatever they are told.
        controls: what steers all its rows beside the prompt.
        image_prompts: pictures that its rows attend to beside their texts.
        references: pictures that its prompt refers to, ``[3, H, W]`` float32 in [-1, 1] of any
            sizes; for models whose facts have ``references``.
        cache: decides at which stages the network is not evaluated; None evaluates it at every one.
        coefficients: what a policy that is fitted was fitted to, ``[stages, n]``.
        group: the images that this one runs in lockstep with.
        priority: who goes first.
        stream: that the image is a frame of, if its priority is live; where None is given, the
            images of its submission are a stream.
        image: picture to start from, ``[3, H, W]`` float32 in [-1, 1]; the plan then starts
            part way.
        latents: clean latents to start from instead of a picture, ``[C, h, w]`` float32.
        mask: ``[H, W]`` float32, 1 to repaint, 0 to keep.
        kept: the picture whose part outside of the mask the result has, where ``image`` has been
            changed; None for ``image``.
        repainted_from: what the run starts from inside of the mask.
        from_noise: whether x starts as noise alone, although there is a picture.
        undecoded: whether the result is the clean latents, which are not decoded.
        previews: attach a small picture to each progress report.
    """

    model: str
    prompt: str | Blend
    negative_prompt: str | None
    width: int
    height: int
    seed: int
    plan: Plan
    rule: Rule
    policy: Policy
    terms: tuple[Term, ...] = ()
    text: TextOptions = AS_USUAL
    adapters: tuple[Weighted, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    image_prompts: tuple[ImagePromptUse, ...] = ()
    references: tuple[Tensor, ...] = ()
    cache: StepCache | None = None
    coefficients: NDArray[np.float64] | None = None
    group: Group | None = None
    priority: Priority = Priority.INTERACTIVE
    stream: Stream | None = None
    image: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    kept: Tensor | None = None
    repainted_from: RepaintedFrom = "image"
    variation: Variation | None = None
    noise_size: tuple[int, int] | None = None
    from_noise: bool = False
    undecoded: bool = False
    previews: bool = False
