"""What a run starts from: pure noise, or a picture of which a part is repainted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from samplers import NoiseSchedule, preconditioning
from samplers.euler import Euler
from server.engine.state.noise import start_noise
from server.engine.task import RepaintedFrom
from tests.server.by_hand import task
from tests.server.toy_model import SIDE, Toy, run, started

CELLS = SIDE // 8


def test_noise_is_as_loud_as_the_noisiest_level_of_the_run() -> None:
    """On a schedule whose levels do not start at one, with a picture and without."""
    plan = Euler().plan(NoiseSchedule.edm().grid("karras", 2))
    nothing = replace(task(), plan=plan)
    beside = replace(nothing, image=torch.zeros(3, SIDE, SIDE), from_noise=True)
    model = Toy()
    engine = started(model, 8)
    model.seen.clear()
    run(engine, [nothing, beside])
    engine.stop(0)
    scale_in = float(preconditioning("epsilon", plan.alpha[:-1], plan.sigma[:-1]).scale_in[0])
    x = scale_in * 80 * start_noise(nothing.seed, (4, CELLS, CELLS))
    torch.testing.assert_close(model.seen[0], x.expand_as(model.seen[0]))


@pytest.mark.parametrize("content", ["image", "noise", "nothing"])
def test_a_run_starts_from_what_is_asked_for_and_keeps_the_rest(content: RepaintedFrom) -> None:
    """As AUTOMATIC1111 does with `init_latent` and its two masks (modules/processing.py)."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((3, SIDE, SIDE), generator=generator) * 2 - 1
    mask = torch.zeros(SIDE, SIDE)
    mask[:, : SIDE // 2] = 1
    one = task(image=image, mask=mask, kept=-image, repainted_from=content)
    model = Toy()
    engine = started(model, 8)
    model.seen.clear()
    result = run(engine, [one]).results[0]
    engine.stop(0)
    noise = start_noise(one.seed, (4, CELLS, CELLS))
    own = model.encode_image(image[None])[0]
    inside = {"image": own, "noise": noise, "nothing": torch.zeros_like(own)}[content]
    latents = torch.where(torch.arange(CELLS) < CELLS // 2, inside, own)
    x = float(one.plan.alpha[0]) * latents + float(one.plan.sigma[0]) * noise
    scales = preconditioning("epsilon", one.plan.alpha[:-1], one.plan.sigma[:-1])
    torch.testing.assert_close(model.seen[0][0], float(scales.scale_in[0]) * x)
    # The network sees the kept part at the noise level of each stage.
    assert len(model.seen) == one.plan.evaluations
    for stage, shown in enumerate(model.seen):
        level = float(one.plan.alpha[stage]) * own + float(one.plan.sigma[stage]) * noise
        kept = float(scales.scale_in[stage]) * level[..., CELLS // 2 :]
        torch.testing.assert_close(shown[0][..., CELLS // 2 :], kept)
    # Where the mask keeps pixels unchanged, they are those of the uploaded picture.
    expected = ((1 - image) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    right = torch.from_numpy(result.pixels)[:, SIDE // 2 :]
    assert (right.int() - expected[:, SIDE // 2 :].int()).abs().max() <= 1
