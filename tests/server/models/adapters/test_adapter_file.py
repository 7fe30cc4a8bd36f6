"""What a LoRA file must hold to be used with a model, and how its weights are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from server.errors import AdapterMismatch
from server.models.adapters.adapter import LowRank
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.adapters.stated import ALLOWED

CPU = torch.device("cpu")
LINEAR, CONV = "mid.proj", "mid.conv"


class Small(nn.Module):
    """A linear layer and a convolution, within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.ModuleDict({"proj": nn.Linear(6, 5), "conv": nn.Conv2d(4, 3, 3)})


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.of("small", {"unet": Small()})


def factors(rank: int = 2) -> dict[str, Tensor]:
    return {
        f"unet.{LINEAR}.lora_A.weight": torch.ones(rank, 6),
        f"unet.{LINEAR}.lora_B.weight": torch.ones(5, rank),
        f"unet.{CONV}.lora_A.weight": torch.ones(rank, 4, 3, 3),
        f"unet.{CONV}.lora_B.weight": torch.ones(3, rank, 1, 1),
    }


def read(path: Path, target: Target, tensors: dict[str, Tensor], **metadata: str) -> AdapterFile:
    file = path / "style.safetensors"
    save_file(tensors, file, metadata)
    return AdapterFile.read("style", file, target)


def change(file: AdapterFile, layer: str = LINEAR) -> LowRank:
    return file.load(CPU, torch.float32).parts["unet"][layer]


def product(change: LowRank) -> Tensor:
    return torch.einsum("or,r...->o...", change.up, change.down)


def test_a_file_in_half_precision_is_loaded_in_that_of_the_model(
    target: Target, tmp_path: Path
) -> None:
    halves = {name: tensor.half() / 3 for name, tensor in factors().items()}
    file = read(tmp_path, target, halves)
    adapter = file.load(CPU, torch.float32)
    assert adapter.parts["unet"][LINEAR].down.dtype == torch.float32
    third = torch.tensor(1 / 3).half().float()
    torch.testing.assert_close(product(change(file)), torch.full((5, 6), float(2 * third**2)))
    assert file.load(CPU, torch.bfloat16).parts["unet"][CONV].up.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["diff", "lokr", "loha"])
def test_changes_that_are_no_narrower_than_their_layers_are_read(
    target: Target, tmp_path: Path, kind: str
) -> None:
    """A whole matrix, a product of whole ones, and factors of as many ranks."""
    drawn = torch.randn(100, generator=torch.Generator().manual_seed(0))
    first, second = drawn[:30].view(5, 6), drawn[30:60].view(5, 6)
    operands = {
        "diff": {"diff": first},
        "lokr": {"lokr_w1": drawn[:3].view(1, 3), "lokr_w2": drawn[3:13].view(5, 2)},
        "loha": {
            "hada_w1_a": torch.eye(5),
            "hada_w1_b": first,
            "hada_w2_a": torch.eye(5),
            "hada_w2_b": second,
        },
    }
    wanted = {
        "diff": first,
        "lokr": torch.kron(drawn[:3].view(1, 3), drawn[3:13].view(5, 2)),
        "loha": 2 / 5 * first * second,
    }
    tensors = {f"lora_unet_mid_proj.{name}": one for name, one in operands[kind].items()}
    tensors["lora_unet_mid_proj.alpha"] = torch.tensor(2.0)
    file = read(tmp_path, target, tensors)
    assert file.rank <= 5
    torch.testing.assert_close(product(change(file)), wanted[kind])


def test_ranks_are_padded_to_few_and_change_nothing(target: Target, tmp_path: Path) -> None:
    file = read(tmp_path, target, factors(rank=5))
    assert file.rank == 5
    adapter = file.load(CPU, torch.float32)
    assert {one.rank for one in adapter.parts["unet"].values()} == {8}
    assert adapter.nbytes == file.nbytes(torch.float32)
    assert torch.equal(product(adapter.parts["unet"][LINEAR]), torch.full((5, 6), 5.0))
    assert torch.equal(product(adapter.parts["unet"][CONV]), torch.full((3, 4, 3, 3), 5.0))


def test_each_layer_of_a_kohya_file_has_its_own_alpha(target: Target, tmp_path: Path) -> None:
    names = {"lora_A": "lora_down", "lora_B": "lora_up"}
    flat = {f"unet.{LINEAR}": "lora_unet_mid_proj", f"unet.{CONV}": "lora_unet_mid_conv"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in factors().items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        tensors[f"{flat[layer]}.{names[factor]}.weight"] = tensor
    tensors["lora_unet_mid_proj.alpha"] = torch.tensor(1.0)
    tensors["lora_unet_mid_conv.alpha"] = torch.tensor(6.0)
    file = read(tmp_path, target, tensors)
    assert product(change(file)).unique().tolist() == [1.0]
    assert product(change(file, CONV)).unique().tolist() == [6.0]


def test_a_loha_of_a_convolution_is_placed_and_loaded(target: Target, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"w1_a": (3, 2), "w1_b": (2, 36), "w2_a": (3, 2), "w2_b": (2, 36)}
    own = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors = {f"lora_unet_mid_conv.hada_{name}": tensor for name, tensor in own.items()}
    file = read(tmp_path, target, tensors | {"lora_unet_mid_conv.alpha": torch.tensor(1.0)})
    whole = (own["w1_a"] @ own["w1_b"]) * (own["w2_a"] @ own["w2_b"]) / 2
    torch.testing.assert_close(product(change(file, CONV)), whole.view(3, 4, 3, 3))


def test_whole_differences_are_placed_and_loaded(target: Target, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    own = {LINEAR: torch.randn(5, 6, generator=generator), CONV: torch.randn(3, 4, 3, 3)}
    tensors = {f"lora_unet_{name.replace('.', '_')}.diff": one for name, one in own.items()}
    file = read(tmp_path, target, tensors)
    for layer, whole in own.items():
        torch.testing.assert_close(product(change(file, layer)), whole)


class MostHeld(TorchDispatchMode):
    """Finds the peak memory of all tensors that operations have made."""

    def __init__(self) -> None:
        super().__init__()
        self.max_bytes = 0
        self._alive: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self._alive.update((id(one), one) for one in tree_leaves(made) if isinstance(one, Tensor))
        storages = {one.data_ptr(): one.untyped_storage().nbytes() for one in self._alive.values()}
        self.max_bytes = max(self.max_bytes, sum(storages.values()))
        return made


def test_loading_a_lycoris_file_takes_little_more_memory_than_it_has_afterwards(
    tmp_path: Path,
) -> None:
    blocks = nn.Module()
    blocks.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(16))
    tensors = {
        f"lora_unet_layers_{i}.{name}": torch.ones(size, size)
        for i in range(16)
        for name, size in {"lokr_w1": 4, "lokr_w2": 16}.items()
    }
    file = read(tmp_path, Target.of("m", {"unet": blocks}), tensors)
    with MostHeld() as memory:
        adapter = file.load(CPU, torch.bfloat16)
    assert adapter.nbytes == 16 * 2 * 64 * 64 * 2
    assert memory.max_bytes < 1.5 * adapter.nbytes


def test_the_alpha_of_a_lokr_of_whole_operands_may_be_any(target: Target, tmp_path: Path) -> None:
    """ai-toolkit writes it for full ranks, in a type that cannot hold the number."""
    first, second = torch.randn(5, 2), torch.randn(1, 3)
    tensors = {
        "diffusion_model.mid.proj.lokr_w1": first,
        "diffusion_model.mid.proj.lokr_w2": second,
        "diffusion_model.mid.proj.alpha": torch.tensor(9999999999).half(),
    }
    file = read(tmp_path, target, tensors)
    torch.testing.assert_close(product(change(file)), torch.kron(first, second))


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 1),
        ({"lora_alpha": 8}, 2),
        ({"lora_alpha": 8, "alpha_pattern": {"proj": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^mid.proj": 4, "^proj": 2}}, 1),
        ({"lora_alpha": 8, "use_rslora": True}, 4),
    ],
)
def test_peft_configs_say_the_alpha(
    target: Target, tmp_path: Path, config: dict[str, Any], factor: float
) -> None:
    entries = {f"unet.{name}": value for name, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(entries)}
    file = read(tmp_path, target, factors(rank=4), **metadata)
    assert product(change(file)).unique().tolist() == [4 * factor]


def test_a_file_may_say_how_a_model_with_it_is_sampled(target: Target, tmp_path: Path) -> None:
    assert read(tmp_path, target, factors()).defaults is None
    stated = {"weft.convention": "dmd2", "weft.steps": "4"}
    defaults = read(tmp_path, target, factors(), **stated).defaults
    assert defaults is not None
    assert (defaults.convention, defaults.counts) == ("dmd2", (4,))


def test_the_documentation_lists_the_conventions() -> None:
    page = (Path(__file__).parents[4] / "docs" / "adapters.md").read_text("utf-8")
    [row] = [line for line in page.splitlines() if line.startswith("| `weft.convention`")]
    assert re.findall(r"`(\w+)`", row) == list(ALLOWED)


def without(name: str) -> dict[str, Tensor]:
    return {known: tensor for known, tensor in factors().items() if not known.startswith(name)}


A, B = f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "a bias of another size": (
        {**factors(), f"unet.{LINEAR}.diff_b": torch.ones(4)},
        {},
        rf"a bias of the shape \[4\] \(unet.{LINEAR}.diff_b\) .* has 5 outputs in model",
    ),
    # As LyCORIS 4.1.3 writes them.
    "t-lora": (
        {
            "lora_unet_mid_proj.q_layer.weight": torch.ones(2, 6),
            "lora_unet_mid_proj.p_layer.weight": torch.ones(5, 2),
            "lora_unet_mid_proj.lambda_layer": torch.ones(1, 2),
        },
        {},
        r"is a T-LoRA \(lora_unet_mid_proj.lambda_layer\), which is not supported",
    ),
    "embeddings": (
        {**factors(), "bundle_emb.cat.clip_l": torch.ones(1, 4)},
        {},
        r"brings embeddings \(bundle_emb.cat.clip_l\), which is not supported",
    ),
    "dora by its config": (
        factors(),
        {"lora_adapter_metadata": '{"unet.use_dora": true}'},
        r"is a DoRA \(lora_adapter_metadata says so\) without the lora_magnitude_vector of mid",
    ),
    "loha of unlike ranks": (
        {
            f"lora_unet_mid_proj.hada_{name}": torch.ones(size)
            for name, size in {
                "w1_a": (5, 2),
                "w1_b": (3, 6),
                "w2_a": (5, 3),
                "w2_b": (2, 6),
            }.items()
        },
        {},
        r"has factors of the shapes \[5, 2\] and \[3, 6\] in the layer lora_unet_mid_proj",
    ),
    "left over": (
        {**factors(), "unet.mid.norm.weight": torch.ones(5), "pooled": torch.ones(1, 2)},
        {},
        "has tensors that are not understood: pooled, unet.mid.norm.weight",
    ),
    "a bias alone": (
        {**factors(), "unet.mid.other.diff_b": torch.ones(5)},
        {},
        "not understood: unet.mid.other.diff_b",
    ),
    "lokr": (
        {"lora_unet_mid_proj.lokr_w1": torch.ones(2, 2)},
        {},
        "lacks the tensor lora_unet_mid_proj.lokr_w2_b",
    ),
    "no network": ({"attic.lora_A.weight": torch.ones(2, 6)}, {}, "not understood: attic.lora_A"),
    "one layer twice": (
        {**factors(), f"lora_unet_{LINEAR.replace('.', '_')}.lora_down.weight": torch.ones(2, 6)},
        {},
        "changes the layer mid.proj of unet twice",
    ),
    "another layer": (
        {A.replace("proj", "attic"): factors()[A], B.replace("proj", "attic"): factors()[B]},
        {},
        "changes the layer mid.attic of unet, which model 'small' does not have",
    ),
    "another network": (
        {
            A.replace("unet", "text_encoder"): factors()[A],
            B.replace("unet", "text_encoder"): factors()[B],
        },
        {},
        "changes text_encoder; of model 'small' adapters can change unet",
    ),
    "another width": (
        {**factors(), A: torch.ones(2, 7)},
        {},
        r"has factors of the shapes \[2, 7\] and \[5, 2\] .* weight has the shape \[5, 6\]",
    ),
    "two ranks": ({**factors(), A: torch.ones(3, 6)}, {}, r"shapes \[3, 6\] and \[5, 2\]"),
    "another kernel": (
        {**factors(), f"unet.{CONV}.lora_A.weight": torch.ones(2, 4, 1, 1)},
        {},
        r"shapes \[2, 4, 1, 1\] and \[3, 2, 1, 1\] for the layer mid.conv",
    ),
    "one factor": (without(B), {}, f"has {A} without its other factor"),
    "whole numbers": ({**factors(), A: torch.ones(2, 6).int()}, {}, "of type I32; allowed are F16"),
    "no json": (factors(), {"lora_adapter_metadata": "["}, "is not a JSON object"),
    "no alpha": (
        factors(),
        {"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'},
        "has the alpha 'much'; a number of at most 1e\\+06 is needed",
    ),
    "an alpha that no float holds": (
        factors(),
        {"lora_adapter_metadata": f'{{"unet.lora_alpha": 1{"0" * 400}}}'},
        "has the alpha '1000",
    ),
    "alphas in a list": (
        factors(),
        {"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'},
        "has an alpha_pattern in lora_adapter_metadata that is not a JSON object",
    ),
    "convention": (factors(), {"weft.convention": "magic"}, "'magic'; allowed are lcm_lora, tcd"),
    "convention of another kind": (factors(), {"weft.convention": "lcm"}, "'lcm'; allowed are"),
    "convention without its steps": (
        factors(),
        {"weft.convention": "dmd2"},
        "weights are for one number of steps each; add weft.steps, which is 1 or 4",
    ),
    "steps": (
        factors(),
        {"weft.convention": "lcm_lora", "weft.steps": "9"},
        "has the weft.steps '9'; with the weft.convention 'lcm_lora' it is 1 to 8",
    ),
}


@pytest.mark.parametrize(("tensors", "metadata", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_placed_is_refused_by_name(
    target: Target,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    says: str,
) -> None:
    with pytest.raises(AdapterMismatch, match=f"^adapter 'style' .*{says}"):
        read(tmp_path, target, tensors, **metadata)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a pickle", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(
    target: Target, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "style.safetensors").write_bytes(data)
    with pytest.raises(AdapterMismatch, match="is not a readable safetensors file"):
        AdapterFile.read("style", tmp_path / "style.safetensors", target)


def test_a_file_without_tensors_is_refused(target: Target, tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterMismatch, match="adapter 'style' has no tensors"):
        AdapterFile.read("style", tmp_path / "style.safetensors", target)


def test_a_header_with_a_size_that_no_machine_has_is_refused(
    target: Target, tmp_path: Path
) -> None:
    name, shape = f"unet.{LINEAR}.lora_A.weight", [0, 2**64 - 1]
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    data = len(header).to_bytes(8, "little") + header.encode()
    (tmp_path / "style.safetensors").write_bytes(data)
    with pytest.raises(AdapterMismatch, match="adapter 'style' is not understood"):
        AdapterFile.read("style", tmp_path / "style.safetensors", target)


def test_a_file_that_changed_since_it_was_checked_is_not_loaded(
    target: Target, tmp_path: Path
) -> None:
    file = read(tmp_path, target, factors())
    read(tmp_path, target, factors(rank=3))
    with pytest.raises(AdapterMismatch, match="changed while it was read"):
        file.load(CPU, torch.float32)
    file.path.unlink()
    with pytest.raises(AdapterMismatch, match="could not be read") as refused:
        file.load(CPU, torch.float32)
    assert str(tmp_path) not in refused.value.message
