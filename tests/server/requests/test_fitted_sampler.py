"""A user's own sampler that uses statistics is served as it declares."""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
from typing_extensions import override

from samplers import (
    DDIM,
    SAMPLERS,
    DPMSolverV3,
    FittedSampler,
    Grid,
    NoiseSchedule,
    Plan,
    Sampler,
    Statistics,
    StatisticsIdentity,
    Trailing,
)
from samplers.statistics import schedule_fingerprint
from server.errors import InvalidRequest
from server.models.folder import statistics_file
from server.models.statistics import ModelStatistics
from server.requests.adapters import WeightedName
from server.requests.catalog import catalog
from server.requests.choice import name_of
from server.requests.resolve import make_plan, statistics_for
from server.requests.schema import ResolvedRequest, default_guidance

SCHEDULE = NoiseSchedule.from_diffusers({})


class Halved(FittedSampler, frozen=True):
    """DDIM whose results show the number that its statistics are filled with."""

    summary: ClassVar[str] = "For tests."
    source: ClassVar[str] = "None."
    name: Literal["halved"] = "halved"

    @property
    @override
    def convergence_order(self) -> int:
        return 1

    @override
    def plan(self, grid: Grid, statistics: Statistics | None = None) -> Plan:
        plan = DDIM().plan(grid)
        scale = 1.0 if statistics is None else float(statistics.l.mean())
        return Plan.of_steps(grid, list(scale * plan.tables))


@pytest.fixture
def statistics(tmp_path: Path) -> ModelStatistics:
    identity = StatisticsIdentity(
        "m", schedule_fingerprint(SCHEDULE), 999.0, 0.0, "cfg", 4.0, (4, 2, 2), samples=8, points=3
    )
    halves = np.full((3, 4, 2, 2), 0.5)
    file = statistics_file(tmp_path, "cfg", 4.0)
    Statistics(np.arange(3.0), halves, halves, halves, identity).save(file)
    return ModelStatistics.of(tmp_path, "m", SCHEDULE)


class Model:
    """The part of a hosted model that provides statistics."""

    def __init__(self, statistics: ModelStatistics) -> None:
        self.statistics = statistics


def resolved(sampler: Sampler, scale: float) -> ResolvedRequest:
    settings = {
        "prompt": "",
        "negative_prompt": "",
        "model": "m",
        "width": 16,
        "height": 16,
        "steps": 4,
        "seed": 0,
        "n": 1,
        "sampler": "ddim",
        "spacing": "trailing",
        "guidance": {"name": "cfg", "scale": scale},
        "strength": None,
        "output_format": "png",
        "stream": False,
    }
    return ResolvedRequest.model_validate(settings).model_copy(update={"sampler": sampler})


def test_its_default_guidance_is_what_there_are_statistics_of() -> None:
    assert default_guidance(Halved()).name == "cfg"
    assert default_guidance(Halved(statistics="nearest")) == default_guidance(DPMSolverV3())
    # Without statistics, nothing restricts the guidance.
    assert default_guidance(Halved(statistics="none")) == default_guidance(DDIM())
    assert default_guidance(DDIM()).name == "apg"


def test_it_gets_the_statistics_that_it_names(statistics: ModelStatistics) -> None:
    def found(sampler: Sampler, scale: float) -> StatisticsIdentity | None:
        return statistics_for(resolved(sampler, scale), Model(statistics))  # type: ignore[arg-type]

    identity = found(Halved(), 4.0)
    assert identity is not None
    assert identity.scale == 4.0
    assert found(Halved(statistics="nearest"), 9.0) == identity
    assert found(Halved(statistics="none"), 4.0) is None
    assert found(DDIM(), 4.0) is None
    with pytest.raises(InvalidRequest, match=r"this model has no statistics for guidance 'cfg 3'"):
        found(Halved(), 3.0)
    given = statistics.load(identity, (4, 2, 2))
    fitted, plain = (
        make_plan(SCHEDULE, Halved(), Trailing(), 4, None, one).tables for one in (given, None)
    )
    np.testing.assert_allclose(fitted, 0.5 * plain)


def test_an_adapter_of_weight_0_leaves_the_statistics_of_the_model(
    statistics: ModelStatistics,
) -> None:
    unchanged = {"adapters": (WeightedName(name="ink", weight=0),)}
    request = resolved(Halved(), 4.0).model_copy(update=unchanged)
    identity = statistics_for(request, Model(statistics))  # type: ignore[arg-type]
    assert identity is not None
    assert identity.scale == 4.0


def test_the_catalog_tells_who_uses_statistics() -> None:
    using = {e.name for e in catalog().samplers if e.properties["uses_statistics"]}
    assert using == {name_of(kind) for kind in SAMPLERS if issubclass(kind, FittedSampler)}
    assert "dpm_solver_v3" in using
