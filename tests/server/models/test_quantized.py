"""Weights in fewer bits: which layers, the error, the bytes, and adapters on top."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from embedded import MODEL_FOLDER
from server.models.adapters.adapter import Adapter, LowRank, RowAdapters, Weighted
from server.models.adapters.placing import Target
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.models.placement import Placement
from server.models.quantization import Quantization, missing_package
from server.models.quantized import layers_in_blocks
from server.models.weight_files import bytes_in_memory
from server.models.weights_held import bytes_of

KINDS: tuple[Quantization, ...] = ("int8", "fp8", "nf4")
MAX_ERROR = {"int8": 0.02, "fp8": 0.06, "nf4": 0.25}
"""Largest error of a prediction, relative to its norm."""


def loaded(kind: Quantization) -> HostedModel:
    placement = Placement(kind)
    return load_model(MODEL_FOLDER, name="m", device="cpu", dtype="float32", placement=placement)


@pytest.fixture(scope="module")
def plain() -> HostedModel:
    return loaded("none")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Iterator[HostedModel]:
    if package := missing_package(request.param):
        pytest.skip(f"{package} is not installed")
    with torch.inference_mode():
        yield loaded(request.param)


def predicted(model: HostedModel, rows: int = 2, adapters: RowAdapters | None = None) -> Any:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 4, 16, 16, generator=generator)[:rows]
    t = torch.tensor([900.0, 500.0, 300.0, 100.0])[:rows]
    prompts = ["a red circle", "a blue square", None, "a star"][:rows]
    with torch.inference_mode():
        inputs = model.inputs(prompts)
        inputs = type(inputs)(inputs.conditioning, adapters=adapters)
        return model.evaluate(x, t, inputs)


def test_only_linear_layers_inside_of_blocks_are_quantised(plain: HostedModel) -> None:
    unet = plain.modules()["unet"]
    found = layers_in_blocks(unet)
    outside = {
        name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)
    } - found.keys()
    assert "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in found
    assert {"time_embedding.linear_1", "time_embedding.linear_2"} <= outside
    assert all(name.startswith(("down_blocks", "mid_block", "up_blocks")) for name in found)


def test_predictions_stay_close_and_weights_take_the_bytes_that_were_foretold(
    model: HostedModel, plain: HostedModel
) -> None:
    kind = model.placement.quantization
    expected, made = predicted(plain), predicted(model)
    error = float((made - expected).norm() / expected.norm())
    assert 0 < error < MAX_ERROR[kind]
    foretold = bytes_in_memory(MODEL_FOLDER, torch.float32, model.placement)
    assert foretold == pytest.approx(bytes_of(model), rel=0.01)
    assert bytes_of(model) < 0.75 * bytes_of(plain)


def test_a_row_does_not_feel_its_neighbours(model: HostedModel) -> None:
    assert torch.allclose(predicted(model, 1), predicted(model, 4)[:1], rtol=0, atol=1e-5)


def test_adapters_are_added_to_quantised_layers_row_by_row(model: HostedModel) -> None:
    unet = model.modules()["unet"]
    generator = torch.Generator().manual_seed(1)
    names = [name for name in layers_in_blocks(unet) if name.endswith("attn1.to_q")]
    changes: dict[str, LowRank] = {}
    for name in names:
        layer: Any = unet.get_submodule(name)
        down = torch.randn(4, layer.in_features, generator=generator) / layer.in_features**0.5
        changes[name] = LowRank(down, torch.randn(layer.out_features, 4, generator=generator))
    known = Target.of("m", model.adaptable()).layers["unet"]
    assert all(known[n] == (len(c.up), c.down.shape[1]) for n, c in changes.items())
    adapter = Adapter("a", "0" * 16, {"unet": changes})
    untouched = predicted(model)
    adapted = predicted(model, adapters=RowAdapters((((Weighted(adapter, 1.0)),), ())))
    assert torch.equal(adapted[1], untouched[1])

    def add(change: LowRank) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return output + args[0] @ change.down.T @ change.up.T

        return hook

    handles = [unet.get_submodule(n).register_forward_hook(add(c)) for n, c in changes.items()]
    by_hand = predicted(model)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(adapted[0], untouched[0], rtol=0, atol=1e-2)
    assert torch.allclose(adapted[0], by_hand[0], rtol=0, atol=1e-4)
