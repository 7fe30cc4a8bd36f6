"""The points of a run, complete or starting part way."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers import Grid, NoiseSchedule
from samplers.timesteps import Karras, Leading, LogSNR, Trailing
from tests.samplers.cases import DISCRETE, EDM, FLOW, VP, each_schedule


@each_schedule
def test_a_given_range_is_kept_at_both_ends(schedule: NoiseSchedule) -> None:
    middle = (schedule.t_start + schedule.t_end) / 2
    grid = schedule.grid(LogSNR(), 5, t_start=middle, t_end=middle / 2)
    assert grid.steps == 5
    np.testing.assert_allclose(grid.t[[0, -1]], [middle, middle / 2], rtol=1e-9)
    assert grid.sigma[-1] > 0


@each_schedule
def test_a_given_start_alone_ends_on_the_clean_picture(schedule: NoiseSchedule) -> None:
    middle = (schedule.t_start + schedule.t_end) / 2
    grid = schedule.grid(Trailing(), 5, t_start=middle)
    assert grid.steps == 5
    assert grid.t[0] == pytest.approx(middle)
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)


def test_a_given_end_alone_starts_from_the_noisiest_level() -> None:
    grid = VP.grid(Trailing(), 4, t_end=0.2)
    np.testing.assert_allclose(grid.t, [1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("t_start", "t_end"), [(2.0, 0.1), (0.5, 0.5), (0.2, 0.5), (1.0, 0.0)])
def test_times_outside_the_schedule_or_out_of_order_are_refused(
    t_start: float, t_end: float
) -> None:
    for schedule in (VP, FLOW):
        with pytest.raises(ValueError, match=r"t_start is .* and t_end is .* from at most 1 down"):
            schedule.grid(LogSNR(), 3, t_start=t_start, t_end=t_end)


@pytest.mark.parametrize("steps", [0, "10", 2.5, True], ids=repr)
def test_steps_are_a_whole_number_of_at_least_one(steps: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"steps is {steps!r}; it must be a whole number of at least 1"
    ):
        VP.grid(Trailing(), steps)


def test_times_that_rise_are_refused_by_the_first_pair_that_does() -> None:
    with pytest.raises(ValueError, match=r"timesteps go from 300 to 400; .* before it\.$"):
        Grid.on_times(DISCRETE, np.array([999.0, 300, 400, 100]), clean=True)


@pytest.mark.parametrize("wrong", [np.nan, -0.1, 1.1])
@pytest.mark.parametrize("place", [0, 1])
def test_times_outside_the_schedule_are_refused_by_value(wrong: float, place: int) -> None:
    times = np.array([1.0, 0.2])
    times[place] = wrong
    with pytest.raises(ValueError, match=rf"t holds {wrong:g}; .* has times from 1 down to 0"):
        Grid.on_times(VP, times, clean=True)


def test_a_noisiest_time_that_float32_rounded_up_is_the_noisiest() -> None:
    schedule = NoiseSchedule.edm(sigma_max=80.3)
    rounded = float(np.float32(80.3))
    assert rounded > schedule.t_start
    assert Grid.on_times(schedule, np.array([rounded, 1.0]), clean=True).t[0] == 80.3


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_the_clean_picture_follows_times_with_noise_left(schedule: NoiseSchedule) -> None:
    times = np.array([schedule.t_start, 0.0])
    with pytest.raises(ValueError, match="t ends at 0, where no noise is left; leave that time"):
        Grid.on_times(schedule, times, clean=True)
    assert Grid.on_times(schedule, times, clean=False).sigma[-1] == 0


def test_time_zero_of_a_discrete_schedule_has_noise_left() -> None:
    assert Grid.on_times(DISCRETE, np.array([999.0, 0]), clean=True).steps == 2


@pytest.mark.parametrize(("times", "clean"), [([], True), ([0.5], False), ([[0.5, 0.1]], True)])
def test_a_grid_needs_times_for_a_step(times: list[float], clean: bool) -> None:
    with pytest.raises(ValueError, match=r"t has shape .*; it must be a list of at least \d times"):
        Grid.on_times(VP, np.array(times), clean=clean)


def test_whole_timesteps_are_told_while_the_levels_stay() -> None:
    plain, whole = DISCRETE.grid(Karras(), 8), DISCRETE.grid(Karras(whole=True), 8)
    assert whole.t.tolist() == np.round(plain.t).tolist()
    np.testing.assert_array_equal(whole.sigma, plain.sigma)
    assert DISCRETE.grid(LogSNR(whole=True), 8).t.tolist() != DISCRETE.grid(LogSNR(), 8).t.tolist()


def test_start_noise_has_deviation_one_or_sigma() -> None:
    assert DISCRETE.grid(Leading(), 10).start_scale == 1
    assert EDM.grid(Trailing(), 10).start_scale == 80
    assert FLOW.grid(Leading(), 10).start_scale == FLOW.grid(Leading(), 10).sigma[0] < 1


@given(steps=st.integers(1, 60), strength=st.floats(0.01, 1))
def test_a_tail_is_the_last_share_of_the_steps(steps: int, strength: float) -> None:
    grid = DISCRETE.grid(Trailing(), steps)
    if int(steps * strength) < 1:
        with pytest.raises(ValueError, match="which leaves none of"):
            grid.tail(strength)
        return
    tail = grid.tail(strength)
    assert tail.steps == int(steps * strength)
    for ours, whole in ((tail.t, grid.t), (tail.alpha, grid.alpha), (tail.sigma, grid.sigma)):
        np.testing.assert_array_equal(ours, whole[-len(ours) :])


@pytest.mark.parametrize("schedule", [FLOW, NoiseSchedule.trigflow()], ids=["flow", "trigflow"])
def test_a_part_of_a_step_is_a_step_in_the_tail_of_a_flow(schedule: NoiseSchedule) -> None:
    # In floating point, 50 times .14 is a little above 7; diffusers' pipelines run 7 steps too.
    expected = {(4, 0.5): 2, (4, 0.6): 3, (8, 0.3): 3, (5, 0.01): 1, (50, 0.14): 7}
    for (steps, strength), kept in expected.items():
        assert schedule.grid(Trailing(), steps).tail(strength).steps == kept


def test_a_tail_of_everything_is_the_grid() -> None:
    assert DISCRETE.grid(Trailing(), 7).tail(1.0).steps == 7


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01])
def test_strengths_outside_zero_to_one_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength is {strength:g}; it must be above 0 and at"):
        DISCRETE.grid(Trailing(), 7).tail(strength)


def test_too_low_a_strength_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match=r"leaves none of 20 steps; at least 0\.05 is needed"):
        DISCRETE.grid(Trailing(), 20).tail(0.01)


class TwoTimes(Trailing, frozen=True):
    """A spacing of another package that returns the wrong number of times."""

    def fill(self, schedule: Any, count: int, t_start: float, t_end: float) -> Any:
        return np.array([t_start, t_end])

    def evaluated(self, schedule: Any, steps: int) -> Any:
        return self.fill(schedule, steps, schedule.t_start, schedule.t_end)


@pytest.mark.parametrize("ends", [{}, {"t_start": 0.9, "t_end": 0.1}], ids=["whole", "part"])
def test_a_spacing_that_gives_another_number_of_times_is_refused(ends: dict[str, float]) -> None:
    said = r"spacing 'trailing' gave times of shape \(2,\); it must give [56]"
    with pytest.raises(ValueError, match=said):
        VP.grid(TwoTimes(), 5, **ends)
