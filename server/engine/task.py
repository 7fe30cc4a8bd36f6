"""What the service asks of the engine: one image, and what it has to do with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.engine.scheduler import Priority

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from guidance import (
        ClassifierGuidance,
        Edit,
        FeynmanKac,
        NegToMe,
        Perturbation,
        Policy,
        Rule,
    )
    from samplers import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Images that run in lockstep: each tick takes all of them or none.

    They belong to one submission, side by side, and follow one plan and one guidance, whose policy
    does not adapt.

    Attributes:
        particles: weighs them against each other, and replaces some by others, after each step.
            Their plan follows the reverse SDE, and they have the rule ``cfg``, which keeps no
            memory, the policy ``always``, and nothing else beside it.
        apart: keeps all but the first from resembling it, inside the network.
    """

    particles: FeynmanKac | None = None
    apart: NegToMe | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What an image asks of the model's classifier.

    Attributes:
        guidance: the term that the classifier adds.
        targets: number of the class aimed at, for each of its attributes in their order; -1 for
            none.
        strengths: what the term is multiplied by at each stage, 0 where it does not act.
        alternatives: prompts that it chooses a reference among, if the term leads away from one.
    """

    guidance: ClassifierGuidance
    targets: tuple[int, ...]
    strengths: NDArray[np.float64]
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Avoided:
    """A picture that all predictions of an image keep away from, inside the network.

    Attributes:
        picture: ``[3, H, W]`` float32 in [-1, 1].
        negtome: how, and when.
    """

    picture: Tensor
    negtome: NegToMe


@dataclass(frozen=True, slots=True, eq=False)
class ImageTask:
    """One image, as the service gives it to the engine.

    Attributes:
        model: name of a hosted model.
        prompt: what the picture shows.
        negative_prompt: what the second branch is told; None is the model's unconditional.
        width: in pixels.
        height: in pixels.
        seed: of this image, 0 to 2^63 - 1.
        plan: the sampler's table.
        rule: how predictions are combined.
        policy: where the second prediction comes from.
        perturbed: terms that lead away from disturbed predictions.
        strengths: what each of these is multiplied by at each stage, ``[perturbed, stages]``; its
            own scale where left out.
        edits: what every prediction of this image changes inside the network.
        aim: what it asks of the model's classifier.
        coefficients: what a policy that is fitted was fitted to, ``[stages, n]``.
        group: the images that this one runs in lockstep with.
        avoided: a picture that it keeps away from; then its group keeps none apart.
        priority: who goes first.
        image: picture to start from, ``[3, H, W]`` float32 in [-1, 1]; the plan then starts
            part way.
        mask: ``[H, W]`` float32, 1 to repaint, 0 to keep.
        previews: attach a small picture to each progress report.
    """

    model: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    seed: int
    plan: Plan
    rule: Rule
    policy: Policy
    perturbed: tuple[Perturbation, ...] = ()
    strengths: NDArray[np.float64] | None = None
    edits: tuple[Edit, ...] = ()
    aim: Aim | None = None
    coefficients: NDArray[np.float64] | None = None
    group: Group | None = None
    avoided: Avoided | None = None
    priority: Priority = Priority.INTERACTIVE
    image: Tensor | None = None
    mask: Tensor | None = None
    previews: bool = False
