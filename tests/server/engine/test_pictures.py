"""Each picture is encoded once per request, along with those of others, and fails alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.engine.state.sequence import Sequence
from server.engine.state.submission import Submission
from server.engine.tick.pictures import ENCODER_BATCH, MIN_PIXELS, TickPictures
from server.models.controls.control import Control, ControlUse
from server.models.image_prompts.image_prompt import UNLOADED, ImagePromptUse
from tests.server.engine.conftest import SIDE


class Counting:
    """The real model, which counts the pictures it encodes and refuses a black one."""

    def __init__(self, model):
        self._model = model
        self.batches: list[int] = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def encode_image(self, pixels):
        self.batches.append(len(pixels))
        if (pixels == -1).flatten(1).all(1).any():
            raise RuntimeError("cannot encode this")
        return self._model.encode_image(pixels)


def picture(grey: float) -> torch.Tensor:
    return torch.full((3, SIDE, SIDE), grey)


@pytest.fixture
def counting(model):
    return Counting(model)


def from_picture(task, image, seed):
    return task(rule="none", image=image, strength=0.5, steps=2, seed=seed)


def test_the_images_of_a_request_share_one_encoding_of_their_picture(start, counting, task, run):
    engine = start(model=counting)
    counting.batches.clear()
    image = picture(0.5)
    tasks = [from_picture(task, image, seed) for seed in range(20)]
    pixels = run(engine, tasks).pixels()
    assert counting.batches == [1], "though more came than a tick takes in"
    alone = run(start(), [tasks[7]]).pixels()[0]
    assert np.abs(pixels[7].astype(int) - alone.astype(int)).max() <= 2


def test_pictures_of_several_requests_are_encoded_together_and_fail_alone(
    start, counting, task, listen
):
    engine = start(model=counting, max_pending=16)
    counting.batches.clear()
    first = listen(1)
    hearings = [listen(1) for _ in range(4)]

    def submit_all(step):
        if step == 1:
            for seed, (grey, heard) in enumerate(zip((0.1, 0.2, -1, 0.3), hearings, strict=True)):
                engine.submit([from_picture(task, picture(grey), seed)], heard)

    first.on_progress = submit_all
    engine.submit([task(rule="none", steps=3)], first)
    failed = [list(heard.wait().errors) for heard in hearings]
    assert failed == [[], [], [0], []]
    assert counting.batches == [4, 2, 2, 1, 1]
    first.wait()


def test_in_deterministic_mode_the_encoder_always_has_one_shape(start, counting, task, listen):
    engine = start(model=counting, deterministic=True)
    counting.batches.clear()
    heard = listen(3)
    engine.submit([from_picture(task, picture(0.1 * k), k) for k in range(3)], heard)
    heard.wait()
    assert set(counting.batches) == {ENCODER_BATCH}


def test_a_tick_waits_for_one_large_picture_at_most(task, listen):
    def of(submission, image, side, **uses):
        one = task(rule="none", image=image, width=side, height=side, **uses)
        return Sequence(one, 0, listen(1), submission)

    before = TickPictures()
    big, request = torch.zeros(3, 1024, 1024), Submission(2)
    first, sibling = of(request, big, 1024), of(request, big, 1024)
    assert before.take(first, due=True)
    assert before.take(sibling, due=True), "it shares the picture"
    assert not before.take(of(Submission(1), torch.zeros(3, 64, 64), 64), due=True)
    text = of(Submission(1), None, 64)
    assert before.take(text, due=False), "it has no picture to encode"
    steering = ControlUse(Control("", None, 0, 0.0), torch.zeros(3, 64, 64))
    steered = of(Submission(1), None, 64, controls=(steering,))
    assert not before.take(steered, due=True), "its ControlNet has a picture to read"
    beside = ImagePromptUse(UNLOADED, (torch.zeros(3, 64, 64),), 0)
    prompted = of(Submission(1), None, 64, image_prompts=(beside,))
    assert not before.take(prompted, due=True), "there is a picture beside its prompt"
    assert not TickPictures().take(first, due=False)
    assert before.parts([first, text]) == {first: 1024 * 1024, text: MIN_PIXELS}
