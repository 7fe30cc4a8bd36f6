"""DPM-Solver-v3 with statistics of a model, beyond the contract of all samplers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import factorial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_simpson, simpson
from torch import Tensor

from samplers import Grid, NoiseSchedule, Plan, integrate
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_v3 import DPMSolverV3, Flags, Preset, preset
from samplers.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from samplers.levels import F64
from samplers.statistics import Statistics, StatisticsIdentity
from samplers.timesteps import Karras, LogSNR, Trailing
from samplers.unipc import UniPC
from tests.covering import covering
from tests.samplers.cases import DEFAULT_SPACINGS, DISCRETE, EDM, FLOW, VP, grid_unless_refused

LATENT = (2, 3, 1)
FLAGS = [
    Flags(1, "exact", "none", lower_order_final=False),
    Flags(1, "exact", "pseudo", lower_order_final=False),
    Flags(2, "exact", "none", lower_order_final=True),
    Flags(2, "exact", "exact", lower_order_final=False),
    Flags(2, "exact", "pseudo", lower_order_final=True),
    Flags(3, "exact", "none", lower_order_final=False),
    Flags(3, "exact", "exact", lower_order_final=True),
    Flags(3, "exact", "pseudo", lower_order_final=True),
    Flags(3, "pseudo", "exact", lower_order_final=False),
    Flags(3, "pseudo", "pseudo", lower_order_final=False),
    Flags(3, "exact", "raised", lower_order_final=False),
]


def flag_label(flags: Flags) -> str:
    return "-".join(str(value) for value in flags)


def sampler_of(flags: Flags, **others: Any) -> DPMSolverV3:
    return DPMSolverV3(**flags._asdict(), **others)


def ends_of(schedule: NoiseSchedule) -> F64:
    return schedule.half_log_snr(np.array([schedule.t_start, schedule.t_end]))


def smooth(ends: F64, points: int = 120, shape: tuple[int, ...] = LATENT) -> Statistics:
    """Statistics that are smooth over lam and belong to no model in particular."""
    generator = np.random.default_rng(5)
    lam = np.linspace(ends[0], ends[1], points)
    column = lam.reshape(-1, *[1] * len(shape))

    def wave(middle: float, height: float) -> F64:
        pace, phase = (generator.uniform(0.2, 0.7, shape) for _ in range(2))
        return middle + height * np.sin(pace * column + 9 * phase)

    return Statistics(lam, wave(0.6, 0.4), wave(0.1, 0.6), wave(0.0, 0.5))


def constant(l: float, s: float, b: float, ends: F64) -> Statistics:  # noqa: E741
    lam = np.linspace(ends[0], ends[1], 40)
    return Statistics(lam, np.full(40, l), np.full(40, s), np.full(40, b))


def start_of(shape: tuple[int, ...] = LATENT) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, *shape, generator=generator, dtype=torch.float64)


@dataclass
class Published:
    """The authors' algorithm over a grid, one number at a time and in their order, in float64.

    Integrals use Simpson's rule on a fine mesh over the run, which includes the points of the
    statistics and of the grid.
    """

    grid: Grid
    lam: F64
    l: F64  # noqa: E741
    s: F64
    b: F64

    def __post_init__(self) -> None:
        points = self.grid.half_log_snr
        inner = self.lam[(self.lam > points[0]) & (self.lam < points[-1])]
        breaks = np.union1d(inner, points)
        parts = [np.linspace(a, b, 120, endpoint=False) for a, b in pairwise(breaks)]
        self.mesh = np.append(np.concatenate(parts), breaks[-1])
        self.at = np.searchsorted(self.mesh, points)
        l, s, b = (np.interp(self.mesh, self.lam, v) for v in (self.l, self.s, self.b))  # noqa: E741
        self.own_l = np.interp(points, self.lam, self.l)
        self.L, self.S = (cumulative_simpson(v, x=self.mesh, initial=0) for v in (l, s))
        self.B = cumulative_simpson(np.exp(-self.S) * b, x=self.mesh, initial=0)

    def weight(self, i: int, k: int) -> float:
        """E_k of the step from point i."""
        own = slice(self.at[i], self.at[i + 1] + 1)
        apart = self.mesh[own] - self.mesh[own][0]
        LS = (self.L + self.S)[own]
        return float(simpson(np.exp(LS - LS[0]) * apart**k / factorial(k), x=self.mesh[own]))

    def constant(self, i: int) -> float:
        """C of the step from point i."""
        own = slice(self.at[i], self.at[i + 1] + 1)
        LS, B, S = (self.L + self.S)[own], self.B[own], self.S[own]
        return float(simpson(np.exp(LS - LS[0] + S[0]) * (B - B[0]), x=self.mesh[own]))

    def g(self, i: int, j: int, f: float) -> float:
        a, c = self.at[i], self.at[j]
        return float(
            np.exp(self.S[a] - self.S[c]) * f - np.exp(self.S[a]) * (self.B[c] - self.B[a])
        )

    def update(
        self, i: int, x: list[float], eps: list[float], points: list[int], pseudo: bool
    ) -> float:
        """The step from point i to i + 1, with derivatives from ``points``, the first being i."""
        alpha, sigma, lam = self.grid.alpha, self.grid.sigma, self.grid.half_log_snr
        f = {j: (sigma[j] * eps[j] - self.own_l[j] * x[j]) / alpha[j] for j in points}
        g = [self.g(i, j, f[j]) for j in points]
        n = len(points) - 1
        if pseudo:
            table = [g]
            for k in range(1, n + 1):
                table.append(
                    [
                        (table[-1][j] - table[-1][j + 1]) / (lam[points[j]] - lam[points[j + k]])
                        for j in range(n - k + 1)
                    ]
                )
            derivatives = [factorial(k) * table[k][0] for k in range(1, n + 1)]
        else:
            powers = [[(lam[j] - lam[i]) ** k for k in range(1, n + 1)] for j in points[1:]]
            solved = np.linalg.solve(np.array(powers), np.array(g[1:]) - g[0]) if n else []
            derivatives = [factorial(k) * c for k, c in enumerate(solved, start=1)]
        total = x[i] / alpha[i] - self.weight(i, 0) * g[0] - self.constant(i)
        total -= sum(self.weight(i, k) * d for k, d in enumerate(derivatives, start=1))
        decay = np.exp(self.L[self.at[i]] - self.L[self.at[i + 1]])
        return float(alpha[i + 1] * decay * total)

    def run(self, x: float, flags: Flags, noise: Callable[[float, int], float]) -> float:
        sigma, steps = self.grid.sigma, self.grid.steps
        xs, eps, reached = [x], list[float](), 0
        for i in range(steps):
            eps.append(noise(xs[i], i))
            raised = flags.corrector in ("pseudo", "raised")
            order = reached + raised
            if flags.corrector != "none" and order > 1:
                points = [i - 1, i, *range(i - 2, i - order, -1)]
                new = self.update(i - 1, xs, eps, points, flags.corrector == "pseudo")
                kept = sigma[i] * eps[i] - self.own_l[i] * xs[i]
                xs[i], eps[i] = new, (kept + self.own_l[i] * new) / sigma[i]
            reached = min(i + 1, flags.order)
            if flags.lower_order_final:
                reached = min(reached, steps - i)
            points = list(range(i, i - reached, -1))
            xs.append(self.update(i, xs, eps, points, flags.predictor == "pseudo"))
        return xs[-1]


def published_run(
    x: Tensor, grid: Grid, statistics: Statistics, flags: Flags, denoise: GaussianMixtureDenoiser
) -> Tensor:
    landed = torch.empty_like(x)
    for row, *element in np.ndindex(*x.shape):
        of_element = (a[:, *element] for a in (statistics.l, statistics.s, statistics.b))
        run = Published(grid, statistics.half_log_snr, *of_element)

        def noise(y: float, i: int) -> float:
            denoised = float(denoise(torch.tensor([y], dtype=torch.float64), float(grid.t[i])))
            return float((y - grid.alpha[i] * denoised) / grid.sigma[i])

        landed[row, *element] = run.run(float(x[row, *element]), flags, noise)
    return landed


@pytest.mark.parametrize(
    ("flags", "spacing"),
    covering(product(FLAGS, (LogSNR(), Karras())), tuple),
    ids=lambda value: flag_label(value) if isinstance(value, Flags) else value.name,
)
def test_a_run_is_the_authors_own_with_any_flags(flags: Flags, spacing: LogSNR | Karras) -> None:
    grid = VP.grid(spacing, 7, 1.0, 0.01)
    statistics, data, x = smooth(ends_of(VP)), GaussianMixtureDenoiser(VP), start_of()[:1]
    ours = integrate(sampler_of(flags).plan(grid, statistics), data, x)
    theirs = published_run(x, grid, statistics, flags, data)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def gaussian_statistics(points: int, mean: float, deviation: float) -> Statistics:
    """Statistics of N(mean, deviation^2) in closed form, for which f' = s f + b holds exactly."""
    first, last = ends_of(VP)
    lam = np.linspace(first, last, points)
    spread = deviation**2 * np.exp(2 * lam)
    l = 1 / (1 + spread)  # noqa: E741
    return Statistics(lam, l, np.zeros(points), 2 * spread * l**2 * mean)


def test_one_step_is_exact_on_gaussian_data() -> None:
    mean, deviation = 0.7, 0.6
    grid = VP.grid(LogSNR(), 1, VP.t_start, VP.t_end)
    data = GaussianDenoiser(VP, mean, deviation)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)[None]
    exact = data.transport(x, VP.t_start, VP.t_end)

    def miss(plan: Plan) -> float:
        return float((integrate(plan, data, x) - exact).abs().max())

    sampler = DPMSolverV3()
    assert miss(DDIM().plan(grid)) > 1
    coarse, fine = (
        miss(sampler.plan(grid, gaussian_statistics(n, mean, deviation))) for n in (250, 4000)
    )
    assert coarse < 5e-7
    # The remaining error is from interpolation between the points: it falls with their distance
    # squared.
    assert fine == pytest.approx(coarse / 256, rel=0.05)


def test_fewest_steps_are_exact_on_gaussian_data_whatever_the_flags() -> None:
    data = GaussianDenoiser(VP, 0.7, 0.6)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)[None]
    exact = data.transport(x, VP.t_start, VP.t_end)
    statistics = gaussian_statistics(4000, 0.7, 0.6)
    for flags in FLAGS:
        plan = sampler_of(flags).plan(VP.grid(Karras(), 4, VP.t_start, VP.t_end), statistics)
        torch.testing.assert_close(integrate(plan, data, x), exact, rtol=0, atol=1e-5)


class TestReductions:
    grid = VP.grid(LogSNR(), 9)
    plain = constant(1, 0, 0, ends_of(VP))

    def run(self, sampler: Any, grid: Grid | None = None, *given: Statistics) -> Tensor:
        plan = sampler.plan(grid or self.grid, *given)
        return integrate(plan, GaussianMixtureDenoiser(VP), start_of())

    @pytest.mark.parametrize("flags", FLAGS, ids=flag_label)
    def test_statistics_1_0_0_are_none(self, flags: Flags) -> None:
        given = self.run(sampler_of(flags), self.grid, self.plain)
        none = self.run(sampler_of(flags, statistics="none"))
        torch.testing.assert_close(given, none, rtol=1e-11, atol=1e-11)

    def test_order_one_is_ddim(self) -> None:
        sampler = DPMSolverV3(order=1, corrector="none", statistics="none")
        tables = sampler.plan(self.grid).tables
        np.testing.assert_array_equal(tables, DDIM().plan(self.grid).tables)

    @pytest.mark.parametrize("lowered", [False, True])
    def test_order_two_is_dpm_solver_pp_of_variant_taylor(self, lowered: bool) -> None:
        flags = Flags(2, "exact", "none", lower_order_final=lowered)
        theirs = DPMSolverPP(order=2, solver_type="taylor", lower_order_final=lowered)
        ours = self.run(sampler_of(flags, statistics="none"))
        torch.testing.assert_close(ours, self.run(theirs), rtol=1e-12, atol=1e-12)

    def test_order_three_raised_is_unipc_without_its_shortcuts(self) -> None:
        """UniPC uses one half where it has one unknown; later steps of order 3 have more."""
        flags = Flags(3, "exact", "raised", lower_order_final=False)
        tables = sampler_of(flags, statistics="none").plan(self.grid).tables
        theirs = UniPC(order=3, lower_order_final=False).plan(self.grid).tables
        of_x = [0, *range(-6, 0)]
        # Our history holds f = -D.
        signs = np.array([1, -1, -1, -1, 1, 1, 1])
        np.testing.assert_allclose(
            tables[3:, 0][:, of_x] * signs, theirs[3:, 0][:, of_x], rtol=1e-9, atol=1e-12
        )

    @pytest.mark.parametrize("order", [1, 2, 3])
    def test_statistics_0_minus1_0_are_dpm_solver_in_the_noise_prediction(self, order: int) -> None:
        grid = VP.grid(Karras(), 6, 1.0, 0.01)
        flags = Flags(order, "exact", "none", lower_order_final=False)  # type: ignore[arg-type]
        ours = self.run(sampler_of(flags), grid, constant(0, -1, 0, ends_of(VP)))
        alpha, sigma, lam = grid.alpha, grid.sigma, grid.half_log_snr
        x, history = start_of(), list[Tensor]()
        data = GaussianMixtureDenoiser(VP)
        for i in range(grid.steps):
            history.append((x - alpha[i] * data(x, float(grid.t[i]))) / sigma[i])
            h = lam[i + 1] - lam[i]
            # x_t = alpha_t / alpha_s x_s - sigma_t sum_k h^(k+1) phi_(k+1)(h) eps^(k)
            phi = [np.expm1(h) / h]
            phi.append((phi[0] - 1) / h)
            phi.append((phi[1] - 1 / 2) / h)
            used = min(order, i + 1)
            apart = [(lam[i - k] - lam[i]) / h for k in range(used)]
            coefficients = np.linalg.inv(np.vander(apart, increasing=True))
            total = torch.zeros_like(x)
            for k in range(used):
                derivative = sum(coefficients[k, m] * history[i - m] for m in range(used))
                total = total + h * phi[k] * factorial(k) * derivative
            x = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * total
        torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


def eased_in(schedule: NoiseSchedule, steps: int, t_start: float, t_end: float) -> Grid:
    """Even in log SNR, except for small first steps, which are of lower order than the others."""
    first, last = schedule.half_log_snr(np.array([t_start, t_end]))
    small = steps ** (-5 / 3)
    shares = np.append([0, small, small + steps ** (-5 / 4) / 2], np.linspace(0, 1, steps + 1)[1:])
    times = schedule.time_of_half_log_snr(first + (last - first) * shares)
    return Grid.on_times(schedule, times, clean=False)


RANGES = {VP: (0.9, 0.02), FLOW: (0.95, 0.05), EDM: (20.0, 0.05)}
each_flags_and_schedule = pytest.mark.parametrize(
    ("flags", "schedule"), covering(product(FLAGS, RANGES), tuple)
)


@each_flags_and_schedule
def test_the_order_holds_whatever_the_statistics_are(flags: Flags, schedule: NoiseSchedule) -> None:
    """Statistics determine the size of the error, not how fast it falls.

    Their points lie close together here: where steps are as short as the distance between points,
    the kinks of the linear interpolation show in the highest derivatives.
    """
    t_start, t_end = RANGES[schedule]
    sampler = sampler_of(flags._replace(lower_order_final=False))
    data = GaussianMixtureDenoiser(schedule)
    given = smooth(schedule.half_log_snr(np.array([t_start, t_end])), 2000, (1, 3, 1))
    reach = 1.6 * float(data.spread(t_start).max())
    x = torch.linspace(-reach, reach, 7, dtype=torch.float64)[:, None, None, None]
    x = x.expand(-1, 1, 3, 1)
    exact = data.transport(x, t_start, t_end)
    plans = [sampler.plan(eased_in(schedule, n, t_start, t_end), given) for n in (60, 240)]
    found = [float((integrate(plan, data, x) - exact).abs().max()) for plan in plans]
    slope = -np.polyfit(np.log([60, 240]), np.log(found), 1)[0]
    assert abs(slope - sampler.convergence_order) < 0.25, f"{slope:.2f}: {found}"


@each_flags_and_schedule
def test_a_point_moved_between_steps_stays_moved(flags: Flags, schedule: NoiseSchedule) -> None:
    """A move of x shrinks with sigma for constant D, and does not affect the solver's own point."""
    grid = schedule.grid(LogSNR(), 6, t_end=0.1)
    plan = sampler_of(flags).plan(grid, smooth(grid.half_log_snr[[0, -1]]))
    K = plan.slots
    for stage in range(1, plan.evaluations):
        move = np.zeros((K, *LATENT))
        move[0] = 1.0
        for table in plan.tables[stage:]:
            move = np.einsum("ij...,j...->i...", table[:, :K], move)
        np.testing.assert_allclose(move[0], plan.sigma[-1] / plan.sigma[stage], rtol=1e-11)
        assert not move[1:].any()


def test_a_step_through_f_would_lose_part_of_a_move() -> None:
    """The reason for the solver's own point: at the start there is none, and the start is moved."""
    grid = VP.grid(LogSNR(), 6, t_end=0.1)
    plan = sampler_of(FLAGS[0]).plan(grid, constant(0.5, 0, 0, grid.half_log_snr[[0, -1]]))
    h = grid.half_log_snr[1] - grid.half_log_snr[0]
    # exp(-L) (1 - (1 - l) E_0) of y, where exp(-h) is correct
    factor = np.exp(-h / 2) * (1 - 0.5 * np.expm1(h / 2) / 0.5)
    assert plan.tables[0, 0, 0] == pytest.approx(grid.alpha[1] / grid.alpha[0] * factor)
    assert abs(factor - np.exp(-h)) > 0.05


@pytest.mark.parametrize(
    ("spacing", "steps"), covering(product(DEFAULT_SPACINGS, [1, 2, 5, 10, 20, 50]), tuple)
)
def test_statistics_of_the_trained_range_serve_every_spacing(spacing: Any, steps: int) -> None:
    statistics = smooth(ends_of(DISCRETE))
    if (grid := grid_unless_refused(DISCRETE, spacing, steps)) is not None:
        plan = DPMSolverV3().plan(grid, statistics)
        assert plan.tables.shape == (steps, plan.slots, plan.slots + 3, *LATENT)
        assert np.isfinite(plan.tables).all()
        assert (plan.alpha[-1], plan.sigma[-1]) == (1, 0)


@pytest.mark.parametrize("schedule", [DISCRETE, FLOW, EDM], ids=["linear", "flow", "edm"])
def test_one_step_to_zero_gives_the_denoised_picture(schedule: NoiseSchedule) -> None:
    grid = schedule.grid(Trailing(), 1)
    picture, x = start_of() / 2, start_of() * float(grid.sigma[0])
    plan = DPMSolverV3().plan(grid, smooth(np.array([-7.0, 5.0])))
    torch.testing.assert_close(integrate(plan, lambda _x, _t: picture, x), picture)


def test_a_start_at_pure_noise_is_the_limit_of_starts_just_below() -> None:
    """Statistics tend to l = 1 there, and f to -D."""
    lam = np.linspace(-14, 5, 400)
    statistics = Statistics(lam, 1 / (1 + 0.36 * np.exp(2 * lam)), 0 * lam, 0 * lam)
    data, x = GaussianMixtureDenoiser(FLOW), start_of()
    times = np.linspace(1, 0, 13)[:-1]
    nearly = np.append(1 - 1e-6, times[1:])
    sampler = DPMSolverV3(order=3, predictor="exact", corrector="exact")
    pure, near = (
        integrate(sampler.plan(Grid.on_times(FLOW, t, clean=True), statistics), data, x)
        for t in (times, nearly)
    )
    torch.testing.assert_close(pure, near, rtol=0, atol=2e-3)
    first = sampler.plan(Grid.on_times(FLOW, times, clean=True), statistics).tables[0, 0]
    ddim = DDIM().plan(Grid.on_times(FLOW, times, clean=True)).tables[0, 0]
    assert (first[0], first[-3]) == (ddim[0], ddim[-3])


def test_statistics_of_channels_are_those_of_all_their_elements() -> None:
    ends = ends_of(DISCRETE)
    channels = smooth(ends, shape=(2, 1, 1))
    l, s, b = (np.broadcast_to(a, (120, 2, 4, 4)) for a in (channels.l, channels.s, channels.b))  # noqa: E741
    elements = Statistics(channels.half_log_snr, l, s, b)
    grid, data, x = (
        DISCRETE.grid(Karras(), 8),
        GaussianMixtureDenoiser(DISCRETE),
        start_of((2, 4, 4)),
    )
    short, long = (DPMSolverV3().plan(grid, given) for given in (channels, elements))
    assert short.tables.shape[3:] == (2, 1, 1)
    torch.testing.assert_close(
        integrate(short, data, x), integrate(long, data, x), rtol=1e-12, atol=1e-12
    )


def test_elements_do_not_touch_each_other() -> None:
    grid, data, x = DISCRETE.grid(Trailing(), 8), GaussianMixtureDenoiser(DISCRETE), start_of()
    given = smooth(ends_of(DISCRETE))
    together = integrate(DPMSolverV3().plan(grid, given), data, x)
    for element in np.ndindex(*LATENT):
        l, s, b = (a[:, *element] for a in (given.l, given.s, given.b))  # noqa: E741
        plan = DPMSolverV3().plan(grid, Statistics(given.half_log_snr, l, s, b))
        assert not plan.elementwise
        alone = integrate(plan, data, x[:, *element])
        torch.testing.assert_close(together[:, *element], alone, rtol=1e-11, atol=1e-11)


def test_levels_of_the_statistics_are_the_nearest_of_their_points() -> None:
    given = smooth(ends_of(DISCRETE))
    asked = DISCRETE.grid(Trailing(), 8)
    plan = DPMSolverV3(levels="statistics").plan(asked, given)
    lam = np.log(plan.alpha[:-1] / plan.sigma[:-1])
    off = np.abs(lam[:, None] - given.half_log_snr)
    assert off.min(1).max() < 1e-9
    half = np.diff(given.half_log_snr).max() / 2
    assert 0 < np.abs(lam - asked.half_log_snr[:-1]).max() <= half
    told = DISCRETE.half_log_snr(plan.t[:-1])
    np.testing.assert_allclose(told, lam, atol=1e-9)
    assert (plan.alpha[-1], plan.sigma[-1], plan.t[-1]) == (1, 0, 0)
    rounded = replace(asked, t=plan.t, alpha=plan.alpha, sigma=plan.sigma)
    np.testing.assert_array_equal(plan.tables, DPMSolverV3().plan(rounded, given).tables)


class TestFlags:
    given = replace(
        smooth(ends_of(DISCRETE)),
        identity=StatisticsIdentity("m", "s", 999.0, 0.0, "cfg", 7.5, LATENT, 8, 120),
    )

    def tables(self, sampler: DPMSolverV3, steps: int = 6) -> Any:
        return sampler.plan(DISCRETE.grid(Trailing(), steps), self.given).tables

    @pytest.mark.parametrize("name", ["best", "published"])
    @pytest.mark.parametrize("steps", [5, 8])
    def test_the_preset_is_of_the_scale_of_the_statistics_and_of_the_steps(
        self, name: Preset, steps: int
    ) -> None:
        left_out = self.tables(DPMSolverV3(preset=name), steps)
        chosen = self.tables(sampler_of(preset(name, 7.5, steps)), steps)
        np.testing.assert_array_equal(left_out, chosen)

    def test_a_field_that_is_set_overrides_the_preset(self) -> None:
        sampler = DPMSolverV3(order=1, corrector="pseudo", preset="published")
        wanted = preset("published", 7.5, 6)._replace(order=1, corrector="pseudo")
        np.testing.assert_array_equal(self.tables(sampler), self.tables(sampler_of(wanted)))

    def test_the_published_presets_are_the_authors(self) -> None:
        """Their scripts for CIFAR-10, ImageNet-256 and Stable Diffusion."""
        few, many = (preset("published", 1.0, steps) for steps in (5, 20))
        assert few == Flags(3, "pseudo", "exact", lower_order_final=False)
        assert many == Flags(3, "exact", "exact", lower_order_final=True)
        low, high = (preset("published", scale, 10) for scale in (4.9, 5.0))
        assert low == Flags(2, "exact", "pseudo", lower_order_final=True)
        assert high == Flags(2, "exact", "none", lower_order_final=True)

    def test_history_is_no_longer_than_the_flags_need(self) -> None:
        slots = {flags: self.tables(sampler_of(flags)).shape[1] for flags in FLAGS}
        for flags, count in slots.items():
            past = flags.order - (flags.corrector == "none" or flags[:3] == (1, "exact", "exact"))
            assert count == 2 + past


class TestRefusals:
    grid = DISCRETE.grid(Trailing(), 8)

    def test_missing_statistics_say_how_to_make_them(self) -> None:
        with pytest.raises(ValueError, match=r"^statistics is 'exact', but .* `weft ems .*'none'"):
            DPMSolverV3().plan(self.grid)

    def test_levels_outside_the_statistics(self) -> None:
        low, high = ends_of(DISCRETE)
        for ends in ((low + 0.01, high), (low, 0.5)):
            with pytest.raises(
                ValueError, match=r"^spacing goes from -5.* statistics only from .*'none'"
            ):
                DPMSolverV3().plan(self.grid, smooth(np.array(ends)))
        DPMSolverV3().plan(self.grid, smooth(np.array([low + 5e-4, high])))

    def test_levels_of_statistics_that_are_not_there(self) -> None:
        with pytest.raises(ValueError, match=r"^levels is 'statistics', and .*only 'asked'"):
            DPMSolverV3(statistics="none", levels="statistics").plan(self.grid)

    def test_more_steps_than_points(self) -> None:
        with pytest.raises(ValueError, match=r"^steps is 8, which is too many for 6 statistics"):
            DPMSolverV3(levels="statistics").plan(self.grid, smooth(ends_of(DISCRETE), 6))
