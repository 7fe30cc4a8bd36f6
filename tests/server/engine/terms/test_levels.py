"""Where stages lie in the diffusion process that a model was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from guidance import EluCD
from samplers import NoiseSchedule
from samplers.ddim import DDIM
from server.engine.terms.levels import levels_of


def test_levels_of_a_trained_schedule_are_its_betas() -> None:
    schedule = NoiseSchedule.from_diffusers({})
    plan = DDIM().plan(schedule.grid("trailing", 100))
    found = levels_of(plan, schedule)
    betas = np.linspace(1e-4, 0.02, 1000)
    # beta of step k is the change between the times k - 1 and k.
    expected = np.interp(plan.t[:-1] + 0.5, np.arange(1000), betas / betas.max())
    assert np.allclose(found.variance, expected, rtol=0.01)
    assert np.allclose(found.time, plan.t[:-1] / 999)
    assert np.array_equal(found.sigma, plan.sigma[:-1])


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.vp_linear(), NoiseSchedule.flow(), NoiseSchedule.edm()], ids=str
)
def test_levels_are_finite_on_every_kind_of_schedule(schedule: NoiseSchedule) -> None:
    found = levels_of(DDIM().plan(schedule.grid("trailing", 20)), schedule)
    assert np.isfinite(found.variance).all()
    assert (found.variance > 0).all()
    assert (found.variance <= 1).all()
    assert np.isfinite(EluCD(target={"a": "b"}).strengths(found)).all()
    assert (np.diff(found.time) < 0).all()
