"""The task that the service gives to the engine: one image, and its relation to others."""

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
"""Start of the masked area: the image's latents, noise in their place, or zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Images that run in lockstep: each tick has all of them or none.

    They belong to one submission, side by side, and share one plan and one guidance. If their terms
    compare predictions of one image with those of another, no policy ends guidance for only one of
    them. All other relations between them are the business of their terms.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A live stream, by identity: frames of different streams share the device equally."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageTask:
    """One image, as the service passes it to the engine.

    Attributes:
        model: name of a hosted model.
        prompt: text that describes the picture, or a blend of several texts.
        negative_prompt: text of the second branch; None is the model's unconditional input.
        width: width in pixels.
        height: height in pixels.
        seed: seed of this image, 0 to 2^63 - 1.
        variation: turns the start noise towards that of another seed.
        noise_size: width and height in pixels of the picture whose start noise fills the middle of
            the image.
        plan: table of the sampler.
        rule: rule that combines predictions.
        policy: policy that decides where the other predictions come from.
        terms: guidance in addition to the rule, in the order of
            ``server.engine.terms.registry.TERMS``.
        text: options for encoding all of its texts.
        adapters: adapters of all its rows, whatever their text.
        controls: ControlNets that act on all its rows.
        image_prompts: pictures that its rows attend to besides their texts.
        references: pictures that its prompt refers to, ``[3, H, W]`` float32 in [-1, 1] of any
            sizes; for models whose facts have ``references``.
        cache: step cache, which decides at which stages the network is not evaluated; None
            evaluates it at every stage.
        coefficients: coefficients of a policy that is fitted, ``[stages, n]``.
        group: group of images that this one runs in lockstep with.
        priority: priority class.
        stream: stream that the image is a frame of, if its priority is live; if None, the images of
            its submission are a stream.
        image: picture to start from, ``[3, H, W]`` float32 in [-1, 1]; the plan then starts part
            way.
        latents: clean latents to start from instead of a picture, ``[C, h, w]`` float32.
        mask: mask ``[H, W]`` float32, 1 to repaint, 0 to keep.
        kept: picture that supplies the result outside of the mask, if ``image`` was changed; None
            for ``image``.
        repainted_from: content of the masked area at the start of the run.
        from_noise: whether x starts as noise alone, although there is a picture.
        tiny: whether its pictures are encoded and decoded by the model's tiny autoencoder.
        undecoded: whether the result is the clean latents, without decoding.
        previews: whether to attach a small picture to each progress report.
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
    tiny: bool = False
    undecoded: bool = False
    previews: bool = False
