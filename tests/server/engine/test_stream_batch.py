"""Frames of a stream in the engine equal StreamDiffusion's recursion over its stream batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from numpy.typing import NDArray
from torch import Tensor

from embedded import MODEL_FOLDER
from guidance.cfg import CFG
from guidance.residual import Residual
from samplers.lcm import LCM
from server.engine.engine import Engine
from server.engine.scheduler import Priority
from server.engine.state.noise import stage_noise, start_noise
from server.engine.task import ImageTask, Stream
from server.engine.tick.preview import to_uint8
from server.models.hosted import HostedModel
from tests.server.engine.conftest import SIDE

FRAMES = 5
GAMMA, DELTA, SEED = 1.4, 0.8, 11
PROMPT, NEGATIVE = "a large blue square", "a small red circle on a white background"

Make = Callable[..., ImageTask]


def frames() -> list[Tensor]:
    """A bar that moves over a plain ground."""
    drawn: list[Tensor] = []
    for k in range(FRAMES):
        frame = torch.full((3, SIDE, SIDE), 0.2 * k - 0.5)
        frame[:, 20:70, 10 * k : 10 * k + 40] = torch.tensor([0.9, -0.5, -0.5])[:, None, None]
        drawn.append(frame)
    return drawn


class PublishedStream:
    """The authors' pipeline: each frame enters a batch of one row a stage, and one row leaves.

    ``stock`` stands in for the second prediction of each row's noise. It moves along with its row,
    is updated after each stage from the result of that stage, and is replaced at the first one.
    """

    def __init__(self, model: HostedModel, times: list[int], kind: str) -> None:
        scheduler: Any = LCMScheduler.from_pretrained(MODEL_FOLDER, subfolder="scheduler")
        level = scheduler.alphas_cumprod[times]
        boundary = scheduler.get_scalings_for_boundary_condition_discrete
        scalings = torch.tensor([boundary(t) for t in times])
        self.c_skip, self.c_out = (_column(one) for one in scalings.T)
        self.alpha, self.beta = _column(level.sqrt()), _column((1 - level).sqrt())
        self.model, self.times, self.kind = model, torch.tensor(times).float(), kind
        shape = model.latent_shape(SIDE, SIDE)
        fresh = [stage_noise(SEED, stage, shape) for stage in range(len(times) - 1)]
        self.noise = torch.stack([start_noise(SEED, shape), *fresh])
        self.under_way = torch.zeros(len(times) - 1, *shape)
        self.stock = torch.zeros_like(self.noise)

    def push(self, latents: Tensor) -> Tensor:
        """Take in a frame; return clean latents of the one that entered ``stages - 1`` earlier."""
        newest = self.alpha[0] * latents + self.beta[0] * self.noise[0]
        x = torch.cat([newest[None], self.under_way])
        self.stock = torch.cat([self.noise[:1], self.stock[:-1]])
        if self.kind == "full":
            self.stock = self._noise_of(x, self.times, NEGATIVE)
        elif self.kind == "onetime":
            first = self._noise_of(x[:1], self.times[:1], NEGATIVE)
            self.stock = torch.cat([first, self.stock[1:]])
        told = self._noise_of(x, self.times, PROMPT)
        other = self.stock if self.kind == "full" else DELTA * self.stock
        guided = other + GAMMA * (told - other)
        clean = self._step(guided, x)
        left_over = self._step(guided, self.beta * self.stock)
        onward = _one_on(self.alpha) * left_over / _one_on(self.beta)
        self.stock = torch.cat([self.noise[1:], self.noise[:1]]) + onward
        self.under_way = self.alpha[1:] * clean[:-1] + self.beta[1:] * self.noise[1:]
        return clean[-1]

    def _step(self, noise: Tensor, x: Tensor) -> Tensor:
        return self.c_out * (x - self.beta * noise) / self.alpha + self.c_skip * x

    def _noise_of(self, x: Tensor, times: Tensor, text: str) -> Tensor:
        raw = self.model.evaluate(x, times, self.model.inputs([text] * len(x)))
        if self.model.facts.prediction == "v_prediction":
            return self.alpha[: len(x)] * raw + self.beta[: len(x)] * x
        assert self.model.facts.prediction == "epsilon"
        return raw


def _column(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1, 1)


def _one_on(levels: Tensor) -> Tensor:
    return torch.cat([levels[1:], torch.ones_like(levels[:1])])


def expected(model: HostedModel, times: list[int], kind: str) -> NDArray[np.int64]:
    with torch.inference_mode():
        published = PublishedStream(model, times, kind)
        latents = model.encode_image(torch.stack(frames()))
        # One more frame for each stage but the first lets the last one out.
        pushed = [published.push(one) for one in [*latents, *latents[: len(times) - 1]]]
        decoded = model.decode(torch.stack(pushed[len(times) - 1 :]))
        return to_uint8(decoded).numpy().astype(int)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("self", Residual(mode="self", delta=DELTA)),
        ("onetime", Residual(mode="onetime", delta=DELTA)),
        ("full", "always"),
    ],
)
def test_frames_under_way_at_all_stages_are_those_of_the_published_stream_batch(
    engine: Engine, model: HostedModel, task: Make, listen: Any, kind: str, policy: Any
) -> None:
    stream = Stream()
    made = [
        task(
            sampler=LCM(),
            rule=CFG(scale=GAMMA),
            policy=policy,
            steps=4,
            strength=0.75,
            image=frame,
            seed=SEED,
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            priority=Priority.LIVE,
            stream=stream,
        )
        for frame in frames()
    ]
    hearings: list[Any] = []
    for one in made:
        hearings.append(listen(1))
        engine.submit([one], hearings[-1])
        assert hearings[-1].begun.wait(60)
    times = [round(float(t)) for t in made[0].plan.t[:-1]]
    ours = np.stack([hearing.pixels()[0] for hearing in hearings]).astype(int)
    assert np.abs(ours - expected(model, times, kind)).max() <= 1
