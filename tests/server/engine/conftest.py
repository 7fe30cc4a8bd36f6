"""A real engine on the embedded model, and a listener that collects its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedded import MODEL_FOLDER
from guidance import POLICIES, RULES, Policy, Rule
from samplers import SAMPLERS, SPACINGS, Sampler, Spacing
from server.engine.engine import Engine
from server.engine.state.sequence import ImageResult
from server.engine.task import ImageTask
from server.models.hosted import HostedModel
from server.models.loading import load_model
from tests.server.by_hand import terms_for
from tests.server.full_ticks import full_ticks
from tests.server.thin_model import save_thin_model

PATIENCE_S = 120
SIDE = 96
"""Of a picture, in pixels; trained at 128, the model often draws a plain ground below 96."""


@dataclass
class Hearing:
    """Collects what the engine reports of one submission.

    The engine's thread calls `on_start` before the first forward, `on_progress` at each step and
    `on_end` when all images have ended. A test does there what must happen by then, as its own
    thread may come too late.
    """

    images: int
    results: dict[int, ImageResult] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    previews: list[NDArray[np.uint8]] = field(default_factory=list)
    begun: Event = field(default_factory=Event)
    ended: Event = field(default_factory=Event)
    on_start: Callable[[], Any] | None = None
    on_progress: Callable[[int], Any] | None = None
    on_end: Callable[[], Any] | None = None

    def started(self, index: int) -> None:
        if self.on_start is not None and not self.begun.is_set():
            self.on_start()
        self.begun.set()

    def progress(
        self, index: int, step: int, steps: int, preview: NDArray[np.uint8] | None
    ) -> None:
        self.steps.append((index, step, steps))
        if preview is not None:
            self.previews.append(preview)
        if self.on_progress is not None:
            self.on_progress(step)

    def finished(self, index: int, result: ImageResult) -> None:
        self.results[index] = result
        self._maybe_end()

    def failed(self, index: int, error: Exception) -> None:
        self.errors[index] = error
        self._maybe_end()

    def _maybe_end(self) -> None:
        if len(self.results) + len(self.errors) == self.images:
            if self.on_end is not None:
                self.on_end()
            self.ended.set()

    def wait(self) -> Hearing:
        assert self.ended.wait(PATIENCE_S), "the engine did not answer"
        return self

    def pixels(self) -> list[NDArray[np.uint8]]:
        """Pixels of all images in order; for submissions whose images must all succeed."""
        self.wait()
        assert not self.errors, self.errors
        return [self.results[i].pixels for i in range(self.images)]


@pytest.fixture(scope="session")
def thin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thin") / "model"
    save_thin_model(folder)
    return folder


@pytest.fixture(scope="session")
def model(thin_folder: Path) -> HostedModel:
    """A model with thin networks, for tests that do not depend on what pictures show."""
    return load_model(thin_folder, name="embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def trained() -> HostedModel:
    """The embedded model."""
    return load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")


def started(model: HostedModel, **options: Any) -> Engine:
    engine = Engine({"embedded": model}, **options)
    waiting = Event()
    with full_ticks():
        engine.start()
        for _ in range(int(PATIENCE_S / 0.02)):
            if engine.ready or engine.failure is not None:
                break
            waiting.wait(0.02)
    assert engine.ready, engine.failure
    return engine


@pytest.fixture
def start(model: HostedModel) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def begin(**options: Any) -> Engine:
        engines.append(started(options.pop("model", model), **{"row_budget": 6, **options}))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.stop(0)


@pytest.fixture(scope="session")
def engine(model: HostedModel) -> Iterator[Engine]:
    made = started(model, row_budget=6)
    yield made
    made.stop(0)


@pytest.fixture(scope="session")
def trained_engine(trained: HostedModel) -> Iterator[Engine]:
    made = started(trained, row_budget=6)
    yield made
    made.stop(0)


@pytest.fixture(scope="session")
def fixed_engine(model: HostedModel) -> Iterator[Engine]:
    made = started(model, row_budget=6, deterministic=True)
    yield made
    made.stop(0)


def named(registry: tuple[type[Any], ...], name: str) -> type[Any]:
    return {entry.model_fields["name"].default: entry for entry in registry}[name]


def by_name(sampler: str) -> Sampler:
    """The sampler with its defaults, except that it uses no model statistics."""
    kind = named(SAMPLERS, sampler)
    return kind(statistics="none") if "statistics" in kind.model_fields else kind()


@pytest.fixture(scope="session")
def task(model: HostedModel) -> Callable[..., ImageTask]:
    """Makes a task from short names, at small defaults."""

    def make(
        sampler: str | Sampler = "ddim",
        rule: str | Rule = "cfg",
        policy: str | Policy = "always",
        spacing: str | Spacing | None = None,
        steps: int = 3,
        strength: float | None = None,
        settings: tuple[Any, ...] = (),
        **fields: Any,
    ) -> ImageTask:
        solver = by_name(sampler) if isinstance(sampler, str) else sampler
        layout = spacing or solver.default_spacing
        points = named(SPACINGS, layout)() if isinstance(layout, str) else layout
        grid = model.default_schedule.grid(points, steps)
        if strength is not None:
            grid = grid.tail(strength)
        given: dict[str, Any] = {
            "model": "embedded",
            "prompt": "a large red circle at sunset",
            "negative_prompt": "",
            "width": SIDE,
            "height": SIDE,
            "seed": 7,
            **fields,
        }
        plan = solver.plan(grid)
        guided_by = named(RULES, rule)() if isinstance(rule, str) else rule
        told = {name: given[name] for name in ("prompt", "negative_prompt")}
        given.setdefault("terms", terms_for(settings, plan, model, rule=guided_by, **told))
        when = named(POLICIES, policy)() if isinstance(policy, str) else policy
        # Nothing was fitted for these runs: the estimate is the mean of the known branches.
        numbers = len(guided_by.branches) * when.fitted
        fitted = np.full((plan.evaluations, numbers), 1 / max(1, when.fitted))
        return ImageTask(
            plan=plan,
            rule=guided_by,
            policy=when,
            coefficients=fitted,
            **given,
        )

    return make


@pytest.fixture(scope="session")
def run() -> Callable[[Engine, list[ImageTask]], Hearing]:
    """Submits tasks and waits for them."""

    def submit(engine: Engine, tasks: list[ImageTask]) -> Hearing:
        hearing = Hearing(len(tasks))
        engine.submit(tasks, hearing)
        return hearing.wait()

    return submit


@pytest.fixture(scope="session")
def listen() -> type[Hearing]:
    return Hearing
