import pytest
import torch
from torch import Tensor

from server.engine.state.noise import Variation, stage_noise, start_noise, varied_noise


def test_start_noise_is_what_diffusers_draws_for_a_seed():
    generator = torch.Generator("cpu").manual_seed(123)
    expected = torch.randn((1, 4, 16, 16), generator=generator)[0]
    assert torch.equal(start_noise(123, (4, 16, 16)), expected)


def test_stage_noise_is_unit_and_repeatable_and_differs_by_seed_and_stage():
    shape = (4, 64, 64)
    here = stage_noise(5, 3, shape)
    assert torch.equal(here, stage_noise(5, 3, shape))
    for other in (stage_noise(5, 4, shape), stage_noise(6, 3, shape), start_noise(5, shape)):
        correlation = (here * other).mean()
        assert abs(correlation) < 4 / here.numel() ** 0.5
    assert abs(here.std() - 1) < 4 / (2 * here.numel()) ** 0.5


def test_the_largest_seed_is_taken():
    assert stage_noise(2**63 - 1, 999, (1, 2, 2)).isfinite().all()
    assert start_noise(2**63 - 1, (1, 2, 2)).isfinite().all()


def webui_slerp(val: float, low: Tensor, high: Tensor) -> Tensor:
    """AUTOMATIC1111's slerp (modules/rng.py), for noises that are not parallel."""
    low_norm = low / torch.norm(low, dim=1, keepdim=True)
    high_norm = high / torch.norm(high, dim=1, keepdim=True)
    omega = torch.acos((low_norm * high_norm).sum(1))
    so = torch.sin(omega)
    return (torch.sin((1.0 - val) * omega) / so).unsqueeze(1) * low + (
        torch.sin(val * omega) / so
    ).unsqueeze(1) * high


def webui_resized(noise: Tensor, x: Tensor) -> Tensor:
    """AUTOMATIC1111's noise of another size (modules/rng.py, `ImageRNG.first`)."""
    x = x.clone()
    dx = (x.shape[2] - noise.shape[2]) // 2
    dy = (x.shape[1] - noise.shape[1]) // 2
    w = noise.shape[2] if dx >= 0 else noise.shape[2] + 2 * dx
    h = noise.shape[1] if dy >= 0 else noise.shape[1] + 2 * dy
    tx = 0 if dx < 0 else dx
    ty = 0 if dy < 0 else dy
    dx = max(-dx, 0)
    dy = max(-dy, 0)
    x[:, ty : ty + h, tx : tx + w] = noise[:, dy : dy + h, dx : dx + w]
    return x


def test_a_variation_turns_the_noise_as_automatic1111_does():
    shape = (4, 16, 12)
    low, high = start_noise(5, shape), start_noise(9, shape)
    made = varied_noise(5, shape, Variation(9, 0.2))
    torch.testing.assert_close(made, webui_slerp(0.2, low, high))
    assert torch.equal(varied_noise(5, shape), low)
    torch.testing.assert_close(varied_noise(5, shape, Variation(9, 1.0)), high)
    torch.testing.assert_close(varied_noise(5, shape, Variation(5, 0.5)), low)
    # Columns of a single cell are parallel, with no arc between them.
    assert varied_noise(5, (4, 1, 12), Variation(9, 0.5)).isfinite().all()


@pytest.mark.parametrize("inner", [(4, 8, 20), (4, 21, 7), (4, 16, 12)])
def test_the_noise_of_another_size_is_in_the_middle_as_in_automatic1111(inner):
    shape = (4, 16, 12)
    noise = webui_slerp(0.3, start_noise(5, inner), start_noise(9, inner))
    made = varied_noise(5, shape, Variation(9, 0.3), inner)
    torch.testing.assert_close(made, webui_resized(noise, start_noise(5, shape)))
