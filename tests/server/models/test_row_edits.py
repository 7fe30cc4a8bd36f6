"""Rows with edits of the network equal the same row alone under an ordinary whole-batch change."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from torch import Tensor

from embedded import MODEL_FOLDER
from guidance.edits import (
    ApartFrom,
    BackboneScales,
    BlurredQueries,
    IdentityAttention,
    SkippedBlocks,
    SkipScales,
    WeakModel,
)
from server.models.row_edits import RowEdits
from tests.server.token_merging import kept_apart

MID = "mid_block.attentions.0.transformer_blocks.0"
UP = "up_blocks.1.attentions.1.transformer_blocks.0"


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(MODEL_FOLDER / "unet").eval()


@pytest.fixture(scope="module")
def edited(unet):
    network = copy.deepcopy(unet)
    return network, RowEdits(network)


def inputs(rows, size=(16, 16)):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 4, *size, generator=generator)
    told = torch.randn(rows, 32, 128, generator=generator)
    t = torch.linspace(900, 100, rows)
    return x, t, told


@torch.no_grad()
def forward(network, x, t, told):
    return network(x, t, told, return_dict=False)[0]


def forward_with(edited, edits, size=(16, 16)):
    network, hooks = edited
    x, t, told = inputs(len(edits), size)
    with hooks.applied(edits, x):
        return forward(network, x, t, told)


def with_processor(network, layer, processor):
    """The network with another attention processor in one layer's self-attention."""
    changed = copy.deepcopy(network)
    changed.get_submodule(f"{layer}.attn1").set_processor(processor)
    return changed


class BlurProcessor:
    """SEG as published: queries blurred by a kernel of odd size, with reflected borders."""

    def __init__(self, sigma, height):
        self.sigma, self.height = sigma, height

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        rows, tokens, _ = hidden_states.shape
        query = attn.to_q(hidden_states)
        query = self.blur(query, self.height, tokens // self.height)
        q, k, v = (
            part.view(rows, tokens, attn.heads, -1).transpose(1, 2)
            for part in (query, attn.to_k(hidden_states), attn.to_v(hidden_states))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, -1)
        return attn.to_out[0](out)

    def blur(self, query, height, width):
        picture = query.transpose(1, 2).unflatten(2, (height, width))
        if math.isinf(self.sigma):
            return picture.mean((2, 3), keepdim=True).expand_as(picture).flatten(2).transpose(1, 2)
        down, across = (published_taps(side, self.sigma) for side in (height, width))
        kernel = torch.outer(down, across).expand(picture.shape[1], 1, -1, -1)
        left, top = len(across) // 2, len(down) // 2
        padded = F.pad(picture, (left, left, top, top), mode="reflect")
        both = F.conv2d(padded, kernel, groups=picture.shape[1])
        return both.flatten(2).transpose(1, 2)


def published_taps(side, sigma):
    """The authors' kernel, whose size is odd: from six sigma, but limited by the side.

    (``kernel_size = ceil(6 sigma) + 1 - ceil(6 sigma) % 2``, then the lesser of that and
    ``side - (side % 2 - 1)``.)
    """
    size = math.ceil(6 * sigma)
    size = min(size + 1 - size % 2, side - (side % 2 - 1))
    taps = torch.exp(-0.5 * (torch.linspace(-(size - 1) / 2, (size - 1) / 2, size) / sigma) ** 2)
    return taps / taps.sum()


def skipping(network, layer):
    changed = copy.deepcopy(network)
    block = changed.get_submodule(layer)

    def forward(hidden_states, *args, **kwargs):
        return hidden_states

    block.forward = forward
    return changed


def freed(network):
    """diffusers' own FreeU."""
    changed = copy.deepcopy(network)
    changed.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.5)
    return changed


def skip_tuned(network, factors):
    """Skip tuning with factors by up block and position, from the bottom up, in block forwards."""
    changed = copy.deepcopy(network)
    left = list(factors)
    for block in changed.up_blocks:
        own = [left.pop(0) for _ in block.resnets]
        plain = block.forward

        def forward(*args, own=own, plain=plain, **kwargs):
            skips = list(kwargs.pop("res_hidden_states_tuple"))
            for i, factor in enumerate(own):
                skips[-1 - i] = skips[-1 - i] * factor
            return plain(*args, res_hidden_states_tuple=tuple(skips), **kwargs)

        block.forward = forward
    assert not left
    return changed


CHANGES = {
    "identity": (
        IdentityAttention(("middle",)),
        lambda unet: with_processor(unet, MID, PAGOnly()),
    ),
    "identity in another layer": (
        IdentityAttention(("up_blocks.1.attentions.1",)),
        lambda unet: with_processor(unet, UP, PAGOnly()),
    ),
    "blurred": (
        BlurredQueries((UP,), 0.5),
        lambda unet: with_processor(unet, UP, BlurProcessor(0.5, 8)),
    ),
    "blurred as far as half a side": (
        BlurredQueries((UP,), 3.0),
        lambda unet: with_processor(unet, UP, BlurProcessor(3.0, 8)),
    ),
    "blurred without end": (
        BlurredQueries((MID,), math.inf),
        lambda unet: with_processor(unet, MID, BlurProcessor(math.inf, 4)),
    ),
    "skipped": (SkippedBlocks((UP,)), lambda unet: skipping(unet, UP)),
    "skip-tuned": (
        SkipScales((0.5, 1.0)),
        lambda unet: skip_tuned(unet, torch.linspace(0.5, 1, 6).tolist()),
    ),
    "freed": (BackboneScales((1.3, 1.5), (0.9, 0.2)), lambda unet: freed(unet)),
}


class PAGOnly:
    """diffusers' own perturbed attention, for which each perturbed row follows a plain one."""

    def __init__(self):
        self._pag: Any = PAGIdentitySelfAttnProcessor2_0()

    def __call__(self, attn, hidden_states, **options):
        both = torch.cat([hidden_states, hidden_states])
        return self._pag(attn, both, **options).chunk(2)[1]


@pytest.mark.parametrize(("edit", "ordinary"), CHANGES.values(), ids=CHANGES.keys())
def test_a_row_in_company_equals_that_row_under_the_ordinary_hook(unet, edited, edit, ordinary):
    company = [(), (edit,), (IdentityAttention(("down_blocks",)),), (SkipScales((0.3,)),)]
    ours = forward_with(edited, company)
    x, t, told = inputs(4)
    theirs = forward(ordinary(unet), x[1:2], t[1:2], told[1:2])
    assert_near(ours[1:2], theirs)
    plain = forward(unet, x, t, told)
    assert_near(ours[:1], plain[:1])
    assert (ours[1:2] - plain[1:2]).abs().max() > 1e-3


def test_plain_rows_are_not_touched_at_all(unet, edited):
    every = [(edit,) for edit, _ in CHANGES.values()]
    ours = forward_with(edited, [*every, (), ()])
    x, t, told = inputs(len(every) + 2)
    assert torch.equal(ours[-2:], forward(unet, x, t, told)[-2:])
    network, _ = edited
    assert torch.equal(forward(network, x, t, told), forward(unet, x, t, told))


def test_several_edits_of_a_row_go_together(unet, edited):
    ours = forward_with(edited, [(SkipScales((0.6,)), IdentityAttention(("middle",)))])
    both = with_processor(skip_tuned(unet, [0.6] * 6), MID, PAGOnly())
    assert_near(ours, forward(both, *inputs(1)))


def test_the_coarse_part_of_pictures_that_are_not_square_is_that_of_diffusers(unet, edited):
    edit = BackboneScales((1.3, 1.5), (0.9, 0.2))
    ours = forward_with(edited, [(edit,)], size=(6, 24))
    assert_near(ours, forward(freed(unet), *inputs(1, (6, 24))))


class Copied(torch.nn.Module):
    """A middle that does nothing; without one, diffusers' FreeU scales a skip connection in place,
    which is then the backbone itself."""

    has_cross_attention = False

    def forward(self, sample, *_, **__):
        return sample.clone()


@torch.no_grad()
def test_a_network_without_a_middle_has_a_backbone_too():
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()
    x, _, told = inputs(1, (8, 8))
    theirs = freed(network)
    setattr(theirs, "mid_block", Copied())  # noqa: B010
    with RowEdits(network).applied([(BackboneScales((1.3, 1.5), (0.9, 0.2)),)], x):
        ours = forward(network, x, 5, told)
    assert_near(ours, forward(theirs, x, 5, told))


@pytest.mark.parametrize("sigma", [0.5, 4.0])
def test_queries_are_blurred_over_pictures_that_are_not_square(unet, edited, sigma):
    """Attention over 4 x 12 cells and, with an odd height, 3 x 8; halved from odd sides, 5 x 4."""
    for size, layer, height in (((8, 24), UP, 4), ((6, 16), UP, 3), ((17, 13), MID, 5)):
        ours = forward_with(edited, [(BlurredQueries((layer,), sigma),)], size=size)
        theirs = with_processor(unet, layer, BlurProcessor(sigma, height))
        assert_near(ours, forward(theirs, *inputs(1, size)))


@pytest.mark.parametrize("threshold", [0.65, 0.95])
def test_rows_kept_apart_equal_their_own_batch_under_the_ordinary_hook(unet, threshold):
    # In float64, since rounding would decide for tokens whose similarity is near the threshold.
    unet = copy.deepcopy(unet).double()
    network = copy.deepcopy(unet)
    hooks = RowEdits(network)
    layers = tuple(name for name in hooks.layers() if name.startswith("up_blocks"))
    ordinary, merging = kept_apart(unet, layers, 0.9, threshold)
    x, t, told = (tensor.double() for tensor in inputs(3))
    # Similar enough for some of the tokens, and at one time, like images of one request.
    x, t, told = x[:1] + 0.8 * (x - x[:1]), t[:1].expand(3), told[:1].expand(3, -1, -1)
    theirs = forward(ordinary, x, t, told)
    assert any(0 < share < 1 for share in merging.moved)

    def own(reference):
        return ApartFrom(("up_blocks",), 0.9, threshold, reference)

    others, t_others, told_others = (tensor.double() for tensor in inputs(3))
    edits = [
        (own(None),),
        (IdentityAttention(("middle",)),),
        (own(0),),
        (),
        (own(0),),
        (ApartFrom(("up_blocks",), 2.0, 0.5, 1),),
    ]
    company = [x[0], others[0], x[1], others[1], x[2], others[2]]
    times = torch.stack([t[0], t_others[0], t[1], t_others[1], t[2], t_others[2]])
    prompts = [told[0], told_others[0], told[1], told_others[1], told[2], told_others[2]]
    x_all = torch.stack(company)
    with hooks.applied(edits, x_all):
        ours = forward(network, x_all, times, torch.stack(prompts))
    assert_near(ours[::2][:3], theirs)
    assert (ours[2] - forward(unet, x, t, told)[1]).abs().max() > 1e-3
    plain = forward(unet, x_all, times, torch.stack(prompts))
    assert torch.equal(ours[[0, 3]], plain[[0, 3]])
    assert (ours[5] - plain[5]).abs().max() > 1e-3


def test_tokens_keep_apart_only_from_rows_that_are_named(unet, edited):
    network, hooks = edited
    x, t, told = inputs(3)
    edits = [(ApartFrom(("up_blocks",), 0.9, 0.5),)] * 3
    with hooks.applied(edits, x):
        assert torch.equal(forward(network, x, t, told), forward(unet, x, t, told))


def test_the_layers_of_a_unet_are_its_blocks_in_order(edited):
    _, hooks = edited
    assert hooks.layers()[0] == "down_blocks.1.attentions.0.transformer_blocks.0"
    assert MID in hooks.layers()
    assert len(hooks.layers()) == 7


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (IdentityAttention(("attic",)), "no layer 'attic'; it has middle, down_blocks.1"),
        (SkippedBlocks(("mid_block", "mid")), "no layer 'mid'"),
        (WeakModel(), "no weaker companion"),
        (ApartFrom(("up_blocks", "cellar"), 0.9, 0.7), "no layer 'cellar'"),
    ],
)
def test_what_a_network_lacks_is_said(edited, edit, says):
    _, hooks = edited
    assert says in (hooks.refuses(edit) or "")


@pytest.mark.parametrize("edit", [edit for edit, _ in CHANGES.values()], ids=CHANGES.keys())
def test_what_a_network_has_is_not_refused(edited, edit):
    assert edited[1].refuses(edit) is None


def test_only_a_companion_can_be_weak(edited):
    _, hooks = edited
    x, *_ = inputs(1)
    with pytest.raises(ValueError, match="WeakModel"), hooks.applied([(WeakModel(),)], x):
        pass


# Transformers: PixArt's blocks are BasicTransformerBlocks, SD3's are joint ones.


@pytest.fixture(scope="module")
def pixart():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
    ).eval()


@torch.no_grad()
def pixart_forward(network, x, told, t):
    return network(
        x,
        encoder_hidden_states=told,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


@pytest.mark.parametrize("edit", [IdentityAttention(("middle",)), SkippedBlocks(("middle",))])
def test_rows_of_a_diffusion_transformer_are_edited_alike(pixart, edit):
    x, told, t = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16), torch.tensor([9.0, 500.0, 800.0])
    layer = "transformer_blocks.1"
    ordinary = (
        with_processor(pixart, layer, PAGOnly())
        if isinstance(edit, IdentityAttention)
        else skipping(pixart, layer)
    )
    network = copy.deepcopy(pixart)
    hooks = RowEdits(network)
    with hooks.applied([(), (edit,), ()], x):
        ours = pixart_forward(network, x, told, t)
    theirs = pixart_forward(ordinary, x[1:2], told[1:2], t[1:2])
    plain = pixart_forward(pixart, x, told, t)
    assert_near(ours[1:2], theirs)
    assert_near(ours[::2], plain[::2])
    assert (ours[1] - plain[1]).abs().max() > 1e-3
    assert "no skip connections" in (hooks.refuses(SkipScales((0.5,))) or "")


@pytest.fixture(scope="module")
def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


@pytest.mark.parametrize("number", [1, 2])
def test_joint_blocks_are_skipped_for_picture_and_prompt(sd3, number):
    x, told, pooled = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16), torch.randn(3, 12)
    t = torch.tensor([9.0, 500.0, 800.0])

    @torch.no_grad()
    def forward(network, rows, **options):
        return network(x[rows], told[rows], pooled[rows], t[rows], return_dict=False, **options)[0]

    network = copy.deepcopy(sd3)
    hooks = RowEdits(network)
    layer = f"transformer_blocks.{number}"
    assert "no plain self-attention" in (hooks.refuses(IdentityAttention((layer,))) or "")
    assert hooks.refuses(SkippedBlocks((layer,))) is None
    with hooks.applied([(), (SkippedBlocks((layer,)),), ()], x):
        ours = forward(network, slice(0, 3))
    theirs = forward(sd3, slice(1, 2), skip_layers=[number])
    assert_near(ours[1:2], theirs)
    assert_near(ours[::2], forward(sd3, slice(0, 3))[::2])
