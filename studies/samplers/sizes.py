"""The amounts that the study of samplers measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """The amounts that are measured.

    Attributes:
        error_images: number of images of an ``error`` cell.
        picture_images: number of images of a ``picture`` cell.
        accuracy_images: number of images of a ``picture`` cell whose accuracy is compared.
        spaced_images: number of images of a ``spacing`` cell.
        reference_steps: steps of the reference for ``error`` cells.
        converged_steps: steps of the reference for ``picture`` cells.
        spaced_steps: steps of the reference for ``spacing`` cells.
        known_pictures: number of training pictures whose captions count as seen.
        clean_pictures: number of training pictures that determine the range of clean latents.
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
