"""Inversion compared with closed forms; it is exact where the noises do not depend on x."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from guidance.inversion import invert
from samplers import Grid, NoiseSchedule
from samplers.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from samplers.timesteps import LogSNR
from tests.covering import few_of

SCHEDULE = NoiseSchedule.vp_linear()
PICTURE = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).view(1, 1, 1, 7)
Kind = Literal["cfg_plus_plus", "cfg"]
each_rule = pytest.mark.parametrize("rule", ["cfg_plus_plus", "cfg"])


def grid_of(steps: int) -> Grid:
    return SCHEDULE.grid(LogSNR(), steps, t_start=SCHEDULE.t_start, t_end=2e-2)


class Model:
    """A mixture; the prompt's prediction is the same with its noise shifted by a constant."""

    def __init__(self, data: GaussianDenoiser | GaussianMixtureDenoiser, shift: float) -> None:
        self.data = data
        self.shift = shift

    def __call__(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = (float(level) for level in SCHEDULE.level(np.array(t)))
        other = self.data(x, t)
        return other + self.shift * sigma / alpha * torch.tanh(2 * x), other


def regenerate(model: Model, x: Tensor, grid: Grid, scale: float, rule: Kind) -> Tensor:
    """DDIM under the rule, as published: denoise guided, renoise with eps_u or eps_l."""
    for i in range(grid.steps):
        a, s, a2, s2 = grid.alpha[i], grid.sigma[i], grid.alpha[i + 1], grid.sigma[i + 1]
        cond, other = ((x - a * D) / s for D in model(x, float(grid.t[i])))
        guided = other + scale * (cond - other)
        x = a2 * (x - s * guided) / a + s2 * (other if rule == "cfg_plus_plus" else guided)
    return x


def missed(model: Model, steps: int, scale: float, rule: Kind, corrections: int = 0) -> float:
    grid = grid_of(steps)
    start = invert(model, PICTURE, grid, scale=scale, rule=rule, corrections=corrections)
    return float((regenerate(model, start, grid, scale, rule) - PICTURE).norm() / PICTURE.norm())


@each_rule
@pytest.mark.parametrize("scale", few_of([0.0, 0.6, 1.0], [0.6]))
def test_noises_that_do_not_depend_on_x_come_back_exactly(rule: Kind, scale: float) -> None:
    grid = grid_of(12)

    class Fixed(Model):
        def __call__(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            alpha, sigma = (float(level) for level in SCHEDULE.level(np.array(t)))
            eps_u, eps_c = np.sin(5 * t), np.cos(3 * t)
            return (x - sigma * eps_c) / alpha, (x - sigma * eps_u) / alpha

    model = Fixed(GaussianDenoiser(SCHEDULE), 0)
    start = invert(model, PICTURE, grid, scale=scale, rule=rule)
    back = regenerate(model, start, grid, scale, rule)
    torch.testing.assert_close(back, PICTURE, rtol=1e-10, atol=1e-10)


@each_rule
def test_one_step_is_the_published_formula(rule: Kind) -> None:
    model, grid = Model(GaussianDenoiser(SCHEDULE, 0.2, 0.5), 0.3), grid_of(1)
    (a, a2), (s, s2) = grid.alpha, grid.sigma
    cond, other = ((PICTURE - a * D) / s for D in model(PICTURE, float(grid.t[0])))
    guided = other + 0.6 * (cond - other)
    x0 = (PICTURE - s2 * (other if rule == "cfg_plus_plus" else guided)) / a2
    found = invert(model, PICTURE, grid, scale=0.6, rule=rule)
    torch.testing.assert_close(found, a * x0 + s * guided)


def test_unguided_inversion_finds_the_exact_flow() -> None:
    """At scale 0 both rules are plain DDIM inversion, which is of first order."""
    data = GaussianMixtureDenoiser(SCHEDULE)
    errors = []
    for steps in (100, 200):
        grid = grid_of(steps)
        found = invert(Model(data, 0.5), PICTURE, grid, scale=0)
        exact = data.transport(PICTURE, float(grid.t[-1]), float(grid.t[0]))
        errors.append(float((found - exact).norm()))
    assert 1.7 < errors[0] / errors[1] < 2.3


@each_rule
def test_corrections_make_the_inversion_exact(rule: Kind) -> None:
    model = Model(GaussianMixtureDenoiser(SCHEDULE), 0.05)
    errors = [missed(model, 40, 0.6, rule, corrections) for corrections in (0, 2, 60)]
    assert errors[0] > 10 * errors[1]
    assert errors[2] < 1e-10


def test_cfg_plus_plus_inverts_as_cfg_with_a_scale_of_each_step() -> None:
    """The scale is ``scale / (1 - rho' / rho)``, rho = sigma / alpha; equal up to rounding."""
    model, grid = Model(GaussianMixtureDenoiser(SCHEDULE), 0.2), grid_of(20)
    x, rho = PICTURE, grid.sigma / grid.alpha
    for i in reversed(range(20)):
        step = Grid(SCHEDULE, grid.t[i : i + 2], grid.alpha[i : i + 2], grid.sigma[i : i + 2])
        x = invert(model, x, step, scale=0.6 / (1 - rho[i + 1] / rho[i]), rule="cfg")
    torch.testing.assert_close(invert(model, PICTURE, grid, scale=0.6), x, rtol=1e-10, atol=1e-10)


def test_cfg_plus_plus_comes_back_closer_than_cfg_of_the_scale_it_is_compared_with() -> None:
    """The authors compare .6 with 7.5; in 20 steps it corresponds to 2."""
    model = Model(GaussianMixtureDenoiser(SCHEDULE), 0.05)
    ours, plain = missed(model, 20, 0.6, "cfg_plus_plus"), missed(model, 20, 7.5, "cfg")
    assert ours < plain / 2


def test_fewer_than_no_corrections_are_refused() -> None:
    with pytest.raises(ValueError, match="corrections is -1; it must be at least 0"):
        invert(Model(GaussianDenoiser(SCHEDULE), 0), PICTURE, grid_of(2), scale=0, corrections=-1)
