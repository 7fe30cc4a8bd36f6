"""The Langevin move: the nonlinear stage."""

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import Columns, Plan, advance, integrate
from samplers.ddim import DDIM
from samplers.langevin import corrected
from samplers.timesteps import Trailing
from tests.samplers.cases import VP


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalars(rows: int, snr: float, alpha: float = 0.8, sigma: float = 0.6) -> Tensor:
    return torch.tensor([[snr, alpha, sigma]], dtype=torch.float64).expand(rows, 3)


def test_it_is_the_corrector_of_algorithms_4_and_5_with_norms_of_each_row() -> None:
    columns = drawn(3, 4, 2, 5, 5)
    moved = corrected(columns, scalars(3, 0.16))
    for row in range(3):
        x, D, z = columns[row, 0], columns[row, 2], columns[row, 3]
        score = (0.8 * D - x) / 0.6**2
        e = 2 * (0.16 * z.norm() / score.norm()) ** 2
        expected = x + e * score + (2 * e).sqrt() * z
        torch.testing.assert_close(moved[row, 0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved[:, 1:], columns[:, 1:], rtol=0, atol=0)


def test_rows_without_it_keep_their_bits_and_the_given_columns_are_left_alone() -> None:
    columns, tables = drawn(2, 4, 2, 3, 3).float(), drawn(2, 2, 5, seed=1).float()
    before = columns.clone()
    langevin = torch.tensor([[0.0, 0.8, 0.6], [0.16, 0.8, 0.6]])
    mixed = advance(columns, tables, langevin)
    linear = advance(columns, tables)
    assert torch.equal(columns, before)
    assert torch.equal(mixed[0], linear[0])
    assert not torch.equal(mixed[1], linear[1])


def test_where_there_is_no_score_x_stays() -> None:
    columns = drawn(1, 3, 4)
    columns[:, 0] = 0.8 * columns[:, 1]
    assert torch.equal(corrected(columns, scalars(1, 0.16)), columns)


def test_a_row_that_is_not_a_number_stays_so_and_alone() -> None:
    columns = drawn(2, 3, 4)
    columns[0, 1] = torch.nan
    moved = corrected(columns, scalars(2, 0.16))
    assert moved[0, 0].isnan().all()
    assert moved[1].isfinite().all()


@pytest.mark.parametrize("snr", [0.16, 0.4])
def test_a_gaussian_keeps_its_mean_and_its_variance_to_the_fourth_power_of_snr(snr: float) -> None:
    """For the exact score of N(m, v), one move gives variance v (1 + 4 snr^4), many v (1 + snr^2).

    This is exact where the norms equal their means, as they nearly do over many elements.
    """
    rows, size, mean, variance = 16, 16_384, 0.3, 0.7
    alpha, sigma = 0.8, 0.6
    x = mean + variance**0.5 * drawn(rows, size)
    error = (2 / x.numel()) ** 0.5

    def moved(x: Tensor, seed: int) -> Tensor:
        # The denoiser that has this score.
        D = (x - sigma**2 * (x - mean) / variance) / alpha
        columns = torch.stack([x, D, drawn(rows, size, seed=seed)], 1)
        return corrected(columns, scalars(rows, snr, alpha, sigma))[:, 0]

    once = moved(x, 1)
    assert abs(float(once.mean()) - mean) < 5 * (variance / x.numel()) ** 0.5
    assert abs(float(once.var()) / variance - (1 + 4 * snr**4)) < 5 * error
    # Each move brings the variance nearer to its limit by a fraction of 4 snr^2.
    moves = int(2 / snr**2)
    for seed in range(2, 2 + moves):
        x = moved(x, seed)
    assert abs(float(x.var()) / variance - (1 + snr**2)) < 6 * error
    assert abs(float(x.mean()) - mean) < 6 * (variance / x.numel()) ** 0.5


@pytest.mark.parametrize("size", [1, 2])
def test_in_few_dimensions_the_length_of_a_move_has_a_heavy_tail(size: int) -> None:
    """``P(length > r)`` falls as r^-d, as does the probability of a score shorter than 1 / r."""
    rows = 400_000
    x, z = drawn(rows, size), drawn(rows, size, seed=1)
    columns = torch.stack([x, torch.zeros_like(x), z], 1)
    length = (corrected(columns, scalars(rows, 0.16, sigma=1.0))[:, 0] - x).norm(dim=1)
    far = length.quantile(0.98)
    beyond = float((length > 4 * far).sum() / (length > far).sum())
    assert beyond == pytest.approx(4.0**-size, rel=0.15)


def test_a_plan_says_which_stages_make_it_and_that_they_draw_noise() -> None:
    columns = Columns("x")
    stay = columns.table(x=columns["x"])
    level = np.array([0.6, 0.6, 0.6])
    plan = Plan(level, 0.8 * level / 0.6, level, np.stack([stay, stay]), (0, 1), 1.0, (0.0, 0.2))
    assert plan.noisy == (False, True)
    x = drawn(2, 3, 4)
    z = drawn(2, 3, 4, seed=1)
    landed = integrate(plan, lambda x, _: torch.tanh(x), x, lambda _: z)
    expected = corrected(torch.stack([x, torch.tanh(x), z], 1), scalars(2, 0.2))[:, 0]
    torch.testing.assert_close(landed, expected, rtol=1e-13, atol=1e-13)


def test_a_plan_of_matrices_makes_none() -> None:

    assert DDIM().plan(VP.grid(Trailing(), 3)).langevin == (0.0, 0.0, 0.0)
