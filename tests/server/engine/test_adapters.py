"""Images with adapters equal those of a model that has the same adapters in its weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from guidance.autoguidance import Autoguidance
from guidance.negtome import NegToMe
from guidance.pag import PAG
from server.engine.client import Client
from server.engine.engine import Engine
from server.engine.scheduler import Priority
from server.engine.state.sequence import ImageResult
from server.engine.task import Group, ImageTask
from server.models.adapters.adapter import Adapter, Weighted
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from tests.server import by_hand, toy_model
from tests.server.models.adapters.low_rank import adapter, changes, merged
from tests.server.toy_model import Ear, Toy, run, started

Make = Callable[..., ImageTask]


@pytest.fixture(scope="module")
def styles(model: HostedModel) -> tuple[Weighted, Weighted]:
    """Two adapters: one changes only the U-Net, the other its attention and the text encoder."""
    unet, text = (model.adaptable()[part] for part in ("unet", "text_encoder"))
    pastel = adapter("pastel", {"unet": changes(unet, 4, seed=1, size=0.6)})
    both = {
        "unet": changes(unet, 8, seed=2, size=0.6, within="attn"),
        "text_encoder": changes(text, 2, seed=3, size=0.6),
    }
    return Weighted(pastel, 0.8), Weighted(adapter("storybook", both), 1.0)


@pytest.fixture(scope="module")
def restyled(thin_folder: Path, styles: tuple[Weighted, ...]) -> Iterator[Engine]:
    """An engine on a model with both adapters in its weights."""
    changed = load_model(thin_folder, name="embedded", device="cpu", dtype="float32")
    for part, network in changed.adaptable().items():
        network.load_state_dict(merged(network, part, styles).state_dict())
    made = started(changed, 6)
    yield made
    made.stop(0)


def pixels(engine: Engine, tasks: list[ImageTask]) -> list[NDArray[np.uint8]]:
    ear = run(engine, tasks)
    assert not ear.errors, ear.errors
    return [ear.results[i].pixels for i in range(len(tasks))]


def apart(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """The mean difference in levels of 255; rounding moves a few pixels by a level or two."""
    return float(np.abs(ours.astype(int) - theirs).mean())


def assert_alike(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    assert apart(ours, theirs) < 0.05


def assert_unlike(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    assert apart(ours, theirs) > 1


def test_all_rows_of_an_image_are_adapted_and_those_of_others_are_not(
    engine: Engine, restyled: Engine, task: Make, styles: tuple[Weighted, ...]
) -> None:
    """Prompt, negative prompt and a perturbed row; the prompt is encoded with and without it."""
    plain = task(settings=(PAG(),))
    ours, bare = pixels(engine, [replace(plain, adapters=styles), plain])
    assert_alike(ours, *pixels(restyled, [plain]))
    assert_alike(bare, *pixels(engine, [plain]))
    assert_unlike(ours, bare)


def test_the_weaker_companion_is_not_adapted(
    engine: Engine, restyled: Engine, task: Make, styles: tuple[Weighted, ...]
) -> None:
    plain = task(rule="none", settings=(Autoguidance(),))
    [ours] = pixels(engine, [replace(plain, adapters=styles)])
    assert_alike(ours, *pixels(restyled, [plain]))


def test_images_of_a_group_are_adapted_together(
    engine: Engine, restyled: Engine, task: Make, styles: tuple[Weighted, ...]
) -> None:
    settings = (NegToMe(stop=1.0, away_from="first"),)
    group = [task(seed=seed, settings=settings, group=Group()) for seed in (1, 2)]
    group = [replace(one, group=group[0].group) for one in group]
    ours = pixels(engine, [replace(one, adapters=styles) for one in group])
    for image, theirs in zip(ours, pixels(restyled, group), strict=True):
        assert_alike(image, theirs)


def test_an_image_is_bit_identical_alone_and_among_images_with_other_adapters(
    fixed_engine: Engine, task: Make, styles: tuple[Weighted, ...]
) -> None:
    pastel, storybook = styles
    company = [
        task(adapters=(pastel,), steps=2),
        task(seed=8, steps=2),
        task(seed=9, adapters=(storybook, replace(pastel, weight=-0.5)), steps=2),
    ]
    together = pixels(fixed_engine, company)
    for one, image in zip(company, together, strict=True):
        [alone] = pixels(fixed_engine, [one])
        assert np.array_equal(alone, image)


def test_an_adapter_is_let_go_of_with_the_last_image_that_has_it(
    engine: Engine, model: HostedModel, task: Make
) -> None:
    """What the engine keeps of it, such as its prompts, must not keep its weights in memory."""
    networks = model.adaptable()
    passing = adapter("passing", {part: changes(one, 1) for part, one in networks.items()})
    gone = weakref.ref(passing)
    pixels(engine, [task(steps=1, adapters=(Weighted(passing, 1.0),))])
    pixels(engine, [task(steps=1)])
    del passing
    gc.collect()
    assert gone() is None


class Overheard(Toy):
    """Records the adapters of the rows of its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[tuple[str, ...]] = []

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        if inputs.adapters is not None:
            self.orders.append(tuple(one.adapter.name for [one] in inputs.adapters.rows))
        return super().evaluate(x, t, inputs)


def test_rows_keep_their_order_whoever_is_served_first() -> None:
    """What is kept for rows with the same adapters can be used again only in the same order."""
    model = Overheard()
    engine = toy_model.started(model, 16)
    ears = [toy_model.Ear(1) for _ in range(8)]
    for i, ear in enumerate(ears):
        style = Weighted(Adapter(f"style {i}", "", {}), 1.0)
        steps = 20 + i % 3
        engine.submit(
            [by_hand.task(seed=i, steps=steps, adapters=(style,))], ear, Client(f"{i % 3}")
        )
    for ear in ears:
        ear.wait()
    engine.stop(0)
    assert len({tuple(sorted(order)) for order in model.orders}) == len({*model.orders})


def test_rows_of_the_same_adapters_have_one_order_whichever_images_came_first() -> None:
    """So they need one recording, and one stack of their factors."""
    model = Overheard()
    engine = toy_model.started(model, 16)
    styles = [Weighted(Adapter(name, "", {}), 1.0) for name in ("ink", "pastel", "storybook")]
    for order in permutations(styles):
        tasks = [by_hand.task(steps=3, adapters=(style,)) for style in order]
        toy_model.run(engine, tasks)
    engine.stop(0)
    assert {*model.orders} == {("ink", "pastel", "storybook") * 2}


@pytest.mark.parametrize("priority", [Priority.INTERACTIVE, Priority.LIVE])
def test_the_oldest_image_is_decoded_first_whatever_its_adapters_are_called(
    priority: Priority,
) -> None:
    finished: list[str] = []

    class Heard(Ear):
        def finished(self, index: int, result: ImageResult) -> None:
            finished.append(names[index])
            super().finished(index, result)

    engine, names = toy_model.started(Toy(), 16), ("storybook", "ink", "pastel")
    styles = [Weighted(Adapter(name, "", {}), 1.0) for name in names]
    tasks = [by_hand.task(steps=3, adapters=(style,), priority=priority) for style in styles]
    ear = Heard(len(tasks))
    engine.submit(tasks, ear)
    ear.wait()
    engine.stop(0)
    assert (*finished,) == names
