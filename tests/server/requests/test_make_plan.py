"""Settings that allow no plan are refused, with an error that names the field to change."""

import sys
from typing import Any, ClassVar, Literal

import pytest
from typing_extensions import override

from samplers import DDIM, SPACINGS, DPMSolverV3, Grid, LCMSpacing, Plan, Sampler, Spacing, Trailing
from samplers.lcm import LCM
from server.errors import InvalidRequest, WeftError
from server.requests.choice import name_of
from server.requests.resolve import make_plan
from tests.server.toy_model import SCHEDULE


class Reluctant(DDIM, frozen=True):
    """A sampler of another package, which does not name the field."""

    summary: ClassVar[str] = "For tests."
    name: Literal["reluctant"] = "reluctant"  # type: ignore[assignment]

    @override
    def plan(self, grid: Grid) -> Plan:
        raise ValueError("steps would do, but not for this sampler.")


class Barren(Trailing, frozen=True):
    """A spacing of another package, which does not name the field."""

    name: Literal["barren"] = "barren"  # type: ignore[assignment]

    @override
    def evaluated(self, schedule: Any, steps: int) -> Any:
        raise ValueError("sampler or not, there are no such times.")


def spacing(name: str, **fields: Any) -> Spacing:
    return next(kind for kind in SPACINGS if name_of(kind) == name).model_validate(fields)


@pytest.mark.parametrize(
    ("sampler", "layout", "steps", "strength", "field"),
    [
        (
            DPMSolverV3(statistics="none", levels="statistics"),
            Trailing(),
            4,
            None,
            "sampler.levels",
        ),
        (DPMSolverV3(), Trailing(), 4, None, "sampler.statistics"),
        (DDIM(), spacing("custom"), 4, None, "spacing.times"),
        (DDIM(), spacing("custom", times=(5.0, 1.0)), 4, None, "steps"),
        (DDIM(), spacing("align_your_steps", table="svd"), 4, None, "spacing.table"),
        (DDIM(), Trailing(), 2000, None, "steps"),
        (DDIM(), Trailing(), 4, 0.1, "strength"),
        (Reluctant(), Trailing(), 4, None, "sampler"),
        (DDIM(), Barren(), 4, None, "spacing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_plan_names_the_field_to_change(
    sampler: Sampler, layout: Spacing, steps: int, strength: float | None, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_plan(SCHEDULE, sampler, layout, steps, strength)
    assert caught.value.field == field


def test_a_spacing_that_needs_whole_timesteps_is_the_field_itself() -> None:
    schedule = SCHEDULE.flow()
    with pytest.raises(InvalidRequest, match="needs a model with whole trained") as caught:
        make_plan(schedule, LCM(), LCMSpacing(), 4, None)
    assert caught.value.field == "spacing"


class Broken(Reluctant, frozen=True):
    @override
    def plan(self, grid: Grid) -> Plan:
        raise KeyError("not told to clients")


class StaleInputs(Barren, frozen=True):
    @override
    def evaluated(self, schedule: Any, steps: int) -> Any:
        raise KeyError("not told to clients")


class Leaving(Reluctant, frozen=True):
    """Raises what would end the server."""

    @override
    def plan(self, grid: Grid) -> Plan:
        sys.exit("not told to clients")


@pytest.mark.parametrize(
    ("sampler", "layout", "said"),
    [
        (Broken(), Trailing(), "sampler 'reluctant' failed with KeyError"),
        (Leaving(), Trailing(), "sampler 'reluctant' failed with SystemExit"),
        (DDIM(), StaleInputs(), "spacing 'barren' failed with KeyError"),
    ],
    ids=["sampler", "exit", "spacing"],
)
def test_a_part_that_breaks_is_named(sampler: Sampler, layout: Spacing, said: str) -> None:
    said = f"^The {said}; the server's log has the details.$"
    with pytest.raises(WeftError, match=said):
        make_plan(SCHEDULE, sampler, layout, 4, None)
