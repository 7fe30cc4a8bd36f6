"""Adapters of models that read reference images, beside rows without and rows that skip a block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, QwenImageEditPlusPipeline

from guidance.edits import SkippedBlocks
from server.models.adapters.adapter import RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.flux1 import FluxDenoiser
from server.models.flux2 import Flux2Denoiser
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.qwen_image import QwenDenoiser
from tests.server.models import tiny_flux1, tiny_flux2, tiny_qwen_image
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes
from tests.server.models.alike import difference
from tests.server.models.tiny_sdxl import saved

pytest.importorskip("peft", reason="diffusers loads adapters through peft")

WEIGHT = 0.8


def kontext(folder: Path) -> tuple[Any, Callable[[Any], Any]]:
    pipeline = tiny_flux1.make(tiny_flux1.DEV, guided=True, kind=FluxKontextPipeline)
    saved(pipeline, folder)
    denoiser: Any = FluxDenoiser
    return pipeline, lambda network: denoiser(network, None)


def klein(folder: Path) -> tuple[Any, Callable[[Any], Any]]:
    pipeline = tiny_flux2.make(distilled=False)
    saved(pipeline, folder)
    return pipeline, Flux2Denoiser


def qwen(folder: Path) -> tuple[Any, Callable[[Any], Any]]:
    """A model like the 2511 release, which modulates tokens of pictures by a second list."""
    pipeline = tiny_qwen_image.make(QwenImageEditPlusPipeline, zero_cond_t=True)
    pipeline.save_pretrained(folder)
    pipeline.processor.image_processor.save_pretrained(folder / "processor")
    denoiser: Any = QwenDenoiser
    return pipeline, lambda network: denoiser(network, None)


@pytest.mark.parametrize("family", [kontext, klein, qwen])
@torch.inference_mode()
def test_a_row_with_an_adapter_and_a_picture_is_that_of_diffusers_in_any_company(
    family: Callable[[Path], tuple[Any, Callable[[Any], Any]]], tmp_path: Path
) -> None:
    pipeline, denoiser = family(tmp_path / "model")
    model = load_model(tmp_path / "model", name="m", device="cpu", dtype="float32")
    made = files.peft({"transformer": changes(pipeline.transformer, 6)})[0]
    path = files.saved((made, {}), tmp_path / "one.safetensors")
    file = AdapterFile.read("one", path, Target.of("m", model.adaptable()))
    own = (Weighted(file.load(model.device, model.dtype), WEIGHT),)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *model.latent_shape(32, 32), generator=generator).repeat(4, 1, 1, 1)
    [picture] = model.encode_image(torch.rand(1, 3, 32, 32, generator=generator))
    [text] = model.encode_prompts(["a star"], 32, 32)
    t, plain = (
        torch.full((4,), 0.5),
        RowInputs(model.stack([model.add_references(text, [picture])] * 4)),
    )
    skipped = (SkippedBlocks(model.layers()[:1]),)
    inputs = replace(
        plain, edits=[(), skipped, skipped, ()], adapters=RowAdapters((own, own, (), ()))
    )
    rows = model.evaluate(x, t, inputs)

    adapted = copy.deepcopy(pipeline)
    adapted.load_lora_weights(path.parent, weight_name=path.name, adapter_name="one")
    adapted.set_adapters(["one"], [WEIGHT])
    expected = denoiser(adapted.transformer)(x[:1], t[:1], plain.of([0]))[0]
    assert difference(rows[0], expected) < 1e-5
    assert difference(rows[3], expected) > 1e-2
    assert torch.equal(rows[3], model.evaluate(x, t, replace(inputs, adapters=None))[3])
    for row in (1, 2):
        [alone] = model.evaluate(x[:1], t[:1], inputs.of([row]))
        assert difference(rows[row], alone) < 1e-5
        assert difference(rows[row], rows[0]) > 1e-2
