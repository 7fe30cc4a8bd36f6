"""The table, the function that applies it, and the reference loop."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from samplers import Columns, Grid, NoiseSchedule, Plan, advance, integrate
from samplers.ddim import DDIM
from samplers.heun import Heun
from samplers.timesteps import Trailing
from tests.samplers.cases import DISCRETE, FEW_VARIANTS, label, spacing_named


def elementwise(plan: Plan, shape: tuple[int, ...]) -> Plan:
    """The same plan with each coefficient repeated over the elements of a latent."""
    tables = np.broadcast_to(
        plan.tables.reshape(*plan.tables.shape, *[1] * len(shape)), (*plan.tables.shape, *shape)
    )
    return replace(plan, tables=tables)


def test_elementwise_tables_equal_scalar_ones() -> None:
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sampler in FEW_VARIANTS:
        scalar = sampler.plan(DISCRETE.grid(spacing_named(sampler.default_spacing), 5))
        spread = elementwise(scalar, (2, 3, 3))
        assert (scalar.elementwise, spread.elementwise) == (False, True)
        assert spread.noisy == scalar.noisy
        fresh = torch.randn(scalar.evaluations, 2, 2, 3, 3, dtype=torch.float64)
        ours, theirs = (
            integrate(plan, lambda x, _: torch.tanh(x), x, fresh.__getitem__)
            for plan in (scalar, spread)
        )
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12), label(sampler)


def test_weights_are_what_each_prediction_counts_in_the_landing() -> None:
    for sampler in FEW_VARIANTS:
        plan = sampler.plan(DISCRETE.grid(spacing_named(sampler.default_spacing), 4))
        zeros = torch.zeros(plan.evaluations, 1, 1, 1, 1, dtype=torch.float64)
        for stage, weight in enumerate(plan.weights):
            one = zeros.clone()
            one[stage] = 1
            predicted = iter(one)
            landing = integrate(
                plan,
                lambda *_, predicted=predicted: next(predicted),
                zeros[0],
                zeros.__getitem__,
            )
            assert float(landing) == pytest.approx(weight, abs=1e-9), label(sampler)
        assert plan.weights.sum() == pytest.approx(1, abs=1e-3), label(sampler)


def test_elementwise_coefficients_act_on_their_own_element() -> None:
    columns = Columns("x", latent_dims=1)
    factor = np.array([1.0, 2.0, 3.0])
    table = columns.table(x=factor * columns["x"] + 10 * factor * columns.one)
    assert table.shape == (1, 4, 3)
    moved = advance(torch.ones(1, 3, 3), torch.from_numpy(table)[None].float())
    assert moved.tolist() == [[[11, 22, 33]]]


def test_arithmetic_on_columns_is_a_matrix() -> None:
    columns = Columns("x", "old")
    table = columns.table(
        x=0.5 * columns["x"] + 2 * columns.denoised - columns.noise + 3 * columns.one,
        old=columns["x"],
    )
    assert table.tolist() == [[0.5, 0, 2, -1, 3], [1, 0, 0, 0, 0]]
    assert columns.table(x=columns["x"])[1].tolist() == [0, 0, 0, 0, 0]


def test_a_slot_that_is_not_there_is_refused() -> None:
    columns = Columns("x")
    with pytest.raises(KeyError, match=r"\['y'\] are not slots; the slots are \['x'\]"):
        columns.table(y=columns["x"])


def test_advance_is_the_matrix_product_of_the_design() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    columns = torch.randn(3, 4, 2, 2, 2, generator=generator, dtype=torch.float64)
    ones = torch.ones(3, 1, 2, 2, 2, dtype=torch.float64)
    expected = torch.einsum("rij,rjchw->richw", tables, torch.cat([columns, ones], 1))
    torch.testing.assert_close(advance(columns, tables), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2, 2)], ids=str)
def test_a_state_may_have_any_shape(shape: tuple[int, ...]) -> None:
    plan = DDIM().plan(DISCRETE.grid(Trailing(), 4))
    landed = integrate(plan, lambda x, _: torch.full_like(x, 0.3), torch.ones(2, *shape))
    torch.testing.assert_close(landed, torch.full((2, *shape), 0.3))


def test_stochastic_plans_need_noise() -> None:
    plan = DDIM(eta=1).plan(DISCRETE.grid(Trailing(), 4))
    with pytest.raises(ValueError, match="noise is missing; this sampler is stochastic"):
        integrate(plan, lambda x, _: x, torch.zeros(1, 1))


def test_a_start_of_whole_numbers_is_refused_where_it_would_be_cut_to_zeros() -> None:
    plan = DDIM().plan(DISCRETE.grid(Trailing(), 4))
    with pytest.raises(ValueError, match=r"x_start is of type torch\.int64; a floating type is"):
        integrate(plan, lambda x, _: x, torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 0)], ids=str)
def test_a_start_without_elements_is_refused(shape: tuple[int, ...]) -> None:
    plan = DDIM().plan(DISCRETE.grid(Trailing(), 4))
    with pytest.raises(ValueError, match=r"x_start has shape .*; it must be \[rows, \.\.\.\] with"):
        integrate(plan, lambda x, _: x, torch.zeros(shape))


def test_noise_is_asked_for_at_noisy_stages_alone() -> None:
    asked: list[int] = []
    plan = DDIM(eta=1).plan(DISCRETE.grid(Trailing(), 4))
    integrate(
        plan, lambda x, _: x, torch.zeros(1, 1), lambda i: (asked.append(i), torch.ones(1, 1))[1]
    )
    assert asked == [0, 1, 2]


def test_the_start_is_left_alone_and_its_type_is_kept() -> None:
    start = torch.ones(2, 3, dtype=torch.float32)
    landed = integrate(DDIM().plan(DISCRETE.grid(Trailing(), 4)), lambda x, _: 0.5 * x, start)
    assert landed.dtype == torch.float32
    assert landed.shape == start.shape
    assert start.tolist() == torch.ones(2, 3).tolist()
    assert landed._base is None


def test_stages_know_their_noise_ratio_and_how_much_of_the_run_is_done() -> None:
    schedule = NoiseSchedule.flow()
    plan = Heun().plan(Grid.on_times(schedule, np.array([1.0, 0.5, 0.25]), clean=True))
    # On flow matching sigma = t and alpha = 1 - t; Heun evaluates twice in each step but the last.
    assert plan.noise_ratio == pytest.approx([np.inf, 1, 1, 1 / 3, 1 / 3])
    assert plan.progress == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"t": np.ones(3)}, r"a plan's t has shape \(3,\); 4 stages have 5 points."),
        ({"sigma": np.ones(4)}, r"a plan's sigma has shape \(4,\); 4 stages have 5 points."),
        ({"step": (0, 1)}, "a plan's step has 2 entries; it has 4 stages."),
        ({"tables": np.ones((4, 1, 2))}, r"shape \(4, 1, 2\); they are \[stages, K, K \+ 3\]."),
        ({"tables": np.ones(4)}, r"shape \(4,\); they are \[stages, K, K \+ 3\]."),
        ({"tables": np.ones((0, 1, 4))}, "a plan has at least one stage."),
    ],
    ids=["t", "sigma", "step", "too few columns", "no matrices", "no stages"],
)
def test_a_plan_whose_shapes_do_not_agree_is_refused(change: dict[str, Any], said: str) -> None:
    plan = DDIM().plan(DISCRETE.grid(Trailing(), 4))
    with pytest.raises(ValueError, match=said):
        replace(plan, **change)
