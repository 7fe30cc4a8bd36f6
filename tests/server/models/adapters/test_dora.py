"""DoRA: changes that depend on the norms of the model's weights, as peft and LyCORIS make them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from server.errors import AdapterMismatch
from server.models.adapters.adapted_network import AdaptedNetwork
from server.models.adapters.adapted_rows import AdaptedRows
from server.models.adapters.adapter import RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.dora import weight_of
from server.models.adapters.lycoris import as_low_rank
from server.models.adapters.magnitude import Magnitude
from server.models.adapters.placing import Target
from server.models.adapters.row_scales import InputScales

CPU = torch.device("cpu")
LAYERS = ("conv", "proj", "small")


class Layers(nn.Module):
    """Two convolutions, one of them with a kernel of one cell, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.small = nn.Conv2d(6, 6, 1, bias=False)
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.small(self.conv(x).tanh()).tanh().permute(0, 2, 3, 1))


@pytest.fixture(scope="module")
def network() -> Layers:
    torch.manual_seed(0)
    made: Any = Layers()
    return made.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def read(network: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> AdapterFile:
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    return AdapterFile.read(path.stem, path, Target.of("small", {"unet": network}))


@torch.no_grad()
def ours(network: nn.Module, x: Tensor, rows: Sequence[Sequence[Weighted]], **how: bool) -> Tensor:
    fixed = how.pop("fixed", False)
    adapted = AdaptedNetwork("unet", network, CPU, **how)
    with adapted.applied(RowAdapters(tuple(map(tuple, rows)), fixed)):
        first = network(x)
        # The second time, from stacks that were kept.
        assert torch.equal(first, network(x))
    return first


def assert_near(made: Tensor, expected: Tensor) -> None:
    assert float((made - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture(scope="module")
def trained(network: Layers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A peft model with two DoRA and a plain LoRA, and the same adapters as loaded here."""
    peft: Any = pytest.importorskip("peft")
    folder, generator = tmp_path_factory.mktemp("adapters"), torch.Generator().manual_seed(2)
    model: Any = None
    for name, rank, dora in (("first", 2, True), ("second", 3, True), ("plain", 2, False)):
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            use_dora=dora,
            target_modules=[*LAYERS],
            init_lora_weights=False,
        )
        if model is None:
            model = peft.get_peft_model(copy.deepcopy(network), config, name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
    loaded = {
        name: read(
            network,
            folder / f"{name}.safetensors",
            peft.get_peft_model_state_dict(model, adapter_name=name),
        ).load(CPU, torch.float32)
        for name in ("first", "second", "plain")
    }
    return model, loaded


@pytest.mark.parametrize("how", [{}, {"fixed": True}, {"by_products": True}])
def test_rows_of_any_mix_are_those_of_peft(
    network: Layers, x: Tensor, trained: Any, how: dict[str, bool]
) -> None:
    model, loaded = trained
    company: list[list[tuple[str, float]]] = [
        [],
        [("first", 1.0)],
        [("first", 0.6), ("second", 1.4)],
        [("plain", 0.7)],
        [("plain", 1.5), ("first", -0.5)],
        [("second", 1.0), ("plain", 1.0), ("first", 0.3)],
        [("first", 1.0)],
        [],
    ]
    made = ours(network, x, [[Weighted(loaded[n], w) for n, w in own] for own in company], **how)
    plain = ours(network, x, [()] * len(x))
    for row, own in enumerate(company):
        if not own:
            assert torch.equal(made[row], plain[row])
            continue
        model.base_model.set_adapter([name for name, _ in own])
        for layer in LAYERS:
            for name, weight in own:
                model.base_model.model.get_submodule(layer).set_scale(name, weight)
        with torch.no_grad():
            assert_near(made[row], model(x[row : row + 1])[0])


def drawn(layer: str, weight: Tensor, axis: int, *, hadamard: bool) -> dict[str, Tensor]:
    """Random factors of a layer as LyCORIS saves them, with magnitudes per output or input."""
    generator = torch.Generator().manual_seed(len(layer) + axis)
    out, flat = weight.flatten(1).shape

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 2

    if hadamard:
        own = {
            f"hada_w{i}_{end}": random(*shape)
            for i in (1, 2)
            for end, shape in (("a", (out, 2)), ("b", (2, flat)))
        }
    else:
        up = random(out, 2, *[1] * (weight.ndim - 2))
        own = {"lora_down.weight": random(2, *weight.shape[1:]), "lora_up.weight": up}
    others = [i for i in range(weight.ndim) if i != axis]
    sizes = weight.square().sum(others, keepdim=True).sqrt()
    own["dora_scale"] = sizes * (0.5 + torch.rand(sizes.shape, generator=generator))
    return {f"lora_unet_{layer}.{name}": one for name, one in own.items()} | {
        f"lora_unet_{layer}.alpha": torch.tensor(1.0)
    }


@torch.no_grad()
def blended(
    weight: Tensor, file: Mapping[str, Tensor], layer: str, axis: int, factor: float
) -> Any:
    """A weight with a file's change as ComfyUI applies it, with LyCORIS' norms."""
    own = as_low_rank({k: v for k, v in file.items() if layer in k and "dora" not in k})
    down, up = (own[f"lora_unet_{layer}.lora_{end}.weight"] for end in ("down", "up"))
    alpha = own.get(f"lora_unet_{layer}.alpha", torch.tensor(2.0)) / 2
    whole = weight + (alpha * up.flatten(1) @ down.flatten(1)).view(weight.shape)
    others = [i for i in range(weight.ndim) if i != axis]
    norms = whole.square().sum(others, keepdim=True).sqrt()
    return weight + factor * (whole * file[f"lora_unet_{layer}.dora_scale"] / norms - weight)


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize("hadamard", [False, True], ids=["lora", "loha"])
def test_sizes_by_lycoris_names_are_blended_with_the_weight(
    network: Layers, x: Tensor, trained: Any, tmp_path: Path, axis: int, hadamard: bool
) -> None:
    weights = {name: network.get_submodule(name).get_parameter("weight").data for name in LAYERS}
    file = {
        name: one
        for layer, weight in weights.items()
        for name, one in drawn(layer, weight, axis, hadamard=hadamard).items()
    }
    placed = read(network, tmp_path / "style.safetensors", file)
    dora = placed.load(CPU, torch.float32)
    assert dora.nbytes == placed.nbytes(torch.float32)
    plain = trained[1]["plain"]
    both = Weighted(dora, 0.6), Weighted(plain, 0.5)
    rows: list[tuple[Weighted, ...]] = [(), (Weighted(dora, 1.0),), both, ()]
    rows += [(Weighted(dora, -0.4),)]
    made = ours(network, x[:5], rows)
    for row in (1, 2, 4):
        merged = copy.deepcopy(network)
        for layer, weight in weights.items():
            changed = blended(weight, file, layer, axis, rows[row][0].weight)
            for one in rows[row][1:]:
                change = one.adapter.parts["unet"][layer]
                changed += one.weight * torch.einsum("or,r...->o...", change.up, change.down)
            merged.get_submodule(layer).get_parameter("weight").data = changed
        with torch.no_grad():
            assert_near(made[row], merged(x[row : row + 1])[0])
    assert torch.equal(made[0], ours(network, x[:5], [()] * 5)[0])


def test_sizes_of_inputs_scale_what_earlier_adapters_have_made_of_them(
    network: Layers, x: Tensor, trained: Any, tmp_path: Path
) -> None:
    """A LoRA comes before it, whose columns are scaled, too; the other row has only the LoRA."""
    weight = network.proj.weight.data
    file = drawn("proj", weight, 1, hadamard=False)
    dora = read(network, tmp_path / "style.safetensors", file).load(CPU, torch.float32)
    plain = trained[1]["plain"]
    made = ours(
        network, x[:2], [(Weighted(plain, 1.0), Weighted(dora, 1.0)), (Weighted(plain, 1),)]
    )
    merged = copy.deepcopy(network)
    scales = blended(weight, file, "proj", 1, 1.0)
    change = {name: one.up @ one.down.flatten(1) for name, one in plain.parts["unet"].items()}
    for layer in ("conv", "small"):
        own = merged.get_submodule(layer).get_parameter("weight").data
        own += change[layer].view(own.shape)
    down, up = (file[f"lora_unet_proj.lora_{end}.weight"] for end in ("down", "up"))
    columns = (weight + 0.5 * up @ down).norm(dim=0)
    merged.proj.weight.data = scales + change["proj"] * file["lora_unet_proj.dora_scale"] / columns
    with torch.no_grad():
        assert_near(made[0], merged(x[:1])[0])


@pytest.mark.parametrize("where", [None, slice(0, 2), torch.tensor([0, 2])])
def test_scaled_inputs_keep_their_layout(network: Layers, where: Any) -> None:
    """Products round by the layout, and a row must have the same bits beside any others."""
    x = torch.randn(3, 6, 9).mT
    count = 3 if where is None else 2
    scales = InputScales(AdaptedRows(where, count, 1), torch.full((count, 6), 2.0))
    assert scales.scaled(network.proj, x).stride() == x.stride()


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@torch.no_grad()
def test_small_changes_of_size_are_whole_in_bfloat16(tmp_path: Path, axis: int) -> None:
    """The next number above 1 in bfloat16 is 0.8 % larger, and magnitudes change by less."""
    torch.manual_seed(0)
    layers: Any = nn.Module()
    layers.proj = proj = nn.Linear(64, 64).to(torch.bfloat16)
    plain = proj.weight.float()
    norms = plain.norm(dim=1 - axis, keepdim=True)
    file = {
        "unet.proj.lora_A.weight": torch.zeros(2, 64),
        "unet.proj.lora_B.weight": torch.zeros(64, 2),
        "unet.proj.dora_scale": norms * 1.003,
    }
    dora = read(layers, tmp_path / "style.safetensors", file).load(CPU, torch.bfloat16)
    x = torch.randn(4, 512, 64).to(torch.bfloat16)
    adapted = AdaptedNetwork("unet", layers, CPU)
    for rows in ([0], [1, 2], [0, 3], [0, 1, 2, 3]):
        own = tuple((Weighted(dora, 1.0),) if row in rows else () for row in range(4))
        with adapted.applied(RowAdapters(own)):
            made = proj(x)[rows].float()
        linear = x[rows].float() @ plain.mT
        added = made - linear - proj.bias.float()
        assert float((added * linear).sum() / linear.square().sum()) == pytest.approx(3e-3, rel=0.2)


def test_a_quantised_weight_is_restored() -> None:
    torchao: Any = pytest.importorskip("torchao.quantization")
    layer: Any = nn.Linear(32, 16)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    with torch.no_grad():
        restored = weight_of(layer, torch.float32)
    torch.testing.assert_close(restored, layer.weight.dequantize(), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_quantised_weight_does_not_round_away_beside_a_bias() -> None:
    torchao: Any = pytest.importorskip("torchao.quantization")
    layer: Any = nn.Linear(64, 16, dtype=torch.bfloat16)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    layer.bias.fill_(8)
    apart = weight_of(layer, torch.bfloat16) - layer.weight.dequantize()
    assert float(apart.norm() / layer.weight.dequantize().norm()) < 0.01


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_quantised_weight_is_restored_in_bounded_memory(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchao: Any = pytest.importorskip("torchao.quantization")
    layer: Any = nn.Linear(64, 16, bias=bias, dtype=torch.bfloat16)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    at_once = weight_of(layer, torch.bfloat16)
    shapes: list[tuple[int, ...]] = []
    forward = layer.forward

    def noted(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return forward(x)

    layer.forward = noted
    # 64 columns are not a multiple of the ten that are restored at once.
    monkeypatch.setattr("server.models.adapters.dora.ENTRIES", 10 * 64)
    assert torch.equal(weight_of(layer, torch.bfloat16), at_once)
    assert shapes == [(10, 64)] * 7


LINEAR = {"unet.proj.lora_A.weight": torch.ones(2, 6), "unet.proj.lora_B.weight": torch.ones(5, 2)}


def test_sizes_by_ai_toolkits_name_mean_what_those_of_peft_do(
    network: Layers, tmp_path: Path
) -> None:
    """Its DoRAModule has ``magnitude`` beside lora_A and lora_B, and scales as peft does."""
    made: list[Magnitude | None] = []
    for name in ("magnitude", "lora_magnitude_vector"):
        tensors = {**LINEAR, f"unet.proj.{name}": torch.rand(5, generator=torch.manual_seed(1))}
        loaded = read(network, tmp_path / f"{name}.safetensors", tensors).load(CPU, torch.float32)
        made.append(loaded.parts["unet"]["proj"].magnitude)
    ours, theirs = made
    assert ours is not None
    assert theirs is not None
    assert not ours.blended
    assert torch.equal(ours.scale(0.7), theirs.scale(0.7))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lora_magnitude_vector", (6,)), ("dora_scale", (5,)), ("dora_scale", (1, 5))],
)
def test_sizes_of_another_shape_are_refused(
    network: Layers, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(AdapterMismatch, match=rf"sizes of the shape .* \(unet.proj.{name}\)"):
        read(
            network,
            tmp_path / "style.safetensors",
            LINEAR | {f"unet.proj.{name}": torch.ones(shape)},
        )
