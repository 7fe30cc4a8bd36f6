"""Parameters of the tests of all samplers: their variants, and schedules of every kind."""

from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from itertools import product
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import pytest
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from samplers import SAMPLERS, SPACINGS, Grid, NoiseSchedule, Sampler, Spacing
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.euler import EulerAncestral
from samplers.heavy_ball import GHVB, HB, MomentumSampler, Nesterov
from samplers.lms import LMS
from samplers.noise_schedule import DiscreteVP
from samplers.sa_solver import SASolver
from samplers.sa_solver_pece import SASolverPECE
from samplers.spacing import ListedSpacing
from samplers.spacings import spacing_named as spacing_named
from tests.covering import EVERY_CELL, covering

VP = NoiseSchedule.vp_linear()
DISCRETE = NoiseSchedule.from_diffusers({"beta_schedule": "linear"})
FLOW = NoiseSchedule.flow()
EDM = NoiseSchedule.edm()
TRIGFLOW = NoiseSchedule.trigflow()

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
    "trigflow": TRIGFLOW,
}

MAX_VARIANTS = 100
"""Number of combinations above which the numeric fields of a kind are varied one at a time."""
DISTILLED = ("lcm", "tcd")
"""Samplers for models distilled to few steps; they are not solvers, and their default spacing needs
whole trained timesteps."""
NONLINEAR = ("score_sde_pc",)
"""Samplers with nonlinear stages, whose moments do not follow from their matrices."""
CANCELLING: list[Sampler] = [
    SASolver.model_validate(
        {"tau": 0, "predictor_order": p, "corrector_order": c, "second_order": w}
    )
    for p, c, w in product((2, 3), (0, 2, 3), ("exact", "rounded"))
    if (p, c, w) == (2, 2, "exact") or (p == 3 and c != 2)
]
"""Solvers whose leading errors nearly cancel, so that there is no single slope at usual steps."""


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


COLD: list[Sampler] = [_v3(3, "none"), _v3(3, "exact"), LMS(order=4)]
"""Solvers whose first step, of order one and never corrected, dominates at usual steps."""
FAINT: list[Sampler] = [Nesterov(order=1.8, weights="variable"), _v3(2, "exact")]
"""Solvers with a leading error so small that the next power still dominates at usual steps."""
PUBLISHED: list[Sampler] = [
    kind(order=3.8, weights=weights)
    for kind in (HB, Nesterov, GHVB)
    for weights in ("constant", "variable")
]
"""Momentum samplers at their paper's order, which is neither the default nor a bound."""
SET_BY_HAND: dict[str, list[Any]] = {
    # These have an effect only with statistics of a model, as in test_dpm_solver_v3.
    "statistics": ["none"],
    "levels": ["asked"],
    "preset": ["best"],
    # At its bound, churn doubles the variance in every step, however short. The other fields, which
    # change where noise is added and how much, are tested in test_churn.
    "s_churn": [0.0, 6.0],
    "s_tmin": [0.0],
    "s_tmax": [None],
    "s_noise": [1.0],
}
"""Values to try for fields without meaningful bounds."""


def _choices(name: str, field: FieldInfo) -> list[Any]:
    """Values of a field to try: all literal values, or the default and both bounds."""
    if name in SET_BY_HAND:
        return SET_BY_HAND[name]
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
    if len(settings) > MAX_VARIANTS:
        number: tuple[Any, ...] = (int, float)
        numbers = [name for name, field in fields.items() if field.annotation in number]
        strays = ([s[name] != fields[name].default for name in numbers] for s in settings)
        settings = [s for s, stray in zip(settings, strays, strict=True) if sum(stray) <= 1]
    return [one for setting in settings if (one := _unless_refused(kind, setting)) is not None]


def _unless_refused(kind: type[BaseModel], setting: dict[str, Any]) -> Any:
    """The variant, or None where its fields are incompatible."""
    try:
        return kind(**setting)
    except ValidationError:
        return None


def label(setting: BaseModel) -> str:
    """A short name for test reports."""
    return "-".join(str(value) for _, value in setting)


def _says_nothing_new(sampler: Sampler) -> bool:
    """Whether a variant is equivalent to another one, or tested elsewhere.

    Pseudo derivatives are exact below order 3, and the fraction of an order is its beta. Without
    noise it does not matter where noise is drawn. Only weights of order 2 can be rounded. Other
    ways to lower the order are tested in test_step_order.
    """
    if isinstance(getattr(sampler, "lower_order_final", None), str):
        return True
    if isinstance(sampler, EulerAncestral) and sampler.eta == 0:
        return sampler.below == "level"
    if isinstance(sampler, SASolverPECE) and sampler.tau == 0:
        return sampler.noise == "throughout"
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

STEPS = (1, 2, 3, 5, 20, 50)
FEW_STEPS = (1, 3, 20)
EACH_KIND = ("vp_linear", "flow", "edm")
"""One schedule of each kind with continuous time."""
HARD = ("zero_snr", "flow_shifted", "edm")
"""Schedules that start at nearly pure noise, or have the largest range."""

S = TypeVar("S", Sampler, Spacing)


def fields_in_pairs(settings: Sequence[S]) -> list[S]:
    """Variants of each kind that cover every compatible pair of values."""
    kinds = dict.fromkeys(type(one) for one in settings)
    variants = ([one for one in settings if type(one) is kind] for kind in kinds)
    return [
        one
        for kind in variants
        for one in covering(kind, lambda one: [repr(value) for _, value in one], together=2)
    ]


def is_first(setting: Sampler | Spacing) -> bool:
    """Whether a variant is the first of its kind, which is combined with everything."""
    return setting is _FIRST[type(setting)]


_FIRST = {type(one): one for one in reversed([*VARIANTS, *SPACING_VARIANTS])}
FEW_VARIANTS: list[Sampler] = fields_in_pairs(VARIANTS)
FEW_SPACING_VARIANTS: list[Spacing] = fields_in_pairs(SPACING_VARIANTS)

_SEVERAL = SCHEDULES if EVERY_CELL else ("vp_linear", "zero_snr", "flow_shifted", "edm", "trigflow")
each_schedule = pytest.mark.parametrize(
    "schedule", [SCHEDULES[name] for name in _SEVERAL], ids=list(_SEVERAL)
)
"""One schedule of each class; all schedules in the full suite."""


def suits(sampler: Sampler, schedule: NoiseSchedule) -> bool:
    """Whether a sampler's default spacing supports a schedule; that of distilled ones may not."""
    return sampler.name not in DISTILLED or isinstance(schedule, DiscreteVP)


def over_schedules(
    settings: Sequence[S], names: Iterable[str], others: Iterable[str]
) -> list[tuple[S, NoiseSchedule]]:
    """The first variant of a kind with every schedule, and each other with one of its schedules.

    In the full suite, the others are combined with all of their schedules.
    """
    names, others = list(names), set(others)
    cells = (
        (one, name)
        for one in settings
        for name in names
        if is_first(one) or name in others
        if isinstance(one, Spacing) or suits(one, SCHEDULES[name])
    )

    def told_apart_by(cell: tuple[S, str]) -> Sequence[Hashable]:
        one, name = cell
        return [(label(one), name)] if is_first(one) else [label(one), name]

    return [(one, SCHEDULES[name]) for one, name in covering(cells, told_apart_by)]


def said(value: Sampler | Spacing | NoiseSchedule) -> str:
    """A name for test reports."""
    return _NAMES[value] if isinstance(value, NoiseSchedule) else label(value)


_NAMES = {schedule: name for name, schedule in SCHEDULES.items()}


def each_kind(**of_variants: Iterable[Any]) -> pytest.MarkDecorator:
    """One case per sampler or spacing, with its variants under the single name given.

    They are a list of variants, or of tuples that begin with a variant.
    """
    [(name, cells)] = of_variants.items()
    grouped: dict[str, list[Any]] = {}
    for cell in cells:
        variant = cell[0] if isinstance(cell, tuple) else cell
        grouped.setdefault(variant.name, []).append(cell)
    return pytest.mark.parametrize(name, grouped.values(), ids=grouped.keys())


PAIRS = over_schedules(FEW_VARIANTS, SCHEDULES, HARD)
LINEAR_PAIRS = over_schedules(
    [one for one in VARIANTS if one.name not in NONLINEAR], SCHEDULES, HARD
)
SPACING_PAIRS = over_schedules(FEW_SPACING_VARIANTS, SCHEDULES, SCHEDULES)

_LAYOUTS = covering(product(SCHEDULES.values(), DEFAULT_SPACINGS, STEPS), lambda cell: cell, 2)


def layouts(sampler: Sampler, schedule: NoiseSchedule) -> list[tuple[Spacing, int]]:
    """Spacings and numbers of steps with which to plan a variant.

    Over all schedules, the first variant of a kind is combined with every pair of spacing, number
    of steps and schedule; the others have two spacings. The full suite has all combinations.
    """
    if EVERY_CELL or is_first(sampler):
        return [(spacing, steps) for on, spacing, steps in _LAYOUTS if on is schedule]
    spacings = (spacing_named(sampler.default_spacing), spacing_named("karras"))
    return list(product(spacings, FEW_STEPS))


def may_refuse(spacing: Spacing, schedule: NoiseSchedule) -> bool:
    """Whether a spacing is made for other schedules, or lists its own steps."""
    if isinstance(spacing, ListedSpacing):
        return True
    return spacing.integer_timesteps and not schedule.whole_timesteps


@cache
def grid_unless_refused(schedule: NoiseSchedule, spacing: Spacing, steps: int) -> Grid | None:
    """The grid, or None where the spacing refuses the schedule or the number of steps."""
    try:
        return schedule.grid(spacing, steps)
    except ValueError:
        return None
