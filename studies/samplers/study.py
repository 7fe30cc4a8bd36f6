"""Running the cells: from a cell to a plan, to latents, and to figures."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from embedded.checker import compare, read_picture
from embedded.report import unseen_scenes
from embedded.scenes import make_scene, render, to_pixels
from embedded.unet_training import training_captions
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.timesteps import LogSNR, Trailing
from samplers.unipc import UniPC
from studies.samplers.cells import plan_of
from studies.samplers.guided import IMAGES_AT_ONCE, GuidedRuns
from studies.samplers.measures import Bounds, relative_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from embedded.scenes import Scene
    from samplers import Plan
    from server.models.hosted import HostedModel
    from studies.samplers.cells import Cell, Part
    from studies.samplers.sizes import Sizes
    from studies.samplers.statistics_files import StatisticsFiles


TAIL = 1e-4
"""Fraction of clean latents' values below their range; the same fraction lies above."""


class Study:
    """The model with its prompts, references and ranges.

    Args:
        model: the model under study.
        weights: identifier of the model, for the names of stored references.
        statistics: statistics for ``dpm_solver_v3``.
        sizes: amounts to measure.
        kept: folder for references, so that later runs can reuse them.
    """

    def __init__(
        self,
        model: HostedModel,
        weights: str,
        statistics: StatisticsFiles,
        sizes: Sizes,
        kept: Path,
    ) -> None:
        self.sizes = sizes
        self._model = model
        self.weights = weights
        self._statistics = statistics
        self._kept = kept
        side = model.facts.default_width
        self.shape = model.latent_shape(side, model.facts.default_height)
        self._runs: dict[int, GuidedRuns] = {}

    def run(self, cell: Cell) -> dict[str, Any]:
        """The figures of one cell, each a list over its images.

        Raises:
            Missing: the sampler or its statistics do not exist.
            ValueError: the sampler refuses so few evaluations.
        """
        statistics = self._statistics.find(cell.contender.kept, cell.scale, self.shape)
        plan = plan_of(cell, self._model.default_schedule, statistics)
        x = self._of(cell.images).run(plan, cell.scale)
        compared = self._compared(cell)
        result: dict[str, Any] = {
            "errors": relative_errors(x[:compared], self.reference(cell.part, cell.scale))
        }
        if cell.part == "picture":
            result["beyond"] = self.bounds.beyond(x)
        if cell.part != "error":
            result["right"] = [int(right) for right in self._read(x)]
        return result

    def reference(self, part: Part, scale: float) -> Tensor:
        """The best available approximation of the exact flow's result, ``[images, C, h, w]``."""
        name = f"{self.weights}-{part}-{scale:g}-{self._compared_images(part)}"
        steps = self._reference_steps(part)
        path = self._kept / f"{name}-{steps}.safetensors"
        if not path.exists():
            x = self._of(self._compared_images(part)).run(self.reference_plan(part, steps), scale)
            self._kept.mkdir(parents=True, exist_ok=True)
            save_file({"x": x.cpu()}, path)
        return load_file(path)["x"].to(self._model.device)

    def reference_plan(self, part: Part, steps: int) -> Plan:
        """Plan of the reference: 2M as in a request, or UniPC of order 3 even in log SNR."""
        schedule = self._model.default_schedule
        if part == "picture":
            return DPMSolverPP().plan(schedule.grid(Trailing(), steps))
        t_end = schedule.t_end if part == "error" else None
        return UniPC(order=3).plan(schedule.grid(LogSNR(), steps, t_end=t_end))

    def check_reference(self, scale: float) -> list[float]:
        """Distance of another solver, 2M with as many steps, from the reference of error cells."""
        schedule = self._model.default_schedule
        grid = schedule.grid(LogSNR(), self.sizes.reference_steps, t_end=schedule.t_end)
        few = max(1, self.sizes.error_images // 4)
        x = self._of(few).run(DPMSolverPP(lower_order_final=False).plan(grid), scale)
        return relative_errors(x, self.reference("error", scale)[:few])

    def latents(self, plan: Plan, scale: float, images: int) -> Tensor:
        """Final latents of the first images with a plan."""
        return self._of(images).run(plan, scale)

    def prompts(self, images: int) -> list[str]:
        """The captions of the first images, alternating between one thing and two."""
        return [scene.caption for scene in self._scenes[:images]]

    @cached_property
    def bounds(self) -> Bounds:
        """The range of the latents of training pictures."""
        seeds = range(self.sizes.clean_pictures)
        encoded: list[Tensor] = []
        with torch.inference_mode():
            for first in seeds[::IMAGES_AT_ONCE]:
                scenes = [make_scene(s) for s in seeds[first : first + IMAGES_AT_ONCE]]
                pixels = render(scenes, str(self._model.device))
                encoded.append(self._model.encode_image(pixels).cpu())
        return Bounds.of(torch.cat(encoded), TAIL)

    @cached_property
    def _scenes(self) -> list[Scene]:
        sizes = self.sizes
        most = max(
            sizes.error_images, sizes.picture_images, sizes.accuracy_images, sizes.spaced_images
        )
        known = frozenset(
            text for texts in training_captions(self.sizes.known_pictures) for text in texts
        )
        kinds = (unseen_scenes(things, (most + 1) // 2, known) for things in (1, 2))
        return [scene for pair in zip(*kinds, strict=True) for scene in pair]

    def _of(self, images: int) -> GuidedRuns:
        if images not in self._runs:
            self._runs[images] = GuidedRuns(self._model, self.prompts(images), self.shape)
        return self._runs[images]

    def _compared_images(self, part: Part) -> int:
        match part:
            case "error":
                return self.sizes.error_images
            case "picture":
                return self.sizes.picture_images
            case "spacing":
                return self.sizes.spaced_images

    def _compared(self, cell: Cell) -> int:
        return min(cell.images, self._compared_images(cell.part))

    def _reference_steps(self, part: Part) -> int:
        match part:
            case "error":
                return self.sizes.reference_steps
            case "picture":
                return self.sizes.converged_steps
            case "spacing":
                return self.sizes.spaced_steps

    def _read(self, x: Tensor) -> Iterator[bool]:
        """Whether each picture shows all that its caption claims, according to the checker."""
        with torch.inference_mode():
            for first in range(0, len(x), IMAGES_AT_ONCE):
                part = x[first : first + IMAGES_AT_ONCE]
                # Latents that diverged to infinity also count as pictures, and as wrong ones.
                pictures = to_pixels(self._model.decode(part.nan_to_num()).clamp(-1, 1))
                scenes = self._scenes[first : first + IMAGES_AT_ONCE]
                for scene, picture in zip(scenes, pictures, strict=False):
                    yield all(compare(scene.claim, read_picture(picture)).values())
