"""Changes of biases: each row has those of its own adapters, as the trainers add them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from server.models.adapters.adapted_network import AdaptedNetwork
from server.models.adapters.adapted_rows import sender
from server.models.adapters.adapter import Adapter, LowRank, RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.layer_changes import layer_changes
from server.models.adapters.placing import Target

CPU = torch.device("cpu")
LAYERS = ("conv", "proj")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x).tanh().permute(0, 2, 3, 1))


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    made: Any = Layers()
    return made.to(memory_format=torch.channels_last)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def load(
    network: nn.Module,
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> Adapter:
    save_file({name: one.contiguous() for name, one in tensors.items()}, path, metadata)
    file = AdapterFile.read(path.stem, path, Target.of("small", {"unet": network}))
    loaded = file.load(CPU, torch.float32)
    assert loaded.nbytes == file.nbytes(torch.float32)
    return loaded


@torch.no_grad()
def ours(network: nn.Module, x: Tensor, *rows: tuple[Weighted, ...], fixed: bool = False) -> Tensor:
    adapted = AdaptedNetwork("unet", network, CPU)
    with adapted.applied(RowAdapters(rows, fixed)):
        return network(x)


def assert_near(made: Tensor, expected: Tensor) -> None:
    assert float((made - expected).norm() / expected.norm()) < 1e-5


# Peft takes vectors for remains of sharded matrices, and warns.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("fixed", [False, True])
def test_a_bias_beside_factors_is_that_of_peft(
    network: Layers, x: Tensor, tmp_path: Path, *, fixed: bool
) -> None:
    """It is multiplied by alpha / rank, as with diffusers' ``lora_bias``; other rows have none."""
    peft: Any = pytest.importorskip("peft")
    own: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": [*LAYERS]}
    config = peft.LoraConfig(**own, lora_bias=True, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(network), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    metadata = json.dumps({f"unet.{entry}": value for entry, value in own.items()})
    tensors = peft.get_peft_model_state_dict(model)
    assert "base_model.model.proj.lora_B.bias" in tensors
    loaded = load(
        network, tmp_path / "one.safetensors", tensors, {"lora_adapter_metadata": metadata}
    )
    plain = ours(network, x, (), (), (), (), fixed=fixed)
    weights = (None, 1.0, 0.6, None)
    rows = [() if one is None else (Weighted(loaded, one),) for one in weights]
    made = ours(network, x, *rows, fixed=fixed)
    for row, weight in enumerate(weights):
        if weight is None:
            assert torch.equal(made[row], plain[row])
            continue
        for layer in LAYERS:
            model.base_model.model.get_submodule(layer).set_scale("default", weight)
        with torch.no_grad():
            assert_near(made[row], model(x[row : row + 1])[0])


def test_what_is_kept_of_a_layer_is_counted_with_the_biases_of_its_rows(network: Layers) -> None:
    low_rank = LowRank(torch.ones(2, 6), torch.ones(5, 2), bias=torch.ones(5))
    adapter = Adapter("one", "0", {"unet": {"proj": low_rank}})
    rows = RowAdapters(((Weighted(adapter, 1.0),), (), (Weighted(adapter, 0.5),)))
    changed = layer_changes("unet", {"proj": network.proj}, rows, sender(CPU), by_products=False)[
        "proj"
    ]
    outputs = changed.outputs
    assert outputs is not None
    assert outputs.shift is not None
    # Two rows of five outputs in float32 each.
    assert outputs.factor.nbytes == outputs.shift.nbytes == 2 * 5 * 4
    assert changed.nbytes == sum(one.nbytes for one in changed.changes) + 2 * 2 * 5 * 4


@pytest.mark.parametrize("kind", ["diff", "lora"])
@torch.no_grad()
def test_a_difference_of_a_bias_is_added_as_it_is(
    network: Layers, x: Tensor, tmp_path: Path, kind: str
) -> None:
    """Whatever alpha: of LyCORIS 4.1.3 ("full") and of ComfyUI's LoraSave, with two adapters."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    merged, loaded = copy.deepcopy(network), list[Weighted]()
    for number, weight in enumerate((0.5, -1.5)):
        tensors: dict[str, Tensor] = {}
        for layer in LAYERS:
            to: Any = merged.get_submodule(layer)
            out, features = len(to.weight), to.weight[0].numel()
            name, moved = f"lora_unet_{layer}", drawn(out)
            tensors[f"{name}.diff_b"] = moved
            if kind == "diff":
                tensors[f"{name}.diff"] = difference = drawn(*to.weight.shape)
            else:
                down, up = (
                    drawn(2, *to.weight.shape[1:]),
                    drawn(out, 2, *(1,) * (to.weight.ndim - 2)),
                )
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(4.0)
                difference = 2 * up.flatten(1) @ down.reshape(2, features)
            to.weight += weight * difference.view(to.weight.shape)
            to.bias += weight * moved
        path = tmp_path / f"{number}.safetensors"
        loaded.append(Weighted(load(network, path, tensors), weight))
    made = ours(network, x, tuple(loaded), (), tuple(loaded), ())
    assert_near(made[[0, 2]], merged(x)[[0, 2]])
    assert torch.equal(made[[1, 3]], network(x)[[1, 3]])
