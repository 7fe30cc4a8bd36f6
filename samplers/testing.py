"""The contract of samplers and spacings, as checks to call from the tests of a new one.

``check_sampler(MySampler())`` and ``check_spacing(MySpacing())`` run all checks. Each raises
AssertionError with a sentence that says which promise is broken, and where. Weft applies the same
checks to its own samplers and spacings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from samplers.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samplers.plan import Plan
    from samplers.sampler import Sampler
    from samplers.spacing import Spacing


class SlopeRange(NamedTuple):
    """A schedule and the times between which the order of a sampler is measured on it."""

    schedule: NoiseSchedule
    t_start: float
    t_end: float


FLOWS: Final = (
    SlopeRange(NoiseSchedule.vp_linear(), 1.0, 0.02),
    SlopeRange(NoiseSchedule.flow(), 0.99, 0.05),
    SlopeRange(NoiseSchedule.edm(), 20.0, 0.05),
)
"""One schedule of each kind: variance preserving, flow matching, variance exploding."""
STEPS: Final = (1, 2, 3, 5, 20)
"""Numbers of steps for which plans are checked; samplers most easily fail with one or two."""
SLOPE_STEPS: Final = (81, 324)
"""Numbers of steps of the runs that measure an order: multiples of 3, for which dpm_fast ends with
the same orders. A third run halfway between would not change the slope of a line through all."""


def check_sampler(sampler: Sampler, flows: Sequence[SlopeRange] = FLOWS) -> None:
    """Check all promises of a sampler, on schedules of each kind and with few and many steps.

    Call it once for each setting that behaves differently. A field that lowers the order of the
    last steps hides the order of convergence, so switch it off where the order is above 1.

    Args:
        sampler: the sampler, with its parameters.
        flows: schedules to check it on; leave out those that its default spacing does not suit.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    check_description(type(sampler))
    for flow in flows:
        for steps in STEPS:
            plan = _plan(sampler, flow.schedule, steps)
            check_plan(plan, f"{sampler.name} with {steps} steps on {flow.schedule}")
            check_evaluations(sampler, flow.schedule, steps)
        check_noise(sampler, flow.schedule)
        check_one_step(sampler, flow.schedule)
        if not sampler.stochastic:
            check_moves(sampler, flow.schedule, flow.t_end)
        check_order(sampler, flow)


def check_spacing(spacing: Spacing, flows: Sequence[SlopeRange] = FLOWS) -> None:
    """Check all promises of a spacing, on schedules of each kind and with few and many steps.

    It must give as many times as there are steps, strictly decreasing and within the schedule, and
    fill a given range from its first time to its last.

    Args:
        spacing: the spacing, with its parameters; not one whose times are listed.
        flows: schedules to check it on, with ranges to fill; leave out those that it does not suit.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    check_description(type(spacing))
    for schedule, t_start, t_end in flows:
        for steps in STEPS:
            where = f"{spacing!r} with {steps} steps on {schedule}"
            try:
                schedule.grid(spacing, steps)
                filled = schedule.grid(spacing, steps, t_start, t_end).t
            except ValueError as refusal:
                raise AssertionError(f"{where}: {refusal}") from refusal
            _hold(
                np.allclose(filled[[0, -1]], (t_start, t_end)),
                f"{where}: it fills {filled[0]:g} to {filled[-1]:g}, not {t_start:g} to {t_end:g}",
            )


def check_description(kind: type[Sampler | Spacing]) -> None:
    """Check for a name, a summary, a source, a docstring and a description of each field.

    These reach the API's documentation, the catalog and the command line.

    Raises:
        AssertionError: one of them is missing.
    """
    for said in ("summary", "source", "__doc__"):
        _hold(getattr(kind, said, None), f"{kind.__name__} has no {said}")
    for name, field in kind.model_fields.items():
        if name == "name":
            _hold(isinstance(field.default, str), f"{kind.__name__}.name has no default")
        else:
            _hold(field.description, f"{kind.__name__}.{name} has no description")


def check_plan(plan: Plan, where: str) -> None:
    """Check that a plan is finite and consistent, and ends on the clean picture.

    The shapes of its arrays must agree, and the steps of its stages must never decrease.

    Args:
        plan: plan of a run to the clean picture.
        where: description of the plan for the error message.

    Raises:
        AssertionError: the plan violates one of these.
    """
    stages, slots = plan.evaluations, plan.slots
    _hold(np.isfinite(plan.tables).all(), f"{where}: its tables are not finite")
    _hold(
        plan.tables.shape[:3] == (stages, slots, slots + 3),
        f"{where}: its tables have shape {plan.tables.shape}, not [stages, K, K + 3]",
    )
    for name, points in (("t", plan.t), ("alpha", plan.alpha), ("sigma", plan.sigma)):
        _hold(
            points.shape == (stages + 1,),
            f"{where}: {name} has shape {points.shape}; {stages} stages have {stages + 1} points",
        )
    landing = float(plan.alpha[-1]), float(plan.sigma[-1])
    _hold(
        landing == (1, 0),
        f"{where}: it lands on alpha, sigma = {landing} and not on the clean picture",
    )
    _hold(plan.step[0] == 0, f"{where}: its first stage belongs to step {plan.step[0]}, not 0")
    _hold((np.diff(plan.step) >= 0).all(), f"{where}: it goes back to an earlier step")


def check_evaluations(sampler: Sampler, schedule: NoiseSchedule, steps: int) -> None:
    """Check that a run takes as many steps and evaluations as declared.

    Raises:
        AssertionError: it takes another number.
    """
    plan = _plan(sampler, schedule, steps)
    for name, declared, found in (
        ("steps", sampler.steps_taken(steps), plan.steps),
        ("evaluations", sampler.evaluations(steps), plan.evaluations),
    ):
        _hold(
            declared == found,
            f"{sampler.name} with {steps} steps declares {declared} {name}; its plan has {found}",
        )


def check_noise(sampler: Sampler, schedule: NoiseSchedule, steps: int = 5) -> None:
    """Check that noise is drawn if and only if ``stochastic``, and never in the last stage.

    Raises:
        AssertionError: noise is drawn but not declared, declared but not drawn, or drawn last.
    """
    noisy = _plan(sampler, schedule, steps).noisy
    _hold(
        any(noisy) == sampler.stochastic,
        f"{sampler.name} declares stochastic = {sampler.stochastic}, but its plan draws "
        f"{'noise' if any(noisy) else 'none'}",
    )
    _hold(not noisy[-1], f"{sampler.name} adds noise to the finished picture")


def check_one_step(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """Check that a run of a single step gives the denoised prediction.

    Raises:
        AssertionError: it gives another picture.
    """
    from torch import float64, tensor

    from samplers.plan import integrate

    picture = tensor([[0.3, -0.8, 0.1]], dtype=float64)
    start = tensor([[1.5, 0.2, -2.0]], dtype=float64)
    landed = integrate(_plan(sampler, schedule, 1), lambda _x, _t: picture, start)
    apart = float((landed - picture).abs().max())
    # A consistency function keeps 2.5e-9 of x at the noisiest step.
    _hold(
        apart < 1e-8,
        f"{sampler.name} misses the denoised picture by {apart:.2g} in a run of one step",
    )


def check_moves(sampler: Sampler, schedule: NoiseSchedule, t_end: float = 0.1) -> None:
    """Check that a move of x before a step is preserved.

    Guidance such as CFG++ and inpainting move x between steps. A solver that steps from a stored
    point loses the move, and one that compares the new slope with a stored one takes the move for
    a turn of the flow. Store a past slope as the signal ``x - sigma slope`` that it implies at the
    new point, so that it moves along. With a constant prediction, the distance of x from it shrinks
    as sigma does, and so must the move.

    Args:
        sampler: a sampler without fresh noise.
        schedule: schedule to run on.
        t_end: time at which the run ends, with noise left.

    Raises:
        AssertionError: a move is lost, or ends up longer or shorter than sigma implies.
    """
    grid = schedule.grid("logsnr", 6, t_end=t_end)
    plan = sampler.plan(grid)
    slots = plan.slots
    for stage in range(plan.evaluations):
        if not plan.opens_step(stage):
            continue
        move = np.eye(slots)[0]
        for table in plan.tables[stage:]:
            move = table[:, :slots] @ move
        wanted = plan.sigma[-1] / plan.sigma[stage]
        _hold(
            np.isclose(move[0], wanted, rtol=1e-6, atol=1e-12),
            f"{sampler.name}: of a move of x before stage {stage} {move[0]:.4g} is left at the "
            f"end, where sigma says {wanted:.4g}; its history must move with x",
        )


def measured_order(
    sampler: Sampler, flow: SlopeRange = FLOWS[0], steps: Sequence[int] = SLOPE_STEPS
) -> float:
    """The power of the step size with which the error decreases, on an exactly known flow.

    The data are a mixture of Gaussians (:class:`samplers.gaussian.GaussianMixtureDenoiser`), in
    float64, and steps are even in log SNR.

    Args:
        sampler: a sampler without fresh noise.
        flow: schedule and range of times.
        steps: numbers of steps of the runs, increasing.
    """
    from torch import float64, linspace

    from samplers.gaussian import GaussianMixtureDenoiser
    from samplers.plan import integrate

    schedule, t_start, t_end = flow
    data = GaussianMixtureDenoiser(schedule)
    reach = 1.6 * float(data.spread(t_start).max())
    x = linspace(-reach, reach, 17, dtype=float64)[None]
    exact = data.transport(x, t_start, t_end)
    plans = (sampler.plan(schedule.grid("logsnr", count, t_start, t_end)) for count in steps)
    errors = [float((integrate(plan, data, x) - exact).abs().max()) for plan in plans]
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def check_order(sampler: Sampler, flow: SlopeRange = FLOWS[0], tolerance: float = 0.25) -> None:
    """Check that the order of convergence is the declared one; a sampler that declares 0 passes.

    Raises:
        AssertionError: the measured slope differs by more than the tolerance.
    """
    declared = sampler.convergence_order
    if declared == 0:
        return
    found = measured_order(sampler, flow)
    _hold(
        abs(found - declared) < tolerance,
        f"{sampler.name} declares order {declared}; its error falls with the power {found:.2f} "
        f"on {flow.schedule}",
    )


def _plan(sampler: Sampler, schedule: NoiseSchedule, steps: int) -> Plan:
    return sampler.plan(schedule.grid(sampler.default_spacing, steps))


def _hold(promise: object, broken: str) -> None:
    if not promise:
        raise AssertionError(broken)
