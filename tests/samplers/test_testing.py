"""The checks for authors of samplers: each detects its defect and reports it."""

from typing import ClassVar, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from typing_extensions import override

from samplers import (
    DDIM,
    LCM,
    SPACINGS,
    Columns,
    Grid,
    NoiseSchedule,
    Plan,
    Sampler,
    Trailing,
    UniPC,
)
from samplers.levels import Levels
from samplers.testing import SlopeRange, check_sampler, check_spacing


class Broken(Sampler, frozen=True):
    """Euler's method with a selectable defect."""

    summary: ClassVar[str] = "Broken."
    source: ClassVar[str] = "None."
    name: Literal["broken"] = "broken"
    defect: ClassVar[str] = ""

    @property
    @override
    def convergence_order(self) -> int:
        return 2 if self.defect == "order" else 1

    @property
    @override
    def evaluations_per_step(self) -> int:
        return 2 if self.defect == "evaluations" else 1

    @override
    def plan(self, grid: Grid) -> Plan:
        columns = Columns("x", "stored")
        x, D = columns["x"], columns.denoised
        tables: list[np.ndarray] = []
        for i in range(grid.steps):
            if self.defect == "moves" and i:
                # A point that was stored before guidance could move it.
                x = columns["stored"]
            landing = grid.alpha[i + 1] * D
            landing = landing + grid.sigma[i + 1] * (x - grid.alpha[i] * D) / grid.sigma[i]
            if self.defect == "landing":
                landing = landing + 1e-3 * x
            if self.defect == "noise":
                landing = landing + grid.sigma[i + 1] * columns.noise
            tables.append(columns.table(x=landing, stored=landing))
        if self.defect == "finite":
            tables[0] = tables[0] / 0.0
        return Plan.of_steps(grid, tables)


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("order", r"declares order 2; its error falls with the power (0\.9|1\.0)"),
        ("evaluations", "with 2 steps declares 3 evaluations; its plan has 2"),
        ("noise", "declares stochastic = False, but its plan draws noise"),
        ("landing", "misses the denoised picture by"),
        ("moves", "its history must move with x"),
        ("finite", "with 1 steps on .*: its tables are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_a_broken_promise_is_named(
    defect: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "defect", defect)
    with pytest.raises(AssertionError, match=sentence):
        check_sampler(Broken())


def test_missing_texts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "summary", "")
    with pytest.raises(AssertionError, match="Broken has no summary"):
        check_sampler(Broken())


def test_samplers_that_keep_their_promises_pass() -> None:
    check_sampler(Broken())
    check_sampler(DDIM(eta=1.0))
    check_sampler(UniPC(order=3, lower_order_final=False))
    whole = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"})
    check_sampler(LCM(), [SlopeRange(whole, 999.0, 20.0)])


class Bent(Trailing, frozen=True):
    """Even steps with a selectable defect."""

    summary: ClassVar[str] = "Bent."
    defect: ClassVar[str] = ""

    @override
    def evaluated(self, schedule: Levels, steps: int) -> NDArray[np.float64]:
        return self.fill(schedule, steps, schedule.t_start, schedule.t_end)

    @override
    def fill(
        self, schedule: Levels, count: int, t_start: float, t_end: float
    ) -> NDArray[np.float64]:
        times = np.linspace(t_start, t_end, count)
        match self.defect:
            case "count":
                return times[:1]
            case "rising":
                return times[::-1]
            case "beyond":
                return times * 1.1
            case "ends":
                return np.linspace(t_start, (t_start + t_end) / 2, count)
            case _:
                return times


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("count", r"with 1 steps on .* gave times of shape \(1,\); it must give 2"),
        ("rising", r"with 1 steps on .*: timesteps go from 0.02 to 1; each must be below"),
        ("beyond", r"with 1 steps on .*: t holds 1.1; this schedule has times from 1 down to 0"),
        ("ends", r"with 1 steps on .*: it fills 1 to 0.51, not 1 to 0.02"),
    ],
)
def test_a_broken_promise_of_a_spacing_is_named(
    defect: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bent, "defect", defect)
    with pytest.raises(AssertionError, match=sentence):
        check_spacing(Bent())


def test_spacings_that_fill_a_range_pass() -> None:
    check_spacing(Bent())
    refused = {"custom", "align_your_steps", "lcm", "angles"}
    for kind in SPACINGS:
        if kind.model_fields["name"].default not in refused:
            check_spacing(kind.model_validate({}))
