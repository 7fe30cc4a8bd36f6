"""Image prompts of U-Nets: cross-attention to the tokens of images, in addition to the text.

This computes the same as diffusers' ``StableDiffusionPipeline`` and ``StableDiffusionXLPipeline``
after ``load_ip_adapter``. The network is not modified permanently: during a forward pass whose rows
have image prompts, hooks on each cross-attention layer add ``scale * softmax(Q K'^T / sqrt(d)) V'``
(equation 5 of arXiv 2308.06721) to the text attention of these rows.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from server.models.image_prompts.image_prompt import ImagePromptKV, Widths

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import Tensor, nn

    from server.models.image_prompts.image_prompt import IPAdapter
    from server.models.image_prompts.row_image_prompts import EqualLengthRows, RowImagePrompts

__all__ = ["UNetImagePrompts"]

SELF_ATTENTION = "attn1.processor"


class UNetImagePrompts:
    """The cross-attention layers of a U-Net, and their attention to image prompts.

    Args:
        unet: a ``UNet2DConditionModel`` with at least one cross-attention layer, and without a
            projection of the text embeddings.
    """

    def __init__(self, unet: Any) -> None:
        # diffusers numbers the layers of an adapter's file in this order.
        self._layers: list[Any] = [
            unet.get_submodule(name.removesuffix(".processor"))
            for name in unet.attn_processors
            if not name.endswith(SELF_ATTENTION)
        ]
        inner = tuple(layer.inner_kv_dim for layer in self._layers)
        self.widths = Widths(unet.config.cross_attention_dim, inner)
        # Concatenated as: keys of a layer, its values, keys of the next layer.
        self._bounds = list(pairwise(accumulate((2 * width for width in inner), initial=0)))

    @staticmethod
    def taken_by(unet: Any) -> bool:
        """Whether a U-Net attends to text embeddings, and does so without projecting them first."""
        crosses = any(not name.endswith(SELF_ATTENTION) for name in unet.attn_processors)
        return (
            crosses
            and unet.config.encoder_hid_dim_type is None
            and isinstance(unet.config.cross_attention_dim, int)
        )

    def tokens(self, adapter: IPAdapter, pictures: Tensor) -> Tensor:
        """Tokens that an adapter makes of images, ``[n, tokens, text width]``.

        Args:
            adapter: adapter for this U-Net.
            pictures: ``[n, 3, side, side]`` float32 in [-1, 1].
        """
        encoder = adapter.encoder
        pixels = (pictures.to(encoder.mean.device) / 2 + 0.5 - encoder.mean) / encoder.std
        return adapter.projection(_read(adapter, pixels))

    def tokens_of_nothing(self, adapter: IPAdapter) -> Tensor:
        """Tokens ``[tokens, text width]`` of no image, for the unconditional branch.

        As in diffusers: a plain adapter projects an embedding of zeros, and one that reads patches
        encodes an image of zeros after normalization, which is the mean of all images.
        """
        encoder = adapter.encoder
        side = encoder.network.config.image_size
        read = _read(adapter, encoder.mean.new_zeros(1, 3, side, side))
        return adapter.projection(torch.zeros_like(read) if adapter.kind == "plain" else read)[0]

    def shown(
        self,
        adapter: IPAdapter,
        pictures: Tensor,
        nothing: Tensor,
        region: Mapping[int, Tensor] | None = None,
    ) -> ImagePromptKV:
        """Keys and values of all layers for the tokens of some images and for those of no image.

        Args:
            adapter: adapter for this U-Net.
            pictures: tokens of the images, ``[tokens, text width]``.
            nothing: tokens of no image, likewise.
            region: where the images act, see :class:`ImagePromptKV`; None for the whole image.
        """
        weights = adapter.keys_and_values
        return ImagePromptKV(F.linear(pictures, weights), F.linear(nothing, weights), region)

    def kv_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Memory of a :class:`ImagePromptKV` of this many tokens without a region, in bytes."""
        return 2 * tokens * 2 * sum(self.widths.layers) * dtype.itemsize

    @contextmanager
    def applied(self, prompts: RowImagePrompts | None) -> Generator[None]:
        """Let rows attend to their image prompts in the forward pass inside the ``with`` block.

        Args:
            prompts: image prompts of that pass's rows; None where no row has any.
        """
        alike = () if prompts is None else prompts.alike()
        handles: list[Any] = []
        for layer, bounds in zip(self._layers, self._bounds, strict=True) if alike else ():
            attend = _DecoupledAttention(layer, alike, bounds)
            # Registered after all other hooks: these hooks read the queries as adapters change
            # them, and add to the text attention as other hooks leave it.
            handles.append(layer.to_q.register_forward_hook(attend.remember))
            handles.append(layer.to_out[0].register_forward_pre_hook(attend.add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _DecoupledAttention:
    """The attention of one layer to image prompts.

    Args:
        layer: the cross-attention layer.
        alike: rows that have image prompts.
        bounds: range of its keys and values among those of all layers.
    """

    def __init__(
        self, layer: Any, alike: Sequence[EqualLengthRows], bounds: tuple[int, int]
    ) -> None:
        self._heads = layer.heads
        self._alike = alike
        self._bounds = bounds
        self._queries: Tensor | None = None

    def remember(self, _: nn.Module, __: tuple[Any, ...], queries: Tensor) -> None:
        self._queries = queries

    def add(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        [attended], queries = args, self._queries
        if queries is None:
            raise RuntimeError("attention ended before it had queries")
        for alike in self._alike:
            first, last = self._bounds
            keys, values = alike.attended[..., first:last].chunk(2, -1)
            own = queries.index_select(0, alike.rows)
            q, k, v = (self._by_heads(one) for one in (own, keys, values))
            found = _joined(F.scaled_dot_product_attention(q, k, v))
            added = alike.scales * found[: len(alike.onto)].to(attended.dtype)
            if alike.regions is not None:
                # Factor 1 for rows without a region, which leaves their bits unchanged.
                added = added * alike.regions[queries.shape[1]]
            # No row appears twice in ``onto``, so the order of summation is determined.
            attended = attended.index_add(0, alike.onto, added)
        return (attended,)

    def _by_heads(self, tokens: Tensor) -> Tensor:
        """Split into heads: ``[rows, heads, tokens, features of a head]``."""
        return tokens.unflatten(-1, (self._heads, -1)).transpose(1, 2)


def _joined(heads: Tensor) -> Tensor:
    """Join heads: ``[rows, tokens, features]``."""
    return heads.transpose(1, 2).flatten(2)


def _read(adapter: IPAdapter, pixels: Tensor) -> Tensor:
    """The encoder output that an adapter reads, of normalized images ``[n, 3, side, side]``."""
    network = adapter.encoder.network
    pixels = pixels.to(network.dtype)
    if adapter.kind == "plain":
        return network(pixels).image_embeds
    return network(pixels, output_hidden_states=True).hidden_states[-2]
