"""A model of a few lines; each row depends on all of its inputs, and on no other row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guidance import Edit
from guidance.edits import ApartFrom, WeakModel
from samplers import NoiseSchedule
from server.engine.engine import Engine
from server.engine.state.sequence import ImageResult
from server.engine.task import ImageTask
from server.models.adapters.adapter import RowAdapters
from server.models.conditioning import Conditioning
from server.models.hosted import HostedModel, ModelFacts
from server.models.inputs import RowInputs
from server.models.text_options import AS_USUAL, TextOptions
from tests.server.full_ticks import full_ticks

SIDE = 32
SCHEDULE = NoiseSchedule.from_diffusers({})
FACTS = ModelFacts(
    name="toy",
    revision="0123456789abcdef",
    denoiser="fedcba9876543210",
    prediction="epsilon",
    latent_channels=4,
    latent_scale=8,
    size_multiple=8,
    default_width=SIDE,
    default_height=SIDE,
    max_tokens=20,
    embeds_scale=True,
)


class Toy(HostedModel):
    """Records what it was shown; refuses only edits of the layer "none"."""

    def __init__(self, **facts: object) -> None:
        super().__init__(replace(FACTS, **facts), torch.device("cpu"), torch.float32)
        self.seen: list[Tensor] = []

    def schedule(self, width: int, height: int, steps: int) -> NoiseSchedule:
        return SCHEDULE

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def encode_prompts(
        self,
        prompts: Sequence[str | None],
        width: int,
        height: int,
        adapters: RowAdapters | None = None,
        options: TextOptions = AS_USUAL,
    ) -> list[Conditioning]:
        shifts = [sum(map(ord, prompt or "")) % 17 / 17 for prompt in prompts]
        return [Conditioning({"shift": torch.tensor(shift)}, 1) for shift in shifts]

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        self.seen.append(x.clone())
        shift, edits = inputs.conditioning.tensors["shift"] + t / 1000, inputs.edits
        if edits:
            assert not any(isinstance(edit, WeakModel) for row in edits for edit in row)
            names = ["".join(type(edit).__name__ for edit in row) for row in edits]
            shift = shift + torch.tensor([len(name) / 30 for name in names])
        if inputs.scale_embedding is not None:
            shift = shift + inputs.scale_embedding / 7
        return 0.9 * x + 0.3 * torch.tanh(x.roll(1, 1) + shift[:, None, None, None])

    def evaluate_weak(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        return 0.8 * x + 0.1 * inputs.conditioning.tensors["shift"][:, None, None, None]

    def layers(self) -> tuple[str, ...]:
        return ("middle",)

    def refuses(self, edit: Edit) -> str | None:
        named = getattr(edit, "layers", ())
        return "has no layer 'none'; it has middle" if "none" in named else None

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(torch.tanh(latents[:, :3]), scale_factor=8.0)

    def encode_image(self, pixels: Tensor) -> Tensor:
        small = F.avg_pool2d(pixels, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


class Neighbourly(Toy):
    """A toy whose rows respond to the row that they are to keep apart from."""

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        plain = [
            tuple(edit for edit in own if not isinstance(edit, ApartFrom)) for own in inputs.edits
        ]
        raw = super().evaluate(x, t, replace(inputs, edits=plain))
        moved = raw.clone()
        for row, own in enumerate(inputs.edits):
            for edit in own:
                if isinstance(edit, ApartFrom):
                    assert edit.reference is not None
                    assert edit.reference != row
                    # As in a network, where a NaN is similar to no token, it moves nothing.
                    away = (raw[row] - raw[edit.reference]).nan_to_num()
                    moved[row] += edit.strength * away / 4
        return moved


class Ear:
    """A listener of a submission."""

    def __init__(self, images: int) -> None:
        self.results: dict[int, ImageResult] = {}
        self.errors: dict[int, Exception] = {}
        self.steps: list[tuple[int, int]] = []
        self._images = images
        self._ended = Event()

    def started(self, index: int) -> None: ...

    def progress(self, index: int, step: int, steps: int, preview: object) -> None:
        self.steps.append((index, step))

    def finished(self, index: int, result: ImageResult) -> None:
        self.results[index] = result
        self._end()

    def failed(self, index: int, error: Exception) -> None:
        self.errors[index] = error
        self._end()

    def _end(self) -> None:
        if len(self.results) + len(self.errors) == self._images:
            self._ended.set()

    def wait(self) -> Ear:
        assert self._ended.wait(60), "the engine did not answer"
        return self


def started(model: HostedModel, row_budget: int | None, **options: Any) -> Engine:
    engine = Engine({model.facts.name: model}, row_budget=row_budget, **options)
    with full_ticks():
        engine.start()
        while not engine.ready:
            assert engine.failure is None, engine.failure
            Event().wait(0.01)
    return engine


def run(engine: Engine, tasks: Sequence[ImageTask]) -> Ear:
    ear = Ear(len(tasks))
    engine.submit(tasks, ear)
    return ear.wait()


Task = Callable[..., ImageTask]
