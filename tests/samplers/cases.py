"""What the tests of all samplers run over: their variants, and schedules of every kind."""

from itertools import product
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from samplers import SAMPLERS, SPACINGS, Grid, NoiseSchedule, Sampler, Spacing
from samplers.noise_schedule import DiscreteVP
from samplers.spacing import ListedSpacing
from samplers.spacings import spacing_named as spacing_named

VP = NoiseSchedule.vp_linear()
DISCRETE = NoiseSchedule.from_diffusers({"beta_schedule": "linear"})
FLOW = NoiseSchedule.flow()
EDM = NoiseSchedule.edm()

SCHEDULES: dict[str, NoiseSchedule] = {
    "vp_linear": VP,
    "linear": DISCRETE,
    "scaled_linear": NoiseSchedule.from_diffusers(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ),
    "cosine": NoiseSchedule.from_diffusers({"beta_schedule": "squaredcos_cap_v2"}),
    "zero_snr": NoiseSchedule.from_diffusers({"rescale_betas_zero_snr": True}),
    "flow": FLOW,
    "flow_shifted": NoiseSchedule.flow(shift=12.0),
    "edm": EDM,
}


def _choices(field: FieldInfo) -> list[Any]:
    """Values of a field to try: all named ones, or the default and both bounds."""
    if get_origin(field.annotation) is Literal:
        return list(get_args(field.annotation))
    if field.annotation is bool:
        return [False, True]
    bounds = [b.ge if isinstance(b, Ge) else b.le for b in field.metadata if isinstance(b, Ge | Le)]
    return list(dict.fromkeys([field.default, *bounds]))


def _variants(kind: type[BaseModel]) -> list[Any]:
    names = list(kind.model_fields)
    values = product(*(_choices(field) for field in kind.model_fields.values()))
    return [kind(**dict(zip(names, value, strict=True))) for value in values]


def label(setting: BaseModel) -> str:
    """A short name for the report of a test."""
    return "-".join(str(value) for _, value in setting)


VARIANTS: list[Sampler] = [one for kind in SAMPLERS for one in _variants(kind)]
SPACING_VARIANTS: list[Spacing] = [one for kind in SPACINGS for one in _variants(kind)]
DEFAULT_SPACINGS: list[Spacing] = [kind.model_validate({}) for kind in SPACINGS]

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
each_variant = pytest.mark.parametrize("sampler", VARIANTS, ids=label)
each_spacing = pytest.mark.parametrize("spacing", SPACING_VARIANTS, ids=label)


def suits(sampler: Sampler, schedule: NoiseSchedule) -> bool:
    """Whether a sampler takes a schedule: all do, but those made for distilled models."""
    return sampler.name != "lcm" or isinstance(schedule, DiscreteVP)


each_pair = pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        pytest.param(sampler, schedule, id=f"{label(sampler)}-{name}")
        for sampler in VARIANTS
        for name, schedule in SCHEDULES.items()
        if suits(sampler, schedule)
    ],
)


def may_refuse(spacing: Spacing, schedule: NoiseSchedule) -> bool:
    """Whether a spacing is made for other schedules, or for steps that it lists."""
    if isinstance(spacing, ListedSpacing):
        return True
    return spacing.integer_timesteps and not schedule.whole_timesteps


def grid_unless_refused(schedule: NoiseSchedule, spacing: Spacing, steps: int) -> Grid | None:
    """The grid, or none where the spacing refuses the schedule or so many steps."""
    try:
        return schedule.grid(spacing, steps)
    except ValueError:
        return None
