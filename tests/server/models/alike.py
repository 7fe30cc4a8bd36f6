"""What tests of model families request from a model, and how they compare latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guidance.edits import SkippedBlocks
from server.engine.state.noise import start_noise
from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits


def task_of(model: HostedModel, *, image: Tensor | None = None, **fields: Any) -> ImageTask:
    """The task of a request of one image, whose fields are those of a JSON body.

    Args:
        model: model that will serve it.
        image: picture to start from, ``[3, H, W]`` in [-1, 1].
        fields: fields of the request.
    """
    request = GenerateRequest.model_validate(fields)
    size = None if image is None else (image.shape[-1], image.shape[-2])
    resolved = resolve(request, model, Limits(), size)
    schedule = model.schedule(resolved.width, resolved.height, resolved.steps)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    prepared = prepare(resolved, model, make_plan(schedule, *layout))
    [task] = tasks_of(prepared, model, image=image)
    return task


def as_diffusers(prompt: str, width: int, height: int, steps: int) -> dict[str, Any]:
    """Fields of a request that draws as a pipeline of Stable Diffusion does by itself."""
    return {
        "prompt": prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "seed": 5,
        "sampler": "euler",
        "spacing": {"name": "leading", "offset": 1},
        "guidance": {"name": "cfg", "scale": 5.0},
    }


def their_start(pipeline: Any, steps: int, shape: tuple[int, ...], seed: int = 5) -> Tensor:
    """The latents ``[1, C, h, w]`` for a pipeline that starts from the same x as ours.

    Args:
        pipeline: pipeline of Stable Diffusion, with Euler's method.
        steps: steps of its run.
        shape: shape of the latent of one image.
        seed: seed of the image.
    """
    pipeline.scheduler.set_timesteps(steps)
    sigma = float(pipeline.scheduler.sigmas[0])
    x = start_noise(seed, shape)[None] * (1 + sigma**2) ** 0.5
    return x / float(pipeline.scheduler.init_noise_sigma)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_among(seen: list[Tensor], expected: Tensor) -> None:
    errors = [difference(one, expected) for one in seen if one.shape == expected.shape]
    assert min(errors) < 1e-4, errors


def assert_apart(ours: Tensor, sprung: Tensor) -> None:
    """Check that a mistake would be visible; a test that avoids it would show nothing otherwise."""
    assert difference(sprung, ours) > 1e-2


@torch.inference_mode()
def assert_skipped(model: HostedModel, x: Tensor, prompt: str, blocks: str) -> None:
    """Check that a row that skips a list's only block equals a network without that block."""
    t, inputs = torch.full((2,), 500.0), model.inputs([prompt, prompt])
    rows = torch.stack([x, x])
    edits = [(SkippedBlocks((f"{blocks}.0",)),), ()]
    skipped, plain = model.evaluate(rows, t, replace(inputs, edits=edits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.modules()["transformer"]._modules, blocks, nn.ModuleList())
        without, _ = model.evaluate(rows, t, inputs)
    torch.testing.assert_close(skipped, without)
    assert_apart(plain, without)
