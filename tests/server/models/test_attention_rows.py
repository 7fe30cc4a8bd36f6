"""Rows guided away from a text in their attention equal a whole batch that is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from embedded import MODEL_FOLDER
from guidance.edits import IdentityAttention, NormalizedAttention, SkipScales
from server.models.loading import load_model
from server.models.row_edits import RowEdits
from server.models.unet_model import TEXT
from tests.server.attention_guidance import guided_attention, predicted
from tests.server.models.tiny_sdxl import BASE, make, saved

WEAKLY = NormalizedAttention(scale=3.0, tau=2.5, alpha=0.5)
STRONGLY = NormalizedAttention(scale=8.0, tau=1.2, alpha=0.25)
PAG = IdentityAttention(("middle",))


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(MODEL_FOLDER / "unet").eval()


@pytest.fixture(scope="module")
def edited(unet):
    network = copy.deepcopy(unet)
    return network, RowEdits(network)


def inputs(rows):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 4, 16, 16, generator=generator)
    told, against = torch.randn(2, rows, 32, 128, generator=generator)
    return x, torch.linspace(900, 100, rows), told, against


@torch.no_grad()
def forward_with(edited, edits, rows):
    network, hooks = edited
    x, t, told, against = rows
    with hooks.applied(edits, x, against):
        return network(x, t, told, return_dict=False)[0]


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-6)


def test_each_row_of_a_mix_is_that_of_the_published_processor_alone(unet, edited):
    edits = [(), (WEAKLY,), (PAG,), (STRONGLY,), (SkipScales((0.5, 1.0)), WEAKLY)]
    x, t, told, against = inputs(5)
    ours = forward_with(edited, edits, (x, t, told, against))
    for row, edit in ((1, WEAKLY), (3, STRONGLY)):
        network, processor = guided_attention(unet, edit.scale, edit.tau, edit.alpha)
        own = slice(row, row + 1)
        assert_near(ours[own], predicted(network, x[own], t[own], told[own], against[own]))
        assert max(processor.shortened) > 0, "the case should see tokens that are shortened"
    plain = forward_with(edited, [(), (), (PAG,), (), edits[4][:1]], (x, t, told, None))
    assert torch.equal(ours[0], plain[0])
    assert_near(ours[2], plain[2])
    assert float((ours[4] - plain[4]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "plain", [NormalizedAttention(1.0, 2.5, 0.5), NormalizedAttention(5.0, 2.5, 0.0)], ids=str
)
def test_scale_one_and_alpha_zero_are_plain(edited, plain):
    rows = inputs(2)
    ours, without = (forward_with(edited, edits, rows) for edits in ([(plain,)] * 2, [(), ()]))
    assert_near(ours, without)


def test_the_text_that_is_led_away_from_matters_and_the_prompt_itself_is_plain(edited):
    x, t, told, against = inputs(2)
    away = forward_with(edited, [(WEAKLY,)] * 2, (x, t, told, against))
    other = forward_with(edited, [(WEAKLY,)] * 2, (x, t, told, against.flip(0)))
    itself = forward_with(edited, [(WEAKLY,)] * 2, (x, t, told, told))
    assert float((away - other).abs().max()) > 1e-3
    assert_near(itself, forward_with(edited, [(), ()], (x, t, told, None)))


@pytest.mark.parametrize("kind", [SD3Transformer2DModel, PixArtTransformer2DModel])
def test_networks_whose_blocks_do_not_read_the_text_itself_refuse(kind):
    small: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    small["sample_size"] = 8
    if kind is SD3Transformer2DModel:
        small |= {"caption_projection_dim": 16, "joint_attention_dim": 16}
        small |= {"pooled_projection_dim": 16, "pos_embed_max_size": 8}
    else:
        small |= {"cross_attention_dim": 16, "caption_channels": 16}
    refused = RowEdits(kind(**small)).refuses(WEAKLY)
    assert refused == "has no cross-attention that reads the text itself"


def test_a_unet_takes_it(edited):
    assert edited[1].refuses(WEAKLY) is None


def test_a_network_with_added_conditions_reads_only_the_second_text(tmp_path):
    """For SDXL, pooled vector and sizes stay the prompt's, as in the authors' pipeline."""
    pipeline = make(BASE)
    model = load_model(saved(pipeline, tmp_path / "xl"), name="xl", device="cpu", dtype="float32")
    given, against = (model.inputs(texts) for texts in (["a dog", "a cat"], ["a star", "a ring"]))
    shape = model.latent_shape(model.facts.default_width, model.facts.default_height)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([900.0, 300.0])
    edits = [(), (STRONGLY,)]
    with torch.no_grad():
        led = replace(given, edits=edits, against=against.conditioning)
        ours, plain = model.evaluate(x, t, led), model.evaluate(x, t, given)
        network, _ = guided_attention(pipeline.unet, 8.0, 1.2, 0.25)
        own = {name: one[1:] for name, one in given.conditioning.tensors.items()}
        told = own.pop(TEXT)
        both = torch.cat([told, against.conditioning.tensors[TEXT][1:]])
        theirs = network(x[1:], t[1:], both, added_cond_kwargs=own).sample
    assert torch.equal(ours[0], plain[0])
    assert_near(ours[1:], theirs)
    assert float((ours[1] - plain[1]).abs().max()) > 1e-4
