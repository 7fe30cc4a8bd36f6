"""The effect of a failing row on the other rows of its batch, in an engine on the embedded model.

    python -m benchmarks.promises.rows [--weak]

Prints the result as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from threading import Event
from time import sleep
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch

from guidance.always import Always
from guidance.unguided import Unguided
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.euler import EulerAncestral
from server.engine.engine import Engine
from server.engine.task import ImageTask
from server.models.folder import embedded_folders
from server.models.loading import load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from samplers import Sampler
    from server.engine.state.sequence import ImageResult
    from server.models.hosted import HostedModel

ROWS: Final = 8
SIDE: Final = 64
STEPS: Final = 3
CHOSEN: Final = (DDIM, DPMSolverPP, EulerAncestral)


class Faulty:
    """The model, with NaN in one row of the next forward pass."""

    def __init__(self, model: HostedModel, *, weak: bool) -> None:
        self._model = model
        self._weak = weak
        self.bad_row: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def evaluate(self, x: torch.Tensor, t: torch.Tensor, inputs: Any) -> torch.Tensor:
        """Evaluate the rows, with NaN in the bad one."""
        raw = self._model.evaluate(x, t, inputs)
        if self.bad_row is not None:
            row, self.bad_row = self.bad_row, None
            raw[row] = torch.nan
            if self._weak:
                raw += 0 * raw.sum()
        return raw


@dataclass(slots=True)
class ResultCollector:
    """A listener that collects the results of the images of one submission."""

    images: int
    results: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    ended: Event = field(default_factory=Event)

    def started(self, index: int) -> None:
        """Its first tick begins."""

    def progress(self, index: int, step: int, steps: int, preview: Any) -> None:
        """A step is done."""

    def finished(self, index: int, result: ImageResult) -> None:
        """An image is done."""
        self.results[index] = result.pixels
        self._count()

    def failed(self, index: int, error: Exception) -> None:
        """An image cannot be made."""
        self.errors[index] = error
        self._count()

    def _count(self) -> None:
        if len(self.results) + len(self.errors) == self.images:
            self.ended.set()


class Batches:
    """Submits eight images of one row each to an engine that runs eight rows at a time."""

    def __init__(self, *, weak: bool) -> None:
        folder = embedded_folders()["embedded"]
        self._model = load_model(folder, name="embedded", device="cpu", dtype="float32")
        self.faulty = Faulty(self._model, weak=weak)
        self._engine = Engine(
            {"embedded": cast("HostedModel", self.faulty)}, row_budget=ROWS, deterministic=True
        )
        self._engine.start()
        while not self._engine.ready:
            if self._engine.failure is not None:
                raise self._engine.failure
            sleep(0.02)

    def run(self, sampler: Callable[[], Sampler]) -> ResultCollector:
        """The results of eight images with one sampler."""
        solver = sampler()
        plan = solver.plan(self._model.default_schedule.grid(solver.default_spacing, STEPS))
        tasks = [
            ImageTask(
                model="embedded",
                prompt="a large red circle at sunset",
                negative_prompt="",
                width=SIDE,
                height=SIDE,
                seed=seed,
                plan=plan,
                rule=Unguided(),
                policy=Always(),
                coefficients=np.zeros((plan.evaluations, 0)),
            )
            for seed in range(ROWS)
        ]
        heard = ResultCollector(len(tasks))
        self._engine.submit(tasks, heard)
        if not heard.ended.wait(120):
            raise TimeoutError("the engine did not answer")
        return heard

    def stop(self) -> None:
        """End the engine."""
        self._engine.stop(0)


def spoilt_by_nan(*, weak: bool) -> dict[str, int]:
    """Put a NaN in each row in turn, and count runs that leave the other seven bit-identical."""
    batches = Batches(weak=weak)
    runs = spared = 0
    for sampler in CHOSEN:
        clean = batches.run(sampler).results
        for row in range(ROWS):
            batches.faulty.bad_row = row
            heard = batches.run(sampler)
            runs += 1
            equal = all(np.array_equal(clean[i], pixels) for i, pixels in heard.results.items())
            named = all("NaN" in str(error) for error in heard.errors.values())
            spared += equal and named and len(heard.errors) == 1
        after = batches.run(sampler)
        spared -= any(not np.array_equal(clean[i], after.results[i]) for i in clean)
    batches.stop()
    return {"runs": runs, "spared": spared}


def main() -> None:
    """Measure, and print the result."""
    print(json.dumps(spoilt_by_nan(weak="--weak" in sys.argv)))


if __name__ == "__main__":
    main()
