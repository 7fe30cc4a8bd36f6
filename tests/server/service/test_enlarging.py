"""A second run from enlarged latents equals the same two runs by the library's loop."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from samplers import Plan, integrate, preconditioning
from samplers.euler import Euler
from server.engine.state.noise import start_noise
from server.engine.tick.preview import to_uint8
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.requests.hires import UPSCALER_LABELS, Upscaler
from server.requests.schema import GenerateRequest
from server.service.enlarging import OF_LATENTS, enlarged_latents
from server.service.service import Service
from server.settings import Limits
from tests.server.models.tiny_flux1 import SCHNELL, make
from tests.server.toy_model import Toy, started

CLOSE = 1
"""Steps of 255 that rounding may move a pixel."""

STEPS, STRENGTH, SEED = 4, 0.75, 11


def drawn(model: HostedModel, size: tuple[int, int], hires: dict[str, Any]) -> NDArray[np.uint8]:
    """The image that a service makes with a second run."""
    engine = started(model, 8)
    service = Service(Limits())
    service.open(engine, {model.facts.name: model})
    fields = {"width": size[0], "height": size[1], "steps": STEPS, "seed": SEED, "hires": hires}
    plain = {"prompt": "a fox", "sampler": "euler", "guidance": "none"}
    request = GenerateRequest.model_validate(plain | fields)

    async def run() -> bytes:
        generation = await service.admit(request, "one")
        try:
            return (await service.pictures(generation)).pictures[0].data
        finally:
            service.release(generation)

    try:
        return np.asarray(Image.open(io.BytesIO(asyncio.run(run()))))
    finally:
        service.close()
        engine.stop(0)


class ByHand:
    """Runs of a model without an engine or an autoencoder between them."""

    def __init__(self, model: HostedModel) -> None:
        self.model = model

    def plan(self, size: tuple[int, int], strength: float = 1.0) -> Plan:
        sampler = Euler()
        grid = self.model.schedule(*size, STEPS).grid(sampler.default_spacing, STEPS)
        return sampler.plan(grid.tail(strength))

    def noise(self, size: tuple[int, int]) -> Tensor:
        return start_noise(SEED, self.model.latent_shape(*size))[None]

    def run(self, plan: Plan, x: Tensor, size: tuple[int, int]) -> Tensor:
        inputs = self.model.inputs(["a fox"], *size)
        kind = self.model.facts.prediction
        scales = preconditioning(kind, plan.alpha[:-1], plan.sigma[:-1])
        stages = iter(range(plan.evaluations))

        def denoised(x: Tensor, t: float) -> Tensor:
            i = next(stages)
            told = torch.tensor([float(self.model.network_time(np.array(t)))])
            raw = self.model.evaluate(float(scales.scale_in[i]) * x, told, inputs)
            return float(scales.skip[i]) * x + float(scales.out[i]) * raw

        return integrate(plan, denoised, x)

    def both(self, size: tuple[int, int], larger: tuple[int, int], **how: Any) -> NDArray[np.uint8]:
        """Both runs, with the latents interpolated between them."""
        first, second = self.plan(size), self.plan(larger, STRENGTH)
        with torch.inference_mode():
            latents = self.run(first, first.start_scale * self.noise(size), size)
            cells = self.model.latent_shape(*larger)[1:]
            latents = F.interpolate(latents, cells, **how)
            x = float(second.alpha[0]) * latents + float(second.sigma[0]) * self.noise(larger)
            return to_uint8(self.model.decode(self.run(second, x, larger)))[0].numpy()


@pytest.mark.parametrize("upscaler", OF_LATENTS)
def test_latents_are_enlarged_and_drawn_on_as_by_hand(upscaler: Upscaler) -> None:
    """With the interpolation that AUTOMATIC1111's name for the upscaler states."""
    label = UPSCALER_LABELS[upscaler].removeprefix("Latent").strip(" ()")
    mode = label.removesuffix("antialiased").strip() or "bilinear"
    how = {"mode": mode, "antialias": label.endswith("antialiased")}
    model, small, large = Toy(), (32, 32), (56, 56)
    hires = {"width": 56, "height": 56, "strength": STRENGTH, "upscaler": upscaler}
    apart = drawn(model, small, hires).astype(int) - ByHand(model).both(small, large, **how)
    assert np.abs(apart).max() <= CLOSE


def test_so_are_those_that_a_transformer_reads_in_packed_tokens(tmp_path: Path) -> None:
    make(SCHNELL, guided=False).save_pretrained(tmp_path)
    model = load_model(tmp_path, name="flux", device="cpu", dtype="float32")
    hires = {"scale": 1.5, "strength": STRENGTH, "upscaler": "latent"}
    expected = ByHand(model).both((64, 64), (96, 96), mode="bilinear")
    apart = drawn(model, (64, 64), hires).astype(int) - expected
    assert np.abs(apart).max() <= CLOSE


def test_in_other_proportions_the_middle_of_the_latents_is_kept() -> None:
    """As AUTOMATIC1111 truncates them: 3 of 6 cells are removed, the odd one at the end."""
    latents = torch.arange(8.0).view(1, 1, 8).expand(4, 4, 8)
    wide = enlarged_latents(latents, (6, 9), "latent_nearest_exact")
    whole = F.interpolate(latents[None], (6, 12), mode="nearest-exact")[0]
    assert torch.equal(wide, whole[:, :, 1:10])
    high = enlarged_latents(latents.mT, (9, 6), "latent_nearest_exact")
    assert torch.equal(high, wide.mT)
