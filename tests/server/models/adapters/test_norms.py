"""Changes of norms: each row has those of its own adapters, as if they were in the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from safetensors.torch import save_file
from torch import Tensor, nn

from server.errors import AdapterMismatch
from server.models.adapters.adapted_network import AdaptedNetwork
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.streamed import stream_blocks

CPU = torch.device("cpu")
CHANNELS = {"group": 6, "layer": 6, "heads": 3, "root": 6}
"""Width of each norm."""

LYCORIS = "lora_unet_", "w_norm", "b_norm"
COMFYUI = "diffusion_model.", "diff", "diff_b"


class Norms(nn.Module):
    """A norm of each kind; the input of that of heads is ``[rows, tokens, heads, channels]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.group = nn.GroupNorm(2, 6)
        self.layer = nn.LayerNorm(6)
        self.heads = nn.RMSNorm(3)
        self.root = RMSNorm(6, eps=1e-6)
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.group(self.conv(x)).tanh().permute(0, 2, 3, 1).flatten(1, 2))
        x = self.root(self.heads(x.unflatten(2, (2, 3))).flatten(2).tanh())
        return self.proj(x)


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    made: Any = Norms()
    for name in CHANNELS:
        for parameter in made.get_submodule(name).parameters():
            nn.init.normal_(parameter)
    return made.to(memory_format=torch.channels_last)


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def drawn(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """A change of each parameter of the norms, by its name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{layer}.{name}": torch.randn(len(one), generator=generator)
        for layer in CHANNELS
        for name, one in network.get_submodule(layer).named_parameters()
    }


def written(moved: Mapping[str, Tensor], form: tuple[str, str, str]) -> dict[str, Tensor]:
    prefix, weight, bias = form
    ends = {"weight": weight, "bias": bias}
    named = {tuple(name.split(".")): one for name, one in moved.items()}
    return {f"{prefix}{layer}.{ends[name]}": one for (layer, name), one in named.items()}


def load(network: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> Adapter:
    save_file(dict(tensors), path)
    file = AdapterFile.read(path.stem, path, Target.of("small", {"unet": network}))
    adapter = file.load(CPU, torch.float32)
    assert adapter.nbytes == file.nbytes(torch.float32)
    return adapter


@torch.no_grad()
def ours(network: nn.Module, rows: list[tuple[Weighted, ...]], *, fixed: bool = False) -> Tensor:
    adapted, x = AdaptedNetwork("unet", network, CPU), inputs(len(rows))
    with adapted.applied(RowAdapters(tuple(rows), fixed)):
        first = network(x)
        assert torch.equal(first, network(x))
    return first


@torch.no_grad()
def merged(network: nn.Module, *changes: tuple[Mapping[str, Tensor], float]) -> nn.Module:
    made = copy.deepcopy(network)
    for moved, weight in changes:
        for name, one in moved.items():
            made.get_parameter(name).add_(weight * one)
    return made


def assert_near(made: Tensor, expected: Tensor) -> None:
    assert float((made - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("layout", ["aaaa", "-ab-", "a-ba", "-c--"])
@pytest.mark.parametrize("form", [LYCORIS, COMFYUI], ids=["lycoris", "comfyui"])
@torch.no_grad()
def test_each_row_is_that_of_a_network_with_its_changes_merged(
    network: Norms, tmp_path: Path, form: tuple[str, str, str], layout: str, fixed: bool
) -> None:
    first, second = drawn(network, 2), drawn(network, 3)
    a, b = (
        load(network, tmp_path / f"{i}.safetensors", written(one, form))
        for i, one in enumerate((first, second))
    )
    rows: dict[str, tuple[Weighted, ...]] = {
        "-": (),
        "a": (Weighted(a, 0.7),),
        "b": (Weighted(b, -1.5),),
        "c": (Weighted(a, 0.5), Weighted(b, 1.0)),
    }
    changes: dict[str, list[tuple[Mapping[str, Tensor], float]]] = {
        "a": [(first, 0.7)],
        "b": [(second, -1.5)],
        "c": [(first, 0.5), (second, 1.0)],
    }
    made, x = ours(network, [rows[one] for one in layout], fixed=fixed), inputs(len(layout))
    for row, one in enumerate(layout):
        if one == "-":
            assert torch.equal(made[row], network(x)[row])
        else:
            assert_near(made[row], merged(network, *changes[one])(x)[row])


def test_a_row_of_a_fixed_forward_has_the_same_bits_whatever_its_neighbours_have(
    network: Norms, tmp_path: Path
) -> None:
    a, b = (
        Weighted(load(network, tmp_path / f"{i}.safetensors", written(one, LYCORIS)), 0.7)
        for i, one in enumerate((drawn(network, 2), drawn(network, 3)))
    )
    alone = ours(network, [(), (), (a,), (), ()], fixed=True)[2]
    for company in ([(b,), (), (a,), (b,), (a, b)], [(a,)] * 5, [(), (b,), (a,), (), ()]):
        assert torch.equal(ours(network, company, fixed=True)[2], alone)


def test_changes_of_norms_stand_beside_those_of_layers(network: Norms, tmp_path: Path) -> None:
    """LyCORIS writes both; an adapter may also change only some of the norms of a network."""
    down, up = torch.randn(2, 6), torch.randn(5, 2)
    moved = {"group.weight": torch.randn(6), "layer.bias": torch.randn(6)}
    tensors = written(moved, LYCORIS)
    tensors |= {"lora_unet_proj.lora_down.weight": down, "lora_unet_proj.lora_up.weight": up}
    adapter = load(network, tmp_path / "one.safetensors", tensors)
    made = ours(network, [(Weighted(adapter, 0.5),), ()])
    expected = merged(network, (moved | {"proj.weight": up @ down}, 0.5))
    with torch.no_grad():
        assert_near(made[0], expected(inputs(2))[0])


def test_changes_of_norms_are_told_twice_where_a_network_has_its_rows_twice(
    network: Norms, tmp_path: Path
) -> None:
    moved = drawn(network, 2)
    adapter = load(network, tmp_path / "one.safetensors", written(moved, LYCORIS))
    rows = RowAdapters(((), (Weighted(adapter, 1.0),)))
    x = inputs(4)
    with torch.no_grad(), AdaptedNetwork("unet", network, CPU).applied(rows):
        made = network(x)
    with torch.no_grad():
        assert_near(made[[1, 3]], merged(network, (moved, 1.0))(x)[[1, 3]])
        assert torch.equal(made[[0, 2]], network(x)[[0, 2]])


def test_what_is_kept_counts_the_changes_of_norms(network: Norms, tmp_path: Path) -> None:
    tensors = written(drawn(network, 2), LYCORIS)
    adapter = load(network, tmp_path / "one.safetensors", tensors)
    assert adapter.nbytes == 4 * (2 * 6 + 2 * 6 + 3 + 6)
    adapted = AdaptedNetwork("unet", network, CPU)
    with adapted.applied(RowAdapters(((Weighted(adapter, 1.0),), (), (Weighted(adapter, 0.5),)))):
        assert adapted.kept_bytes == 2 * adapter.nbytes


def test_norms_in_half_precision_are_changed_too(network: Norms, tmp_path: Path) -> None:
    moved = {name: one / 4 for name, one in drawn(network, 2).items()}
    adapter = load(network, tmp_path / "one.safetensors", written(moved, LYCORIS))
    half, rows = copy.deepcopy(network).to(torch.bfloat16), ((Weighted(adapter, 1.0),), ())
    x = inputs(2)
    with torch.no_grad(), AdaptedNetwork("unet", half, CPU).applied(RowAdapters(rows)):
        made = half(x.bfloat16())
    with torch.no_grad():
        expected = merged(network, (moved, 1.0))(x)
    assert float((made[0] - expected[0]).norm() / expected[0].norm()) < 0.05


def test_norms_of_a_streamed_network_are_changed_alike(network: Norms, tmp_path: Path) -> None:
    blocks: Any = nn.Module()
    blocks.blocks = nn.ModuleList([network])
    tensors = {
        name.replace("unet_", "unet_blocks_0_"): one
        for name, one in (written(drawn(network, 2), LYCORIS).items())
    }
    blocks.forward = lambda x: network(x)
    adapter = load(blocks, tmp_path / "one.safetensors", tensors)
    rows: list[tuple[Weighted, ...]] = [(Weighted(adapter, 1.0),), ()]
    expected = ours(blocks, rows)
    stream_blocks(blocks, CPU)
    assert torch.equal(ours(blocks, rows), expected)


def test_an_adapter_of_the_norms_of_a_text_encoder_changes_how_prompts_are_encoded(
    network: Norms, tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"text_encoder.layer.w_norm": torch.ones(6)}, path)
    target = Target.of("small", {"text_encoder": network})
    file = AdapterFile.read("one", path, target)
    assert file.networks == ("text_encoder",)
    assert file.load(CPU, torch.float32).changes_text


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        (
            "lora_unet_layer.w_norm",
            (5,),
            r"shape \[5\] \(lora_unet_layer.w_norm\) for layer",
        ),
        ("lora_unet_layer.diff_b", (6, 1), r"of the shape \[6, 1\] .* a norm of 6 channels in"),
        ("lora_unet_proj.diff", (6,), "not understood: lora_unet_proj.diff"),
        ("lora_unet_proj.w_norm", (6,), "not understood: lora_unet_proj.w_norm"),
        ("lora_unet_attic.w_norm", (6,), "not understood: lora_unet_attic.w_norm"),
    ],
)
def test_what_fits_no_norm_is_refused_by_name(
    network: Norms, tmp_path: Path, name: str, shape: tuple[int, ...], says: str
) -> None:
    tensors = written({"group.weight": torch.ones(6)}, LYCORIS) | {name: torch.ones(shape)}
    with pytest.raises(AdapterMismatch, match=says):
        load(network, tmp_path / "one.safetensors", tensors)
