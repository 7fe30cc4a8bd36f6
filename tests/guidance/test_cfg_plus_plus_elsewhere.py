"""CFG++ with our samplers compared with ComfyUI's samplers that contain it, in float64."""

import pytest
import torch
from torch import Tensor

from guidance.cfg_plus_plus import CFGPlusPlus
from guidance.loop import guide
from samplers import NoiseSchedule, integrate
from samplers.euler import EulerAncestral
from samplers.gaussian import GaussianDenoiser
from samplers.timesteps import Trailing
from tests.samplers.cases import EDM, FLOW

NOISE = torch.randn(6, 1, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SCALE = 0.7


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [EDM, FLOW], ids=["edm", "flow"])
def test_euler_is_theirs(schedule: NoiseSchedule, eta: float) -> None:
    """sample_euler_ancestral_cfg_pp, which is sample_euler_cfg_pp at eta 0."""
    cond, other = GaussianDenoiser(schedule, 0.7, 0.3), GaussianDenoiser(schedule, -0.2, 0.6)
    # ComfyUI's has no step from pure noise.
    grid = schedule.grid(Trailing(), 6).tail(0.8)
    start = x = grid.start_scale * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[None]
    alpha, sigma = grid.alpha.tolist(), grid.sigma.tolist()
    for i in range(grid.steps):
        t = float(grid.t[i])
        Dc, Du = cond(x, t), other(x, t)
        D = Du + SCALE * (Dc - Du)
        if sigma[i + 1] == 0:
            x = D
            break
        d = (x - alpha[i] * Du) / sigma[i]
        r, to = sigma[i] / alpha[i], sigma[i + 1] / alpha[i + 1]
        up = min(to, eta * (to**2 * (r**2 - to**2) / r**2) ** 0.5)
        x = alpha[i + 1] * (D + (to**2 - up**2) ** 0.5 * d + up * NOISE[i])
    levels = iter(zip(alpha, sigma, strict=True))

    def denoise(x: Tensor, t: float) -> Tensor:
        guided = guide(CFGPlusPlus(scale=SCALE), cond(x, t), [other(x, t)], x, *next(levels))
        x.copy_(guided.x)
        return guided.denoised

    plan = EulerAncestral(eta=eta).plan(grid)
    ours = integrate(plan, denoise, start, NOISE.__getitem__)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)
