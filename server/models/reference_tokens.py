"""Pictures beside a prompt as transformers read them: as tokens behind those of the image."""

from __future__ import annotations

from itertools import count, takewhile
from typing import TYPE_CHECKING

import torch

from server.models.conditioning import Conditioning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["referring", "tokens_beside", "with_references"]


def referring(text: Conditioning, pictures: Sequence[Tensor]) -> Conditioning:
    """Conditioning of a text that stands beside pictures.

    Args:
        text: of the prompt alone.
        pictures: the tokens of each, ``[height, width, features]``.
    """
    sizes = tuple((len(one), one.shape[1]) for one in pictures)
    return Conditioning(
        {**text.tensors, **{_name(place): one for place, one in enumerate(pictures)}},
        text.length + sum(height * width for height, width in sizes),
        # The network has one list of positions for all rows of a forward.
        sizes,
    )


def tokens_beside(told: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens of each picture that the rows of a forward refer to.

    Args:
        told: the rows' conditioning, of one company.

    Returns:
        ``[rows, height, width, features]`` of each, which may have different sizes.
    """
    names = takewhile(told.__contains__, map(_name, count()))
    return [told[name] for name in names]


def with_references(cells: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Tokens of images, and behind them those of the pictures, ``[rows, n, features]``.

    Args:
        cells: tokens of the images, ``[rows, n, features]``.
        references: as of :func:`tokens_beside`.
    """
    return (
        torch.cat([cells, *(one.flatten(1, 2) for one in references)], 1) if references else cells
    )


def _name(place: int) -> str:
    return f"reference {place}"
