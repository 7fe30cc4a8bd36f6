"""Inputs of a Stable Diffusion folder's denoiser beside x, t and the prompt."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

from embedded import MODEL_FOLDER
from guidance.edits import IdentityAttention, SkippedBlocks, WeakModel
from server.models.conditioning import StackedConditioning
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.unet_model import TEXT, WEAK_FOLDER, embedding_of_scales


@pytest.fixture
def without_companion(tmp_path):
    return shutil.copytree(MODEL_FOLDER, tmp_path / "m", ignore=shutil.ignore_patterns("weft"))


def load(folder):
    return load_model(folder, name="m", device="cpu", dtype="auto")


def rows(count):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 4, 16, 16, generator=generator)
    told = StackedConditioning({TEXT: torch.randn(count, 32, 128, generator=generator)})
    return x, torch.full((count,), 500.0), RowInputs(told)


def test_a_row_is_edited_through_the_model_and_others_are_not():
    model = load(MODEL_FOLDER)
    edit = IdentityAttention(("middle",))
    assert model.refuses(edit) is None
    with torch.inference_mode():
        x, t, inputs = rows(3)
        plain = model.evaluate(x, t, inputs)
        edited = model.evaluate(x, t, replace(inputs, edits=[(), (edit,), ()]))
    changed = (edited - plain).flatten(1).abs().amax(1) > 1e-4
    assert changed.tolist() == [False, True, False]


def test_the_companion_is_the_weaker_unet_of_the_folder(without_companion):
    weak = UNet2DConditionModel.from_pretrained(MODEL_FOLDER / WEAK_FOLDER)
    shutil.copytree(MODEL_FOLDER / WEAK_FOLDER, without_companion / WEAK_FOLDER)
    model = load(without_companion)
    assert model.refuses(WeakModel()) is None
    with torch.inference_mode():
        x, t, inputs = rows(2)
        theirs = weak(x, t, inputs.conditioning.tensors[TEXT], return_dict=False)[0]
        torch.testing.assert_close(model.evaluate_weak(*rows(2)), theirs)


def test_a_model_without_a_companion_says_so(without_companion):
    model = load(without_companion)
    assert "no weaker companion" in (model.refuses(WeakModel()) or "")
    with pytest.raises(RuntimeError, match="'m' has no weaker companion"):
        model.evaluate_weak(*rows(1))


def test_the_companion_leaves_the_revision_as_it_is(without_companion):
    assert load(without_companion).facts.revision == load(MODEL_FOLDER).facts.revision


def test_layers_that_the_model_lacks_are_refused_with_those_it_has():
    model = load(MODEL_FOLDER)
    said = model.refuses(SkippedBlocks(("transformer_blocks.7",))) or ""
    assert "transformer_blocks.7" in said
    assert model.layers()[0] in said


@pytest.mark.parametrize("size", [8, 256])
def test_a_scale_is_embedded_as_in_diffusers(size):
    scales = torch.tensor([0.0, 0.5, 7.5, 13.0])
    pipeline: Any = LatentConsistencyModelPipeline
    theirs = pipeline.get_guidance_scale_embedding(None, scales, size)
    torch.testing.assert_close(embedding_of_scales(scales, size), theirs, rtol=1e-5, atol=1e-4)
