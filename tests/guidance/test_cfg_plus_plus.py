"""CFG++ with DDIM compared with its published form, and the effect of moving x."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from guidance import Rows, Rule, guide
from guidance.cfg import CFG
from guidance.cfg_plus_plus import CFGPlusPlus
from samplers import Grid, Karras, NoiseSchedule, Plan, Sampler, advance, integrate
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.restart import Restart
from samplers.score_sde_pc import ScoreSDEPC
from samplers.timesteps import Trailing
from samplers.unipc import UniPC
from tests.covering import spread
from tests.guidance.cases import apply
from tests.samplers.cases import VARIANTS, label, suits

SCHEDULES = {
    "vp": NoiseSchedule.from_diffusers({}),
    "flow": NoiseSchedule.flow(),
    "edm": NoiseSchedule.edm(),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())

START = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cond(x: Tensor) -> Tensor:
    return torch.tanh(0.7 * x + 0.2)


def other(x: Tensor) -> Tensor:
    return torch.tanh(0.5 * x - 0.3)


def run(plan: Plan, rule_at: Callable[[int], Rule]) -> Tensor:
    """A guided run as in the engine: the rule may move the point from which a step is made."""
    K = plan.slots
    columns = START.new_zeros(2, K + 2, 3, 2, 2)
    columns[:, 0] = START * plan.start_scale
    scalar = START.new_ones(2, 1, 1, 1)
    for i, table in enumerate(plan.tables):
        x = columns[:, 0].clone()
        alpha, sigma = plan.alpha[i] * scalar, plan.sigma[i] * scalar
        opens, closes = scalar * plan.opens_step(i) > 0, scalar * plan.closes_step(i) > 0
        rows = Rows(
            cond(x), other(x)[:, None], x, alpha, sigma, 0 * scalar, x[:, None, :0], opens, closes
        )
        guided = apply(rule_at(i), rows)
        columns[:, 0], columns[:, K] = guided.x, guided.denoised
        columns[:, :K] = advance(columns, torch.from_numpy(table).expand(2, *table.shape))
    return columns[:, 0]


def published(grid: Grid, lam: float) -> Tensor:
    """Algorithm 2: denoise with the guided noise, renoise with the unconditional one."""
    x = START * grid.start_scale
    for a, s, a2, s2 in zip(
        grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:], strict=True
    ):
        eps_u, eps_c = (x - a * other(x)) / s, (x - a * cond(x)) / s
        eps = eps_u + lam * (eps_c - eps_u)
        x = a2 * (x - s * eps) / a + s2 * eps_u
    return x


@pytest.mark.parametrize(("schedule", "lam"), spread(SCHEDULES.values(), [0.0, 0.2, 0.6, 1.0]))
def test_under_ddim_it_is_the_published_two_lines(schedule: NoiseSchedule, lam: float) -> None:
    # The published form divides by alpha, so it cannot start at pure noise.
    grid = schedule.grid(Trailing(), 9, t_start=0.9 * schedule.t_start)
    ours = run(DDIM().plan(grid), lambda _: CFGPlusPlus(scale=lam))
    torch.testing.assert_close(ours, published(grid, lam), rtol=1e-10, atol=1e-10)


def test_it_acts_on_pure_noise_too() -> None:
    grid = SCHEDULES["flow"].grid(Trailing(), 9)
    nearly = np.append(1 - 1e-9, grid.t[1:-1])
    near = Grid.on_times(SCHEDULES["flow"], nearly, clean=True)
    ours, limit = (run(DDIM().plan(g), lambda _: CFGPlusPlus()) for g in (grid, near))
    torch.testing.assert_close(ours, limit, rtol=1e-5, atol=1e-5)


@each_schedule
def test_under_ddim_it_is_cfg_with_a_scale_of_each_step(schedule: NoiseSchedule) -> None:
    """w_i = lam / (1 - rho' / rho), with rho = sigma / alpha."""
    grid = schedule.grid(Trailing(), 9)
    with np.errstate(divide="ignore"):
        rho = grid.sigma / grid.alpha
    scales = 0.6 / (1 - rho[1:] / rho[:-1])
    plan = DDIM().plan(grid)
    torch.testing.assert_close(
        run(plan, lambda _: CFGPlusPlus(scale=0.6)),
        run(plan, lambda i: CFG(scale=scales[i])),
        rtol=1e-10,
        atol=1e-10,
    )


def test_the_move_is_the_unconditional_noise_whatever_the_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    x, c, u = torch.randn(3, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    scalar = x.new_ones(4, 1, 1, 1)
    levels = 0.6 * scalar, 0.8 * scalar, 0 * scalar
    rows = Rows(c, u[:, None], x, *levels, x[:, None, :0], scalar > 0, scalar > 0)
    guided = apply(CFGPlusPlus(scale=0.7), rows)
    torch.testing.assert_close((guided.x - 0.6 * guided.denoised) / 0.8, (x - 0.6 * u) / 0.8)


def test_inversion_from_a_cleaner_level_returns_to_the_start() -> None:
    """x0 = (x - sigma' eps_u) / alpha', x_t = alpha x0 + sigma eps_l, on equal predictions."""
    grid = SCHEDULES["vp"].grid(Trailing(), 9, t_start=900, t_end=500)
    a, s, a2, s2 = grid.alpha[0], grid.sigma[0], grid.alpha[1], grid.sigma[1]
    eps_u, eps_c = 0.3 * torch.ones_like(START), -0.2 * torch.ones_like(START)
    eps = eps_u + 0.6 * (eps_c - eps_u)
    x = a2 * (START - s * eps) / a + s2 * eps_u
    torch.testing.assert_close(a * (x - s2 * eps_u) / a2 + s * eps, START)


@pytest.mark.parametrize(
    "sampler",
    [DPMSolverPP(order=2), DPMSolverPP(order=3), UniPC(order=1), UniPC(order=2), UniPC(order=3)],
    ids=str,
)
def test_on_predictions_that_never_change_every_multistep_sampler_makes_the_same_steps(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With constant predictions they equal DDIM, and must renoise in the same way."""
    monkeypatch.setitem(globals(), "cond", lambda x: torch.full_like(x, 0.4))
    monkeypatch.setitem(globals(), "other", lambda x: torch.full_like(x, -0.1))
    grid = SCHEDULES["vp"].grid(Trailing(), 9, t_start=990.0, t_end=300.0)
    ours, ddim = (run(s.plan(grid), lambda _: CFGPlusPlus()) for s in (sampler, DDIM()))
    torch.testing.assert_close(ours, ddim, rtol=1e-10, atol=1e-10)


FIRST = {sampler.name: sampler for sampler in reversed(VARIANTS)}
STAGED: list[Sampler] = [
    DPMSolverPPSinglestep(order=3),
    DPMSolverPPSinglestep(order=2, eta=1.0),
    ScoreSDEPC(corrector_steps=2),
    Restart(base="dpm_solver_pp", restarts=2),
    Restart(base="euler"),
]
MOVED = [*FIRST.values(), *STAGED]
"""A variant of each sampler, and more of those whose steps take several evaluations."""


def constant_run(plan: Plan, start: float) -> tuple[Tensor, int]:
    """The result of a run with constant predictions Dc = 1 and Du = 0, and its number of moves."""
    stage = moves = 0

    def denoise(x: Tensor, _: float) -> Tensor:
        nonlocal stage, moves
        ones = torch.ones_like(x)
        level = float(plan.alpha[stage]), float(plan.sigma[stage])
        opens = plan.opens_step(stage)
        guided = guide(CFGPlusPlus(scale=0.6), ones, [0 * ones], x, *level, opens_step=opens)
        moves += not torch.equal(guided.x, x)
        stage += 1
        x.copy_(guided.x)
        return guided.denoised

    x = torch.full((1, 1), start, dtype=torch.float64)
    return integrate(plan, denoise, x, lambda _: torch.zeros_like(x)), moves


@pytest.mark.parametrize("sampler", [one for one in MOVED if one.stochastic], ids=label)
def test_x_is_moved_once_a_step(sampler: Sampler) -> None:
    """For the other samplers this follows from the closed form below."""
    for schedule, steps in product(SCHEDULES.values(), (1, 2, 5)):
        if suits(sampler, schedule):
            plan = sampler.plan(schedule.grid(Trailing(), steps, t_start=0.9 * schedule.t_start))
            assert constant_run(plan, 0.5)[1] == plan.steps == sampler.steps_taken(steps)


@pytest.mark.parametrize("sampler", [one for one in MOVED if not one.stochastic], ids=label)
def test_predictions_that_never_change_lead_every_sampler_to_the_closed_form(
    sampler: Sampler,
) -> None:
    """Each step goes from alpha Du + sigma n to alpha' D + sigma' n, and n about Du then grows by
    alpha' (D - Du) / sigma', however many evaluations a step takes.
    """
    for schedule, steps in product(SCHEDULES.values(), (1, 2, 5)):
        first, last = 0.9 * schedule.t_start, max(schedule.t_end, 1e-3 * schedule.t_start)
        grid = schedule.grid(Trailing(), steps, first, last)
        plan = sampler.plan(grid)
        inner = [stage for stage in range(1, plan.evaluations) if plan.opens_step(stage)]
        noise = 0.5 / grid.sigma[0] + 0.6 * (plan.alpha[inner] / plan.sigma[inner]).sum()
        landed, _ = constant_run(plan, 0.5)
        assert float(landed) == pytest.approx(0.6 * grid.alpha[-1] + grid.sigma[-1] * noise)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp_singlestep", "heun"])
def test_one_step_over_all_of_edm_renoises_by_next_to_nothing(name: str) -> None:
    grid = SCHEDULES["edm"].grid(Karras(), 1, 80.0, 0.002)
    assert float(constant_run(FIRST[name].plan(grid), 0.0)[0]) == pytest.approx(0.6, abs=1e-9)
