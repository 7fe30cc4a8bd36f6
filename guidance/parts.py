"""The parts of an image's guidance besides its rule, each described once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guidance.always import Always
from guidance.cfg_norm import CFGNorm
from guidance.feynman_kac import FeynmanKac
from guidance.freeu import FreeU
from guidance.nag import NAG
from guidance.negtome import NegToMe
from guidance.registry import CLASSIFIERS, PERTURBATIONS, POLICIES
from guidance.skip_tuning import SkipTuning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a `guidance` object besides the fields of its rule.

    The schema of requests, the catalog, the checks, the error messages and the text written into
    pictures are all derived from these descriptions, so a new part needs only a further entry.

    Attributes:
        field: name of the field in a request.
        kinds: classes whose objects the field accepts, at least one.
        description: one sentence for the user.
        label: name of the part in the text that is written into a picture.
        plural: name that the catalog gives to the list of its classes.
        default: value in a request that leaves the field out; None for no effect. A part that
            accepts several objects has an empty list instead.
        most: maximum number of objects; above 1 the field is a list.
        beside_particles: whether images that are weighted as particles may have it.
    """

    field: str
    kinds: tuple[type[BaseModel], ...]
    description: str
    label: str
    plural: str
    default: BaseModel | None = None
    most: int = 1
    beside_particles: bool = False

    @property
    def many(self) -> bool:
        """Whether the field is a list."""
        return self.most > 1

    @property
    def left_out(self) -> object:
        """Value in a request that leaves the field out."""
        return () if self.many else self.default

    @property
    def named(self) -> bool:
        """Whether its objects select their class by ``name``.

        If so, a bare name stands for an object with defaults. If not, there is only one class.
        """
        return all("name" in kind.model_fields for kind in self.kinds)

    @property
    def by_name(self) -> dict[str, type[BaseModel]]:
        """Its classes by their name in a request; empty unless they are ``named``."""
        if not self.named:
            return {}
        return {kind.model_fields["name"].default: kind for kind in self.kinds}


PARTS: tuple[Part, ...] = (
    Part(
        field="policy",
        kinds=POLICIES,
        description=(
            "At which steps the second prediction is evaluated, and what replaces it at the others."
        ),
        label="policy",
        plural="policies",
        default=Always(),
        beside_particles=True,
    ),
    Part(
        field="perturbed",
        kinds=PERTURBATIONS,
        description="Terms that steer away from predictions of a perturbed network.",
        label="perturbed",
        plural="perturbations",
        most=3,
    ),
    Part(
        field="classifier",
        kinds=CLASSIFIERS,
        description="A term computed from what the model's classifier sees.",
        label="classifier",
        plural="classifiers",
    ),
    Part(
        field="skip_tuning",
        kinds=(SkipTuning,),
        description="Factors on a U-Net's skip connections.",
        label="skip-tuning",
        plural="skip_tuning",
        beside_particles=True,
    ),
    Part(
        field="freeu",
        kinds=(FreeU,),
        description="Factors on a U-Net's backbone and on its coarse skip connections.",
        label="FreeU",
        plural="freeu",
        beside_particles=True,
    ),
    Part(
        field="particles",
        kinds=(FeynmanKac,),
        description="Treats the images of the request as particles, which are weighted and "
        "resampled at every step.",
        label="particles",
        plural="particles",
        beside_particles=True,
    ),
    Part(
        field="negtome",
        kinds=(NegToMe,),
        description="Pushes the images away from the first one, or from a reference image.",
        label="NegToMe",
        plural="negtome",
    ),
    Part(
        field="nag",
        kinds=(NAG,),
        description="Steers away from the negative prompt inside the network's cross-attention.",
        label="NAG",
        plural="nag",
    ),
    Part(
        field="cfg_norm",
        kinds=(CFGNorm,),
        description=(
            "Rescales the guided prediction to the norm of the prompt's own, token by token."
        ),
        label="CFG norm",
        plural="cfg_norm",
    ),
)


def chosen(guidance: object) -> Iterator[tuple[str, Any]]:
    """All parts of a guidance object besides its rule, with their paths.

    Args:
        guidance: object with one attribute for each part.

    Yields:
        The path within the guidance object (``policy``, ``perturbed.0``) and the object there.
    """
    for part in PARTS:
        held = getattr(guidance, part.field)
        if part.many:
            yield from ((f"{part.field}.{k}", one) for k, one in enumerate(held))
        elif held is not None:
            yield part.field, held
