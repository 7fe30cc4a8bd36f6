"""The forward pass of Z-Image's transformer for rows of several image sizes and text lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["KEY", "MULTIPLE", "PATCH", "evaluate"]

MULTIPLE = 32
"""The tokens of a text and of an image are padded to multiples of this with learned tokens."""

PATCH = 2
KEY = f"{PATCH}-1"
"""Name of the layers for tokens of ``PATCH`` cells along one side, and of one frame."""


def evaluate(
    network: Any,
    x: Sequence[Tensor],
    t: Tensor,
    text: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
) -> list[Tensor]:
    """Compute ``ZImageTransformer2DModel`` for texts and images of several sizes at once.

    Its own ``forward`` takes lists, so it builds positions and masks row by row and synchronizes
    with the device for the lengths. Here the same layers get all rows as one tensor. The tokens of
    smaller images are followed by padding that is masked out.

    Args:
        network: the transformer.
        x: rows of each size, ``[rows, C, h, w]`` in the network's dtype.
        t: time of each row, ``[rows]`` float32.
        text: hidden states, ``[rows, L, features]``; L is a multiple of ``MULTIPLE``.
        lengths: number of tokens of each text, int64 ``[rows]``.
        mask: which of the L places a row attends to, bool ``[rows, L]``; None for all.

    Returns:
        ``[rows, C, h, w]`` for each size.
    """
    sizes = [_Size(len(part), *part.shape[-2:]) for part in x]
    longest = max(size.filled for size in sizes)
    time = network.t_embedder(t * network.t_scale).type_as(x[0])
    patches = [
        F.pad(_patches(part), (0, 0, 0, longest - size.tokens))
        for part, size in zip(x, sizes, strict=True)
    ]
    # All rows at once, since adapter hooks on these layers index the rows of the batch.
    image = network.all_x_embedder[KEY](torch.cat(patches))
    place = torch.arange(longest, device=image.device)
    drawn = torch.cat([(place < size.tokens).expand(size.rows, -1) for size in sizes])
    image = torch.where(drawn[..., None], image, network.x_pad_token)
    seen = None
    if any(size.filled < longest for size in sizes):
        seen = torch.cat([(place < size.filled).expand(size.rows, -1) for size in sizes])
    words = network.cap_embedder(text)
    place = torch.arange(text.shape[1], device=image.device)
    words = torch.where((place < lengths[:, None])[..., None], words, network.cap_pad_token)
    # An image is positioned one place after its text; its learned padding is at the origin.
    behind = (lengths + -lengths % MULTIPLE + 1).split([size.rows for size in sizes])
    grids = [_grid(size, first, longest) for size, first in zip(sizes, behind, strict=True)]
    image_rope = _rope(network, torch.cat(grids))
    text_rope = _rope(network, torch.stack([place + 1, 0 * place, 0 * place], -1)[None])
    for block in network.noise_refiner:
        image = block(image, seen, image_rope, time)
    for block in network.context_refiner:
        words = block(words, mask, text_rope)
    joint = torch.cat([image, words], 1)
    rope = torch.cat([image_rope, text_rope.expand(len(image), -1, -1)], 1)
    joint_mask = _joined(seen, image, mask, words)
    for block in network.layers:
        joint = block(joint, joint_mask, rope, time)
    made = network.all_final_layer[KEY](joint, c=time).split([size.rows for size in sizes])
    return [_unpatched(part, size) for part, size in zip(made, sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class _Size:
    """Rows whose latents have this height and width in cells."""

    rows: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.height // PATCH) * (self.width // PATCH)

    @property
    def filled(self) -> int:
        """Number of tokens of an image including its learned padding, which is attended to."""
        return self.tokens + -self.tokens % MULTIPLE


def _joined(
    seen: Tensor | None, image: Tensor, mask: Tensor | None, words: Tensor
) -> Tensor | None:
    """Attention mask for the tokens of image and text together; None to attend to all."""
    if seen is None and mask is None:
        return None
    parts = (seen, image), (mask, words)
    every = [
        torch.ones(of.shape[:2], dtype=torch.bool, device=of.device) if own is None else own
        for own, of in parts
    ]
    return torch.cat(every, 1)


def _patches(x: Tensor) -> Tensor:
    """Tokens ``[rows, h/2 * w/2, 4 C]`` in row-major order, channels last within a patch."""
    rows, channels, height, width = x.shape
    cells = x.view(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _unpatched(tokens: Tensor, size: _Size) -> Tensor:
    """Latents ``[rows, C, h, w]`` from the first tokens of each row, which are the image's."""
    lines, columns = size.height // PATCH, size.width // PATCH
    cells = tokens[:, : size.tokens].reshape(size.rows, lines, columns, PATCH, PATCH, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(size.rows, -1, size.height, size.width)


def _grid(size: _Size, behind: Tensor, longest: int) -> Tensor:
    """Positions of the tokens of images of one size, int64 ``[rows, longest, 3]``."""
    lines, columns = (
        torch.arange(cells // PATCH, device=behind.device) for cells in (size.height, size.width)
    )
    grid = torch.cartesian_prod(lines, columns).expand(size.rows, -1, -1)
    first = behind[:, None, None].expand(-1, size.tokens, 1)
    return F.pad(torch.cat([first, grid], -1), (0, 0, 0, longest - size.tokens))


def _rope(network: Any, places: Tensor) -> Tensor:
    """Rotary embedding as complex rotations ``[rows, tokens, half a head]``."""
    return network.rope_embedder(places.flatten(0, 1)).view(*places.shape[:2], -1)
