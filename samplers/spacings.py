"""All spacings: ours, and those of installed packages."""

from __future__ import annotations

from difflib import get_close_matches

from samplers.align_your_steps import AlignYourSteps
from samplers.angles import Angles
from samplers.beta import Beta
from samplers.bong_tangent import BongTangent
from samplers.custom_times import Custom
from samplers.exponential import Exponential
from samplers.kl_optimal import KLOptimal
from samplers.laplace import Laplace
from samplers.linear_quadratic import LinearQuadratic
from samplers.spacing import Spacing
from samplers.timesteps import (
    Karras,
    LCMSpacing,
    Leading,
    Linspace,
    LogSNR,
    SGMUniform,
    TimeQuadratic,
    Trailing,
)
from weft_plugins import with_plugins

SPACINGS: tuple[type[Spacing], ...] = with_plugins(
    "weft.spacings",
    Spacing,
    (
        Leading,
        Trailing,
        Linspace,
        SGMUniform,
        TimeQuadratic,
        Karras,
        LogSNR,
        Exponential,
        Beta,
        KLOptimal,
        LinearQuadratic,
        Laplace,
        BongTangent,
        AlignYourSteps,
        LCMSpacing,
        Angles,
        Custom,
    ),
)


def spacing_named(name: str) -> Spacing:
    """The spacing with this name, with its defaults.

    Raises:
        ValueError: no spacing has this name.
    """
    by_name = {kind.model_fields["name"].default: kind for kind in SPACINGS}
    if name not in by_name:
        near = get_close_matches(name, by_name, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"spacing {name[:60]!r} is not known{hint}; allowed are: {', '.join(by_name)}."
        )
    return by_name[name].model_validate({})
