"""Running the cells: from a cell to latents, and from latents to figures."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from embedded.checker import compare, read_picture
from embedded.scenes import make_scene, render, to_pixels
from studies.common.records import key_of
from studies.guidance import measures
from studies.guidance.cells import STRENGTH
from studies.guidance.drawing import DrawnImages

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from embedded.scenes import Scene
    from samplers.levels import F64
    from server.models.hosted import HostedModel
    from studies.guidance.cells import Cell
    from studies.guidance.drawing import Drawing
    from studies.guidance.sitters import Sitter, Sitters

AT_ONCE = 16
FIRST_TRUE_SEED = 4_000_000_000
"""First seed of the true pictures with which distances are computed."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The amounts that are measured.

    Attributes:
        captions: number of captions in a block, half of one thing and half of two.
        again: number of captions for which a second picture is drawn, for diversity.
        true_pictures: number of true pictures for the Fréchet distance.
        known_pictures: number of training pictures whose captions count as seen.
        fitted_runs: number of runs that linear adaptive guidance is fitted to.
        rated_images: number of images in a timed round.
        rounds: number of timed rounds.
    """

    captions: int = 48
    again: int = 16
    true_pictures: int = 800
    known_pictures: int = 12_000
    fitted_runs: int = 48
    rated_images: int = 32
    rounds: int = 5


class Study:
    """The measurements on one model.

    Args:
        model: model that decodes and encodes.
        weights: identifier of the model.
        drawing: engine that draws with it.
        sitters: pictures to draw.
        sizes: amounts to measure.
        kept: folder for latents, with which later cells are compared.
    """

    def __init__(
        self,
        model: HostedModel,
        weights: str,
        drawing: Drawing,
        sitters: Sitters,
        sizes: Sizes,
        kept: Path,
    ) -> None:
        self.weights = weights
        self.sizes = sizes
        self._model = model
        self._drawing = drawing
        self._sitters = sitters
        self._kept = kept
        self._true: dict[int, Tensor] = {}

    def of(self, cell: Cell) -> dict[str, Any]:
        """The key of the cell's result in the records."""
        return cell.of(self.weights, self.sizes.captions)

    def run(self, cell: Cell) -> dict[str, Any]:
        """The figures of one cell; lists are over its images.

        Raises:
            WeftError: the server would refuse the request, or an image failed.
        """
        drawn = self._drawn(cell)
        if cell.sitting == "again":
            first = self._drawn(replace(cell, sitting="captions"))
            pairs = drawn.latents, first.latents[: len(drawn.latents)]
            return {"apart": measures.distances(*pairs)}
        pictures = self._decoded(drawn.latents)
        sitters = self._sitters.of(cell.sitting, cell.block)
        found = {
            **self._read([one for one in sitters for _ in range(cell.each)], pictures),
            **self._look(drawn.latents, pictures),
            **self._farness(cell, drawn.latents),
            "evaluations": drawn.evaluations,
            "saved": drawn.saved,
        }
        if cell.each > 1:
            requests = drawn.latents.unflatten(0, (-1, cell.each))
            found["apart"] = [measures.apart(request) for request in requests]
        full = cell.full()
        if full is not None:
            wanted = self._decoded(self._drawn(full).latents)
            found["psnr"] = measures.psnr(pictures, wanted)
        undisturbed = cell.undisturbed()
        if undisturbed is not None:
            found["moved"] = measures.distances(drawn.latents, self._drawn(undisturbed).latents)
        return found

    def truth(self, block: int) -> dict[str, Any]:
        """The same figures for the captions' true pictures, passed through the autoencoder."""
        sitters = self._sitters.of("captions", block)
        pictures = render([sitter.scene for sitter in sitters])
        latents = self._true_latents(block)
        restored = self._decoded(latents)
        raw = {
            "true_saturation": measures.saturation(pictures),
            "true_contrast": measures.contrast(pictures),
            "frechet": measures.frechet(measures.features(latents), self._true_features),
        }
        return {**self._read(sitters, restored), **self._look(latents, restored), **raw}

    def _drawn(self, cell: Cell) -> DrawnImages:
        """The cell's images, from the folder if they are stored there."""
        name = hashlib.sha256(key_of(self.of(cell)).encode()).hexdigest()[:16]
        path = self._kept / f"{name}.safetensors"
        if not path.exists():
            sitters = self._sitters.of(cell.sitting, cell.block)
            drawn = self._drawing.draw(cell, sitters, STRENGTH)
            counts = {
                "evaluations": torch.tensor(drawn.evaluations),
                "saved": torch.tensor(drawn.saved),
            }
            self._kept.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".writing")
            save_file({"latents": drawn.latents.cpu(), **counts}, fresh)
            fresh.replace(path)
        kept = load_file(path)
        return DrawnImages(kept["latents"], kept["evaluations"].tolist(), kept["saved"].tolist())

    def _read(self, sitters: Sequence[Sitter], pictures: Tensor) -> dict[str, Any]:
        """The verdicts of the data set's checker."""
        right: list[int] = []
        white: list[int] = []
        claimed: Counter[str] = Counter()
        met: Counter[str] = Counter()
        for sitter, picture in zip(sitters, to_pixels(pictures), strict=True):
            seen = read_picture(picture)
            verdict = compare(sitter.claim, seen)
            right.append(int(all(verdict.values())))
            white.append(int(seen.background == "white"))
            claimed.update(verdict.keys())
            met.update(name for name, well in verdict.items() if well)
        attributes = {name: [met[name], claimed[name]] for name in sorted(claimed)}
        return {"right": right, "attributes": attributes, "white": white}

    def _look(self, latents: Tensor, pictures: Tensor) -> dict[str, Any]:
        return {
            "saturation": measures.saturation(pictures),
            "contrast": measures.contrast(pictures),
            "clipped": measures.clipped(pictures),
            "spread": latents.flatten(1).std(1).tolist(),
        }

    def _farness(self, cell: Cell, latents: Tensor) -> dict[str, Any]:
        """The Fréchet distance, if there is one picture for each of a block's captions."""
        if cell.sitting != "captions" or cell.each > 1:
            return {}
        found = measures.features(latents)
        true = measures.features(self._true_latents(cell.block))
        return {
            "frechet": measures.frechet(found, self._true_features),
            "beyond": measures.beyond(found, true, self._true_features),
        }

    def _true_latents(self, block: int) -> Tensor:
        if block not in self._true:
            scenes = [sitter.scene for sitter in self._sitters.of("captions", block)]
            self._true[block] = self._encoded(render(scenes))
        return self._true[block]

    @cached_property
    def _true_features(self) -> F64:
        half = range(FIRST_TRUE_SEED, FIRST_TRUE_SEED + self.sizes.true_pictures // 2)
        scenes: list[Scene] = [make_scene(seed, things=n) for n in (1, 2) for seed in half]
        chunks = (scenes[k : k + AT_ONCE] for k in range(0, len(scenes), AT_ONCE))
        return measures.features(torch.cat([self._encoded(render(chunk)) for chunk in chunks]))

    def _encoded(self, pictures: Tensor) -> Tensor:
        with torch.inference_mode():
            parts = pictures.to(self._model.device).split(AT_ONCE)
            return torch.cat([self._model.encode_image(part).cpu() for part in parts])

    def _decoded(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            parts = latents.to(self._model.device).split(AT_ONCE)
            return torch.cat([self._model.decode(part).cpu() for part in parts])
