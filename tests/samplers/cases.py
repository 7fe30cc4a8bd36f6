"""What the tests of all samplers run over: their variants, and schedules of every kind."""

from itertools import product
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from samplers import SAMPLERS, SPACINGS, Grid, NoiseSchedule, Sampler, Spacing
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.heavy_ball import GHVB, HB, MomentumSampler, Nesterov
from samplers.noise_schedule import DiscreteVP
from samplers.sa_solver import SASolver
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

MOST_VARIANTS = 100
"""A kind with more combinations has its numbers tried one at a time."""
DISTILLED = ("lcm", "tcd")
"""Samplers for models distilled to few steps: no solvers, and for whole trained timesteps alone."""
NONLINEAR = ("score_sde_pc",)
"""Samplers with stages that are no matrix, whose moments no matrix tells."""
CANCELLING: list[Sampler] = [
    SASolver.model_validate(
        {"tau": 0, "predictor_order": p, "corrector_order": c, "second_order": w}
    )
    for p, c, w in product((2, 3), (0, 2, 3), ("exact", "rounded"))
    if (p, c, w) == (2, 2, "exact") or (p == 3 and c != 2)
]
"""Solvers whose leading errors all but cancel, so that no one slope shows at usual steps."""


def _v3(order: int, corrector: str) -> Sampler:
    return DPMSolverV3.model_validate(
        {
            "order": order,
            "predictor": "exact",
            "corrector": corrector,
            "lower_order_final": False,
            "statistics": "none",
        }
    )


COLD: list[Sampler] = [_v3(3, "none"), _v3(3, "exact")]
"""Solvers whose first step, of order one and never corrected, hides the slope at usual steps."""
FAINT: list[Sampler] = [Nesterov(order=1.8, weights="variable"), _v3(2, "exact")]
"""Solvers with so small a leading error that the next power still shows at usual steps."""
PUBLISHED: list[Sampler] = [
    kind(order=3.8, weights=weights)
    for kind in (HB, Nesterov, GHVB)
    for weights in ("constant", "variable")
]
"""Momentum at the order of its paper, which is neither the default nor a bound."""
WITHOUT_STATISTICS: dict[str, str] = {"statistics": "none", "levels": "asked", "preset": "best"}
"""Fields that act where a model's statistics are given, as test_dpm_solver_v3 gives them."""


def _choices(name: str, field: FieldInfo) -> list[Any]:
    """Values of a field to try: all named ones, or the default and both bounds."""
    if name in WITHOUT_STATISTICS:
        return [WITHOUT_STATISTICS[name]]
    annotation: Any = field.annotation
    if NoneType in get_args(annotation):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [False, True]
    bounds = [b.ge if isinstance(b, Ge) else b.le for b in field.metadata if isinstance(b, Ge | Le)]
    return list(dict.fromkeys([field.default, *bounds]))


def _variants(kind: type[BaseModel]) -> list[Any]:
    fields = kind.model_fields
    values = product(*(_choices(*field) for field in fields.items()))
    settings = [dict(zip(fields, value, strict=True)) for value in values]
    if len(settings) > MOST_VARIANTS:
        number: tuple[Any, ...] = (int, float)
        numbers = [name for name, field in fields.items() if field.annotation in number]
        strays = ([s[name] != fields[name].default for name in numbers] for s in settings)
        settings = [s for s, stray in zip(settings, strays, strict=True) if sum(stray) <= 1]
    return [one for setting in settings if (one := _unless_refused(kind, setting)) is not None]


def _unless_refused(kind: type[BaseModel], setting: dict[str, Any]) -> Any:
    """The variant, or none where its fields do not go together."""
    try:
        return kind(**setting)
    except ValidationError:
        return None


def label(setting: BaseModel) -> str:
    """A short name for the report of a test."""
    return "-".join(str(value) for _, value in setting)


def _says_nothing_new(sampler: Sampler) -> bool:
    """Pseudo derivatives are exact below order 3; the fraction of an order is its beta.

    Rounded weights are those of order 2 alone.
    """
    if isinstance(sampler, MomentumSampler):
        return sampler.beta in (1, sampler.order)
    if isinstance(sampler, SASolver) and sampler.second_order == "rounded":
        return 2 not in (sampler.predictor_order, sampler.corrector_order)
    return getattr(sampler, "predictor", None) == "pseudo" and getattr(sampler, "order", 3) < 3


VARIANTS: list[Sampler] = [
    *(one for kind in SAMPLERS for one in _variants(kind) if not _says_nothing_new(one)),
    *PUBLISHED,
]
SPACING_VARIANTS: list[Spacing] = [one for kind in SPACINGS for one in _variants(kind)]
DEFAULT_SPACINGS: list[Spacing] = [kind.model_validate({}) for kind in SPACINGS]

HARD = ("zero_snr", "flow_shifted", "edm")
"""One schedule of each kind: those that begin at nearly pure noise, or reach furthest."""

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
each_variant = pytest.mark.parametrize("sampler", VARIANTS, ids=label)
each_spacing = pytest.mark.parametrize("spacing", SPACING_VARIANTS, ids=label)


def suits(sampler: Sampler, schedule: NoiseSchedule) -> bool:
    """Whether a sampler takes a schedule: all do, but those made for distilled models."""
    return sampler.name not in DISTILLED or isinstance(schedule, DiscreteVP)


def _pairs(samplers: list[Sampler]) -> list[Any]:
    """A sampler's first variant with every schedule, its others with the hardest ones."""
    first = {sampler.name: sampler for sampler in reversed(samplers)}
    return [
        pytest.param(sampler, schedule, id=f"{label(sampler)}-{name}")
        for sampler in samplers
        for name, schedule in SCHEDULES.items()
        if suits(sampler, schedule) and (sampler is first[sampler.name] or name in HARD)
    ]


each_pair = pytest.mark.parametrize(("sampler", "schedule"), _pairs(VARIANTS))
each_linear_pair = pytest.mark.parametrize(
    ("sampler", "schedule"), _pairs([one for one in VARIANTS if one.name not in NONLINEAR])
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
