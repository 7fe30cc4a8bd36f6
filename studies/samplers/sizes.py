"""How much the study of samplers measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        error_images: images of an ``error`` cell.
        picture_images: images of a ``picture`` cell.
        accuracy_images: images of a ``picture`` cell whose accuracy is compared.
        spaced_images: images of a ``spacing`` cell.
        reference_steps: steps of the reference of ``error`` cells.
        converged_steps: steps of the reference of ``picture`` cells.
        spaced_steps: steps of the reference of ``spacing`` cells.
        known_pictures: training pictures whose captions count as seen.
        clean_pictures: training pictures whose latents give the range of clean ones.
    """

    error_images: int = 8
    picture_images: int = 12
    accuracy_images: int = 48
    spaced_images: int = 16
    reference_steps: int = 1000
    converged_steps: int = 100
    spaced_steps: int = 200
    known_pictures: int = 12_000
    clean_pictures: int = 1000
