import torch

from server.engine.state.noise import stage_noise, start_noise


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
