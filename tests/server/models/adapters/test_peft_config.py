"""Adapters that peft saved act as in peft, and options that are not supported are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from server.errors import AdapterMismatch
from server.models.adapters.adapted_network import AdaptedNetwork
from server.models.adapters.adapter import Adapter, RowAdapters, Weighted
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterShelf
from server.models.weight_memory import WeightMemory

CPU = torch.device("cpu")
LAYERS = ("first", "blocks.0.proj", "blocks.1.proj")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(5, 5)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block.get_submodule("proj")(x.tanh())
        return x


@pytest.fixture(scope="module")
def network() -> Layers:
    torch.manual_seed(0)
    return Layers()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


def trained(network: nn.Module, folder: Path, **config: Any) -> Any:
    """A model of peft with a random adapter, after saving it."""
    peft: Any = pytest.importorskip("peft")
    own = peft.LoraConfig(**{"r": 2, "target_modules": [*LAYERS], **config})
    model = peft.get_peft_model(copy.deepcopy(network), own)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter + torch.randn(parameter.shape, generator=generator) / 2
    model.save_pretrained(folder)
    return model


def load(network: nn.Module, path: Path) -> Adapter:
    target = Target.of("small", {"unet": network})
    return AdapterFile.read(path.stem, path, target).load(CPU, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 3},
        {"lora_alpha": 3, "alpha_pattern": {"blocks.1.proj": 1, "proj": 8}},
        {"lora_alpha": 3, "alpha_pattern": {"^first": 7, "^proj": 8, "nowhere": 2}},
        {"lora_alpha": 3, "rank_pattern": {"first": 4}, "alpha_pattern": {"first": 5}},
        {"lora_alpha": 3, "use_rslora": True},
        {"lora_alpha": 3, "use_dora": True},
        {"lora_alpha": 3, "lora_bias": True},
    ],
    ids=lambda config: "-".join(config),
)
def test_a_folder_that_peft_saved_is_what_peft_makes_of_it(
    network: Layers, x: Tensor, tmp_path: Path, config: dict[str, Any]
) -> None:
    """At a weight of 1 and at another, beside a row without."""
    model = trained(network, tmp_path / "style", **config)
    adapter = load(network, tmp_path / "style")
    rows = RowAdapters(((Weighted(adapter, 1.0),), (), (Weighted(adapter, 0.6),)))
    with torch.no_grad(), AdaptedNetwork("unet", network, CPU).applied(rows):
        made = network(x)
    with torch.no_grad():
        assert torch.equal(made[1], network(x)[1])
        for row, weight in ((0, 1.0), (2, 0.6)):
            for layer in LAYERS:
                model.base_model.model.get_submodule(layer).set_scale("default", weight)
            expected = model(x)[row]
            assert float((made[row] - expected).norm() / expected.norm()) < 1e-5


FACTORS = {
    "base_model.model.first.lora_A.weight": torch.ones(2, 6),
    "base_model.model.first.lora_B.weight": torch.ones(5, 2),
}
CONFIG = {"peft_type": "LORA", "lora_alpha": 3, "r": 2}


def put(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(FACTORS, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def factor(adapter: Adapter) -> float:
    return float(adapter.parts["unet"]["first"].up[0, 0])


def test_a_config_without_alpha_has_that_of_peft_by_default(
    network: Layers, tmp_path: Path
) -> None:
    peft: Any = pytest.importorskip("peft")
    folder = put(tmp_path / "style")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    assert factor(load(network, folder)) == peft.LoraConfig().lora_alpha / 2


def test_a_config_beside_a_file_of_pefts_name_is_read_too(network: Layers, tmp_path: Path) -> None:
    folder = put(tmp_path / "style")
    assert factor(load(network, folder / "adapter_model.safetensors")) == 1.5
    (folder / "adapter_model.safetensors").rename(folder / "style.safetensors")
    assert factor(load(network, folder / "style.safetensors")) == 1


def test_a_pattern_is_matched_by_the_name_that_the_trainer_knew(tmp_path: Path) -> None:
    """For a U-Net with the names of its original code, which the pattern uses as well."""
    network: Any = nn.Module()
    network.conv_in = nn.Linear(6, 5)
    tensors = {name.replace("first", "input_blocks.0.0"): one for name, one in FACTORS.items()}
    folder = put(tmp_path / "style", alpha_pattern={"input_blocks.0.0": 8})
    save_file(tensors, folder / "adapter_model.safetensors")
    loaded = load(network, folder)
    assert float(loaded.parts["unet"]["conv_in"].up[0, 0]) == 4


def shelf(network: nn.Module, folder: Path) -> AdapterShelf:
    memory = WeightMemory[Adapter](10**6, "adapters")
    target = Target.of("small", {"unet": network})
    return AdapterShelf([folder], target, memory, CPU, torch.float32)


def test_folders_are_listed_beside_files(network: Layers, tmp_path: Path) -> None:
    put(tmp_path / "style")
    save_file(FACTORS, tmp_path / "ink.safetensors")
    (tmp_path / "notes").mkdir()
    (tmp_path / "ink").mkdir()
    found = shelf(network, tmp_path)
    assert [file.name for file in found.available()] == ["ink", "style"]
    assert factor(found.load("style")) == 1.5
    assert found.is_loaded("style")


def test_a_changed_config_is_read_again(network: Layers, tmp_path: Path) -> None:
    folder = put(tmp_path / "style")
    found = shelf(network, tmp_path)
    before = found.load("style")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 100}))
    after = found.load("style")
    assert (factor(before), factor(after)) == (1.5, 50)
    assert before.revision != after.revision


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "LOHA"}, "the peft_type 'LOHA' in adapter_config.json; allowed is 'LORA'"),
        ({"peft_type": None}, "the peft_type 'None' in adapter_config.json"),
        ({"init_lora_weights": "pissa_niter_4"}, "the init_lora_weights 'pissa_niter_4' in"),
        ({"layer_replication": [[0, 2]]}, "has 'layer_replication' in adapter_config.json, which"),
        ({"entry_of_a_later_version": 1}, "has 'entry_of_a_later_version' in adapter_config.json"),
        ({"alpha_pattern": {r"blocks\.\d+.proj": 1}}, "has the regular expression .* of adapter_c"),
        ({"lora_alpha": "much"}, "has the alpha 'much'"),
        ({"use_dora": True}, r"is a DoRA \(adapter_config.json says so\) without the"),
    ],
)
def test_what_a_config_asks_for_and_is_not_supported_is_refused(
    network: Layers, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(AdapterMismatch, match=f"^adapter 'style' .*{says}"):
        load(network, put(tmp_path / "style", **config))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000], ids=["list", "cut", "deep"])
def test_a_config_that_is_no_object_is_refused(network: Layers, tmp_path: Path, text: str) -> None:
    folder = put(tmp_path / "style")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(
        AdapterMismatch, match=r"has an adapter_config.json that is not a JSON object"
    ):
        load(network, folder)


def test_a_folder_without_a_config_is_refused(network: Layers, tmp_path: Path) -> None:
    folder = put(tmp_path / "style")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterMismatch, match=r"has no adapter_config.json next to its weights"):
        load(network, folder)


def test_entries_that_change_nothing_are_accepted(network: Layers, tmp_path: Path) -> None:
    """Everything that peft writes today by default, and what the tensors show anyway."""
    peft: Any = pytest.importorskip("peft")
    peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.1).save_pretrained(tmp_path / "config")
    config = json.loads((tmp_path / "config" / "adapter_config.json").read_text())
    assert factor(load(network, put(tmp_path / "style", **config))) == 1.5
