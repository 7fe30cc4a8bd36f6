"""Images drawn by the server's engine, with the latents from which they were decoded."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.engine_runs import run_tasks, start_engine
from server.fitting.linear_guidance import Runs, fit
from server.models.linear_fits import PREFIX, LinearFits, fit_file, identity_of
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest, split
from server.requests.tasks import tasks_of
from server.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from samplers import Plan
    from server.engine.task import ImageTask
    from server.models.hosted import HostedModel
    from server.requests.schema import ResolvedRequest
    from studies.guidance.cells import Cell
    from studies.guidance.sitters import Sitter

MAX_PENDING = 4096
FIRST_FITTED_SEED = 2_000_000


@dataclass(frozen=True, slots=True, eq=False)
class DrawnImages:
    """Images of one cell, in the order of their sitters.

    Attributes:
        latents: clean latents, ``[images, C, h, w]``.
        evaluations: number of denoiser rows of each image.
        saved: number of rows of each image that its policy did not evaluate.
    """

    latents: Tensor
    evaluations: list[int]
    saved: list[int]


@dataclass(frozen=True, slots=True)
class Spent:
    """Duration of a round: seconds from submission to the last image, and processor seconds."""

    wall_s: float
    processor_s: float


class Drawing:
    """An engine, and the requests that the study sends to it.

    Args:
        model: hosted model; its decoder is wrapped to record latents.
        rows: maximum number of rows in one forward pass; chosen by the engine if None.
        fitted_runs: number of runs to fit linear adaptive guidance to, where there is no fit yet.
        prompts: prompts of these runs.
        kept: folder for the fits.
    """

    def __init__(
        self,
        model: HostedModel,
        rows: int | None,
        fitted_runs: int,
        prompts: Sequence[str],
        kept: Path,
    ) -> None:
        self._model = model
        self._fitted_runs = fitted_runs
        self._prompts = prompts
        self._kept = kept
        self._decoded: deque[Tensor] = deque()
        self._listen(model)
        model.linear_fits = LinearFits(kept)
        self._engine = start_engine(model, rows, MAX_PENDING)

    @property
    def row_budget(self) -> int:
        """Maximum number of rows in a forward pass."""
        return self._engine.measurements.row_budget

    def stop(self) -> None:
        """End the engine's thread."""
        self._engine.stop(0)

    def draw(self, cell: Cell, sitters: Sequence[Sitter], strength: float) -> DrawnImages:
        """Draw all sitters at once; images of one sitter are consecutive.

        Raises:
            WeftError: the server would refuse the request, or an image failed.
        """
        self._decoded.clear()
        results = run_tasks(self._engine, self._all_tasks(cell, sitters, strength))
        found = [result for _, result in sorted(results.items())]
        latents = dict(zip(results, self._decoded, strict=True))
        return DrawnImages(
            torch.stack([one for _, one in sorted(latents.items())]),
            [result.evaluations for result in found],
            [result.saved for result in found],
        )

    def time(self, cell: Cell, sitters: Sequence[Sitter]) -> Spent:
        """Draw all sitters at once, and return the time that it takes."""
        tasks = self._all_tasks(cell, sitters, 1.0)
        began, worked = perf_counter(), process_time()
        run_tasks(self._engine, tasks)
        return Spent(perf_counter() - began, process_time() - worked)

    def _all_tasks(self, cell: Cell, sitters: Sequence[Sitter], strength: float) -> list[ImageTask]:
        return [task for sitter in sitters for task in self._tasks(cell, sitter, strength)]

    def _tasks(self, cell: Cell, sitter: Sitter, strength: float) -> list[ImageTask]:
        """Tasks of a request, created as the service does."""
        size = None if sitter.image is None else (sitter.image.shape[2], sitter.image.shape[1])
        given: dict[str, Any] = {
            "prompt": sitter.prompt,
            "negative_prompt": sitter.negative,
            "sampler": cell.sampler,
            "guidance": _filled_in(cell.guidance, sitter.words),
            "steps": cell.steps,
            "seed": sitter.seed,
            "n": cell.each,
        }
        if size is not None:
            given |= {"image": "sent", "strength": strength}
        resolved = resolve(GenerateRequest.model_validate(given), self._model, Limits(), size)
        layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
        plan = make_plan(self._model.default_schedule, *layout)
        if resolved.guidance.policy.fitted:
            self._fit(resolved, plan)
        return tasks_of(prepare(resolved, self._model, plan), self._model, image=sitter.image)

    def _fit(self, resolved: ResolvedRequest, plan: Plan) -> None:
        """Fit the coefficients that the policy needs, unless they exist."""
        rule, policy = split(resolved.guidance)
        if policy.fitted_by != PREFIX:
            raise TypeError(f"nothing here fits {policy.name!r}")
        identity = identity_of(self._model.facts.denoiser, plan, rule, policy.fit_period)
        if self._model.linear_fits.find(identity) is None:
            runs = Runs(self._fitted_runs, seed=FIRST_FITTED_SEED)
            made = fit(self._model, plan, rule, policy, self._prompts, runs, _say_nothing)
            made.save(fit_file(self._kept, resolved.sampler.name, resolved.steps, identity))

    def _listen(self, model: HostedModel) -> None:
        """Record the latents of each decoded picture that is finite, and thus finishes."""
        decode = model.decode

        def decode_and_keep(latents: Tensor) -> Tensor:
            pictures = decode(latents)
            finite = pictures.flatten(1).sum(1).isfinite()
            self._decoded.extend(latents[finite].clone().unbind())
            return pictures

        model.decode = decode_and_keep


def _say_nothing(done: int) -> None:
    del done


def _filled_in(value: Any, words: dict[str, str]) -> Any:
    """The settings, with names in braces replaced by a sitter's words."""
    if isinstance(value, str):
        return value.format(**words)
    if isinstance(value, dict):
        return {key: _filled_in(one, words) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled_in(one, words) for one in value]
    return value
