"""The contract of a term: guidance of an image in addition to its rule, along one plan."""

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
    from server.engine.terms.seen import ForwardRows, ImageRows, Predictions, TermContext
    from server.models.blend import Blend, TextPrompt
    from server.models.hosted import HostedModel


@dataclass(frozen=True, slots=True)
class RowSpec:
    """A prediction of an image: one row of a forward pass.

    Attributes:
        text: text that the network is given; None is the model's unconditional input.
        edits: changes inside the network for this row.
    """

    text: TextPrompt
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The run that terms are made for: the images of one request, which differ only in their seeds.

    Attributes:
        model: model that will serve the request.
        schedule: noise schedule of the model, at the request's size and steps.
        plan: plan of its sampler.
        rule: guidance rule that the terms add to.
        prompt: prompt of the request, or a blend.
        negative_prompt: negative prompt of the request; None is the model's unconditional input.
        reference: picture supplied by the request to guide away from, ``[3, H, W]`` float32 in [-1,
            1].
    """

    model: HostedModel
    schedule: NoiseSchedule
    plan: Plan
    rule: Rule
    prompt: str | Blend
    negative_prompt: str | None = None
    reference: Tensor | None = None

    def levels(self) -> DiffusionLevels:
        """Positions of the plan's stages in the model's diffusion process."""
        return levels_of(self.plan, self.schedule)


class Resampled(NamedTuple):
    """Which image's state each image continues from.

    Attributes:
        origins: for each image, the index of the one whose state it takes over, among those given;
            mostly its own.
        effective: effective number of images that the weights left in its group.
    """

    origins: list[int]
    effective: list[float]


class Term(Protocol):
    """Guidance of an image in addition to its rule.

    A term is laid out along the plan of its image, is shared by all images of a request, and is
    immutable; what it keeps of one image is that image's state. In a tick all terms of one class
    that act there are called once, stacked over their images. The class declares when by
    ``prepares``, ``applies`` and ``resamples``. A row's result must not depend on its neighbors,
    except those of its group.
    """

    made_from: ClassVar[type[BaseModel]]
    """Class of the settings that ask for this term."""
    prepares: ClassVar[bool] = False
    """Whether ``prepare`` is called before the forward pass."""
    applies: ClassVar[bool] = False
    """Whether ``apply`` is called after the rule."""
    resamples: ClassVar[bool] = False
    """Whether ``resample`` is called after the sampler's step."""

    @classmethod
    def of(cls, setting: Any, run: Run) -> Self:
        """Make the term that a part of a request's guidance asks for.

        Args:
            setting: settings of the class ``made_from``, checked against the model and the plan.
            run: run of the request.
        """
        ...

    def acts(self, stage: int) -> bool:
        """Whether the term has anything to do at a stage."""
        ...

    def rows(self, stage: int) -> tuple[RowSpec, ...]:
        """Predictions, besides the image's own, that it wants at a stage at which it acts."""
        del stage
        return ()

    @property
    def texts(self) -> tuple[str | None, ...]:
        """Texts that must be encoded for it, besides those of its rows."""
        return ()

    @property
    def picture(self) -> Tensor | None:
        """Picture whose latent it needs, ``[3, H, W]`` float32 in [-1, 1]."""
        return None

    def begin(self, latents: Tensor | None, noise: Tensor) -> Any:
        """Make its state of an image that is about to start.

        Args:
            latents: latents of ``picture``, ``[C, h, w]``; None if it has none.
            noise: noise that the image starts from, ``[C, h, w]``.
        """
        del latents, noise
        return None

    @classmethod
    def prepare(
        cls,
        terms: Sequence[Self],
        forward: ForwardRows,
        own: Sequence[ImageRows],
        seen: TermContext,
    ) -> None:
        """Change the inputs of rows, before the forward pass.

        Args:
            terms: terms, one per image.
            forward: inputs of the rows, changed in place.
            own: positions of each image's rows.
            seen: images that the terms act on.
        """

    @classmethod
    def apply(
        cls, terms: Sequence[Self], denoised: Tensor, predictions: Predictions, seen: TermContext
    ) -> Tensor:
        """Return the guided predictions with the terms applied.

        Args:
            terms: terms, one per image.
            denoised: output of the rule and earlier terms, ``[images, C, h, w]``.
            predictions: predictions of the network.
            seen: images that the terms act on.
        """
        del terms, predictions, seen
        return denoised

    @classmethod
    def resample(
        cls,
        terms: Sequence[Self],
        sound: Sequence[bool],
        predictions: Predictions,
        seen: TermContext,
    ) -> Resampled:
        """Choose whose state each image continues from, within its group; by default its own.

        Args:
            terms: terms, one per image.
            sound: whether each image's guided prediction is finite.
            predictions: predictions of the network.
            seen: images that the terms act on.
        """
        del sound, predictions, seen
        return Resampled(list(range(len(terms))), [float(len(terms))] * len(terms))
