"""What a term is: guidance of an image beside its rule, along one plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from server.engine.terms.levels import levels_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from pydantic import BaseModel
    from torch import Tensor

    from guidance import Edit, Rule
    from guidance.diffusion_levels import DiffusionLevels
    from samplers import NoiseSchedule, Plan
    from server.engine.terms.seen import ForwardRows, OwnRows, Predictions, Seen
    from server.models.blend import Blend, Told
    from server.models.hosted import HostedModel


@dataclass(frozen=True, slots=True)
class RowSpec:
    """A prediction of an image: one row of a forward.

    Attributes:
        text: what the network is told; None is the model's unconditional.
        edits: what is changed inside the network for this row.
    """

    text: Told
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What terms are made for: the images of one request, which differ in their seeds alone.

    Attributes:
        model: that will serve it.
        schedule: the model's, at the request's size and steps.
        plan: of its sampler.
        rule: that the terms stand beside.
        prompt: of the request, or a blend.
        negative_prompt: of the request; None is the model's unconditional.
        reference: a picture that the request supplies to guide away from, ``[3, H, W]`` float32 in
            [-1, 1].
    """

    model: HostedModel
    schedule: NoiseSchedule
    plan: Plan
    rule: Rule
    prompt: str | Blend
    negative_prompt: str | None = None
    reference: Tensor | None = None

    def levels(self) -> DiffusionLevels:
        """Where the stages of the plan stand in the model's diffusion."""
        return levels_of(self.plan, self.schedule)


class Resampled(NamedTuple):
    """Which images go on from which.

    Attributes:
        origins: of each image, the one whose state it takes over, counted among those given;
            mostly its own.
        effective: effective number of images that the weights left in its group.
    """

    origins: list[int]
    effective: list[float]


class Term(Protocol):
    """What is added to the guidance of an image beside its rule.

    A term is laid out along the plan of its image, is shared by all images of a request, and does
    not change; what it keeps of one image is that image's state. In a tick all terms of one class
    that act there are called once, stacked over their images: the class says by ``prepares``,
    ``applies`` and ``resamples`` at which points. A row's result must not depend on its neighbours,
    those of its group aside.
    """

    made_from: ClassVar[type[BaseModel]]
    """Class of the settings that ask for this term."""
    prepares: ClassVar[bool] = False
    """Whether ``prepare`` is called before the forward."""
    applies: ClassVar[bool] = False
    """Whether ``apply`` is called after the rule."""
    resamples: ClassVar[bool] = False
    """Whether ``resample`` is called after the sampler's move."""

    @classmethod
    def of(cls, setting: Any, run: Run) -> Self:
        """The term that a part of a request's guidance asks for.

        Args:
            setting: of the class ``made_from``, checked against the model and the plan.
            run: of the request.
        """
        ...

    def acts(self, stage: int) -> bool:
        """Whether it has anything to do at a stage."""
        ...

    def rows(self, stage: int) -> tuple[RowSpec, ...]:
        """Predictions beside the image's own that it wants at a stage at which it acts."""
        del stage
        return ()

    @property
    def texts(self) -> tuple[str | None, ...]:
        """What must be encoded for it beside what its rows are told."""
        return ()

    @property
    def picture(self) -> Tensor | None:
        """A picture whose latent it needs, ``[3, H, W]`` float32 in [-1, 1]."""
        return None

    def begin(self, latents: Tensor | None, noise: Tensor) -> Any:
        """Its state of an image that is about to start.

        Args:
            latents: of ``picture``, ``[C, h, w]``; None if it has none.
            noise: that the image starts from, ``[C, h, w]``.
        """
        del latents, noise
        return None

    @classmethod
    def prepare(
        cls, terms: Sequence[Self], forward: ForwardRows, own: Sequence[OwnRows], seen: Seen
    ) -> None:
        """Change what rows of the forward are given, before it runs.

        Args:
            terms: one an image.
            forward: the rows, changed in place.
            own: where the rows of each image are.
            seen: the images.
        """

    @classmethod
    def apply(
        cls, terms: Sequence[Self], denoised: Tensor, predictions: Predictions, seen: Seen
    ) -> Tensor:
        """The guided predictions with the terms in them.

        Args:
            terms: one an image.
            denoised: what the rule and earlier terms made, ``[images, C, h, w]``.
            predictions: of the network.
            seen: the images.
        """
        del terms, predictions, seen
        return denoised

    @classmethod
    def resample(
        cls,
        terms: Sequence[Self],
        sound: Sequence[bool],
        predictions: Predictions,
        seen: Seen,
    ) -> Resampled:
        """Which images go on from which, within their groups; here each from itself.

        Args:
            terms: one an image.
            sound: whether each image's guided prediction is finite.
            predictions: of the network.
            seen: the images.
        """
        del sound, predictions, seen
        return Resampled(list(range(len(terms))), [float(len(terms))] * len(terms))
