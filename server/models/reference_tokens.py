"""Pictures beside a prompt as transformers read them: as tokens behind those of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from server.models.conditioning import Conditioning

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from torch import Tensor

__all__ = ["referring", "with_references"]

TOKENS, PLACES = "references", "reference_places"
"""Of conditioning, the tokens of all its pictures, and the position of each of these."""


def referring(
    text: Conditioning, tokens: Sequence[Tensor], places: Sequence[Tensor], sizes: Hashable
) -> Conditioning:
    """Conditioning of a text that stands beside pictures.

    Args:
        text: of the prompt alone.
        tokens: of each picture, ``[n, features]``.
        places: the positions of these, ``[n, axes]``.
        sizes: equal where all places are: the network has one list of them for all rows of a
            forward.
    """
    where = torch.cat([*places])
    return Conditioning(
        {**text.tensors, TOKENS: torch.cat([*tokens]), PLACES: where},
        text.length + len(where),
        sizes,
    )


def with_references(
    cells: Tensor, places: Tensor, told: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Tokens and positions of the images of a forward, and behind them those of their pictures.

    Args:
        cells: of the images, ``[rows, n, features]``.
        places: of their cells, ``[n, axes]``.
        told: the rows' conditioning, of one company.
    """
    if TOKENS not in told:
        return cells, places
    return torch.cat([cells, told[TOKENS]], 1), torch.cat([places, told[PLACES][0]])
