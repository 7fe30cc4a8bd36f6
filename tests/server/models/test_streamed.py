"""Networks whose blocks are on the device only while they run give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor, nn

from embedded import MODEL_FOLDER
from guidance.edits import BlurredQueries, IdentityAttention, SkippedBlocks
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.gguf.layers import BlockLinear, BlockRows
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.streamed import stream_blocks
from tests.server.models import tiny_flux1, tiny_z_image
from tests.server.models.adapters.low_rank import changes
from tests.server.models.tiny_sdxl import saved

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square above a star", ""]


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is only one memory here, so weights that would be on the host are made NaN."""
    there: dict[Tensor, Tensor] = {}

    def tensors_of(group: Any) -> list[Tensor]:
        own = [*group.parameters, *group.buffers]
        for module in group.modules:
            own += [*module.parameters(), *module.buffers()]
        return own

    def offload(group: Any) -> None:
        for tensor in tensors_of(group):
            if tensor not in there:
                # As when a separate stream copies the next group.
                group.cpu_param_dict[tensor] = tensor.data
                there[tensor] = tensor.data
                tensor.data = torch.full_like(
                    tensor.data, torch.nan if tensor.is_floating_point() else 0
                )

    def onload(group: Any) -> None:
        for tensor in tensors_of(group):
            tensor.data = there.pop(tensor, tensor.data)

    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", offload)
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", onload)


def embedded(_: Path) -> Path:
    return MODEL_FOLDER


def flux1(folder: Path) -> Path:
    """A model of a CLIP, a T5 with tied weights, and a transformer of two kinds of blocks."""
    return saved(tiny_flux1.make(tiny_flux1.DEV, guided=True), folder)


def z_image(folder: Path) -> Path:
    """A model with a transformer whose forward is Weft's own."""
    return saved(tiny_z_image.make(3.0), folder)


def conditioned(model: HostedModel) -> RowInputs:
    size = model.facts.default_width, model.facts.default_height
    return RowInputs(model.stack(model.encode_prompts(PROMPTS, *size)))


def predicted(model: HostedModel, inputs: RowInputs) -> Tensor:
    shape = model.latent_shape(model.facts.default_width, model.facts.default_height)
    x = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(1))
    return model.evaluate(x, torch.full((len(PROMPTS),), 0.5), inputs)


@pytest.mark.usefixtures("far_away")
@pytest.mark.parametrize("family", [embedded, flux1, z_image])
def test_a_streamed_model_gives_the_same_bits(
    tmp_path: Path, family: Callable[[Path], Path]
) -> None:
    model = load_model(family(tmp_path / "m"), name="m", device="cpu", dtype="float32")
    with torch.inference_mode():
        told = conditioned(model)
        expected = predicted(model, told)
        for part, network in model.modules().items():
            if part != "vae":
                stream_blocks(network, CPU)
        away = [p for n in model.modules().values() for p in n.parameters() if p.isnan().any()]
        assert away
        # Twice, since a forward must leave weights as it found them.
        for _ in range(2):
            streamed = conditioned(model)
            for name, tensor in told.conditioning.tensors.items():
                assert torch.equal(streamed.conditioning.tensors[name], tensor)
            assert torch.equal(predicted(model, streamed), expected)
            assert all(parameter.isnan().any() for parameter in away)


@pytest.mark.usefixtures("far_away")
def test_rows_keep_their_own_edits_and_adapters_in_a_streamed_network() -> None:
    model = load_model(MODEL_FOLDER, name="m", device="cpu", dtype="float32")
    unet = model.modules()["unet"]
    adapter = Adapter("a", "0" * 16, {"unet": changes(unet, rank=2)})
    middle = "mid_block.attentions.0.transformer_blocks.0"
    last = "up_blocks.1.attentions.1.transformer_blocks.0"
    edits = [
        (IdentityAttention((middle, last)),),
        (SkippedBlocks((last,)), BlurredQueries((middle,), 1.5)),
        (),
    ]
    with torch.inference_mode():
        plain = conditioned(model)
        of_rows = RowAdapters(((), (Weighted(adapter, 1.0),), (Weighted(adapter, 0.5),)))
        inputs = replace(plain, edits=edits, adapters=of_rows)
        unchanged, expected = predicted(model, plain), predicted(model, inputs)
        assert all(not torch.equal(a, b) for a, b in zip(unchanged, expected, strict=True))
        stream_blocks(unet, CPU)
        assert torch.equal(predicted(model, inputs), expected)
        assert torch.equal(predicted(model, plain), unchanged)


def in_blocks() -> BlockLinear:
    rows = torch.from_numpy(quantize(torch.rand(16, 32).numpy(), GGMLQuantizationType.Q8_0))
    layer = BlockLinear(nn.Linear(32, 16), BlockRows.of(rows, "Q8_0"), torch.float32)
    layer.weight = nn.Parameter(rows, requires_grad=False)
    layer.bias = nn.Parameter(torch.rand(16))
    return layer


@pytest.mark.usefixtures("far_away")
@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 16), in_blocks])
def test_a_dora_is_compared_with_weights_in_host_memory(
    tmp_path: Path, make: Callable[[], nn.Linear]
) -> None:
    network: Any = nn.Module()
    network.blocks = nn.ModuleList([make(), make()])
    file = tmp_path / "dora.safetensors"
    shapes = {"lora_A.weight": (2, 32), "lora_B.weight": (16, 2), "lora_magnitude_vector": (16,)}
    save_file({f"unet.blocks.1.{name}": torch.rand(one) for name, one in shapes.items()}, file)

    def compared() -> Tensor:
        read = AdapterFile.read("dora", file, Target.of("small", {"unet": network}))
        magnitude = read.load(CPU, torch.float32).parts["unet"]["blocks.1"].magnitude
        assert magnitude is not None
        return magnitude.norms

    expected = compared()
    stream_blocks(network, CPU)
    away = network.get_parameter("blocks.1.weight").data
    assert not away.nan_to_num().any()
    assert torch.equal(compared(), expected)
