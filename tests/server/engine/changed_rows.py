"""Forwards of a Stable Diffusion whose rows change something inside the network."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from guidance.edits import (
    BackboneScales,
    BlurredQueries,
    Edit,
    IdentityAttention,
    NormalizedAttention,
    SkippedBlocks,
    SkipScales,
)
from server.models.adapters.adapter import Weighted
from server.models.conditioning import StackedConditioning
from server.models.controls.control import Control
from server.models.controls.row_controls import RowControl, RowControls
from server.models.hosted import HostedModel
from server.models.image_prompts.row_image_prompts import RowImagePrompt
from server.models.inputs import RowInputs
from server.models.unet_model import TEXT
from tests.server.models.adapters.low_rank import adapter, changes, norm_changes
from tests.server.models.controls.tiny_controls import of_unet
from tests.server.models.image_prompts.tiny_image_prompts import cross_attention

ForwardInputs: TypeAlias = tuple[Tensor, Tensor, RowInputs]
Edits: TypeAlias = tuple[Edit, ...]

SIDE = 64


def drawn(model: HostedModel, seed: int, *shape: int) -> Tensor:
    """Noise of the model's data type, on its device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(model.device, model.dtype)


def told(model: HostedModel, rows: int, seed: int) -> StackedConditioning:
    """Texts of some rows."""
    return StackedConditioning({TEXT: drawn(model, 100 + seed, rows, 7, 128)})


def given(model: HostedModel, rows: int, seed: int, **more: Any) -> ForwardInputs:
    """What a forward of some rows is given."""
    x = drawn(model, seed, rows, *model.latent_shape(SIDE, SIDE)).float()
    t = torch.full((rows,), 100.0 + seed, device=model.device)
    return x, t, RowInputs(told(model, rows, seed), **more)


def ink(model: HostedModel, rank: int = 4, within: str = "attn") -> Weighted:
    """An adapter for the layers whose names match, and for all norms."""
    unet = model.modules()["unet"]
    low_rank = adapter("ink", {"unet": changes(unet, rank, seed=rank, within=within)})
    return Weighted(replace(low_rank, norms={"unet": norm_changes(unet, seed=rank)}), 0.7)


def last_layer(model: HostedModel) -> str:
    """The last of the layers whose attention edits can change."""
    return [name for name in model.layers() if name.startswith("up_blocks")][-1]


def edits_of_all_kinds(
    model: HostedModel, sigma: float, strength: float, scale: float
) -> list[Edits]:
    """Edits of 8 rows: all kinds that refer to no other row, in fixed layers with given numbers."""
    up = last_layer(model)
    return [
        (),
        (IdentityAttention(("middle",)),),
        (BlurredQueries((up,), sigma),),
        (SkippedBlocks((up,)), NormalizedAttention(scale, 2.5, strength)),
        (SkipScales((strength, 1.0)),),
        (BackboneScales((1 + strength, 1.4), (strength, 0.2)),),
        (BlurredQueries((up,), math.inf), BackboneScales((1.1, 1.2), (0.9, strength))),
        (NormalizedAttention(2 * scale, 1.5, 0.25),),
    ]


def depth_of(model: HostedModel) -> Control:
    """A ControlNet."""
    network = of_unet(model.modules()["unet"], 1, conditioning_embedding_out_channels=(16, 32))
    assert model.control_kind is not None
    return Control("depth", model.control_kind.prepared(network.to(model.dtype)), 0, 1.0)


def steered(model: HostedModel, depth: Control, seed: int) -> RowControls:
    """Two of three rows with a ControlNet, which fades in one of them."""
    unet: Any = model.modules()["unet"]
    channels = unet.config.block_out_channels[0]
    one = RowControl(depth, drawn(model, seed, channels, 8, 8), 0.5 + seed, gives_way=True)
    other = RowControl(depth, drawn(model, 10 + seed, channels, 8, 8), 1.0)
    return RowControls(((), (one,), (other,)), (0, 1, 2))


def shown(model: HostedModel, seed: int, tokens: int) -> RowImagePrompt:
    """An image prompt beside a text, for a part of the image."""
    region = {queries: drawn(model, seed, queries, 1) for queries in (4, 16)}
    # Keys and values of all layers of cross-attention.
    features = sum(2 * int(layer.inner_dim) for layer in cross_attention(model.modules()["unet"]))
    return RowImagePrompt(drawn(model, seed, tokens, features), 0.3 + seed, region)
