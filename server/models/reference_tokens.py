"""Reference images as transformers read them: as tokens after those of the generated image."""

from __future__ import annotations

from itertools import count, takewhile
from typing import TYPE_CHECKING

import torch

from server.models.conditioning import Conditioning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["add_references", "tokens_beside", "with_references"]


def add_references(text: Conditioning, pictures: Sequence[Tensor]) -> Conditioning:
    """Add reference images to the conditioning of a prompt.

    Args:
        text: conditioning of the prompt alone.
        pictures: tokens of each image, ``[height, width, features]``.
    """
    sizes = tuple((len(one), one.shape[1]) for one in pictures)
    return Conditioning(
        {**text.tensors, **{_name(place): one for place, one in enumerate(pictures)}},
        text.length + sum(height * width for height, width in sizes),
        # The network takes a single list of positions for all rows of a forward pass.
        sizes,
    )


def tokens_beside(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens of each reference image of the rows of a forward pass.

    Args:
        tensors: the rows' conditioning; ``Conditioning.company`` is equal for all of them.

    Returns:
        ``[rows, height, width, features]`` for each image; sizes may differ between images.
    """
    names = takewhile(tensors.__contains__, map(_name, count()))
    return [tensors[name] for name in names]


def with_references(cells: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Append the tokens of reference images to those of generated images, ``[rows, n, features]``.

    Args:
        cells: tokens of the generated images, ``[rows, n, features]``.
        references: tokens as returned by :func:`tokens_beside`.
    """
    return (
        torch.cat([cells, *(one.flatten(1, 2) for one in references)], 1) if references else cells
    )


def _name(place: int) -> str:
    return f"reference {place}"
