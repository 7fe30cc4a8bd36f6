"""LyCORIS' kinds of changes, read as two factors, equal what peft makes of the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.models.adapters.lycoris import as_low_rank

peft: Any = pytest.importorskip("peft")

RANK, ALPHA = 2, 3.0


class Layers(nn.Module):
    """A linear layer and a convolution, with widths that LoKr can factor."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 20)
        self.conv = nn.Conv2d(16, 24, 3)


def product(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """The change of a layer's weight, flattened after its first dimension, the outputs."""
    made = as_low_rank(tensors)
    down, up = (made[f"lora_unet_{layer}.lora_{end}.weight"] for end in ("down", "up"))
    scale = float(made.get(f"lora_unet_{layer}.alpha", torch.tensor(len(down)))) / len(down)
    return scale * up.flatten(1) @ down.flatten(1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoHaConfig", {}),
        ("LoHaConfig", {"use_effective_conv2d": True}),
        ("LoKrConfig", {"decompose_factor": 4}),
        ("LoKrConfig", {"decompose_factor": 2, "decompose_both": True, "r": 1}),
        ("LoKrConfig", {"decompose_factor": 2, "use_effective_conv2d": True}),
    ],
)
def test_the_product_is_the_change_that_peft_makes(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = {"r": RANK, "alpha": ALPHA, "target_modules": ["proj", "conv"], "init_weights": False}
    model = peft.get_peft_model(Layers(), getattr(peft, kind)(**given | options))
    tensors = {
        f"lora_unet_{name.removeprefix('base_model.model.')}": tensor
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    for layer in ("proj", "conv"):
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(ALPHA)
        theirs = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
        ours = product(tensors, layer)
        torch.testing.assert_close(ours, theirs.flatten(1), atol=1e-6, rtol=1e-5)


def test_a_kronecker_product_of_whole_operands_has_no_alpha() -> None:
    """As in LyCORIS, where alpha is divided by the rank of a factor; whole operands have none."""
    first, second = torch.randn(4, 3), torch.randn(5, 8)
    own = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(ALPHA)}
    ours = product({f"lora_unet_x.{name}": tensor for name, tensor in own.items()}, "x")
    torch.testing.assert_close(ours, torch.kron(first, second))


def test_a_hadamard_product_of_convolutions_is_that_of_matrices() -> None:
    """OneTrainer writes LoHa of convolutions so: LyCORIS' factors, with their kernels."""
    generator = torch.Generator().manual_seed(0)
    # The ranks are so many that the matrix itself is smaller.
    sizes = {"a": (12, 4, 1, 1), "b": (4, 8, 3, 3)}
    own = {
        f"hada_w{number}_{end}": torch.randn(size, generator=generator)
        for number in (1, 2)
        for end, size in sizes.items()
    }
    first, second = (
        own[f"hada_w{number}_a"].flatten(1) @ own[f"hada_w{number}_b"].flatten(1)
        for number in (1, 2)
    )
    ours = product({f"lora_unet_x.{name}": one for name, one in own.items()}, "x")
    torch.testing.assert_close(ours, first * second)


@torch.no_grad()
def test_a_convolution_in_three_factors_is_their_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"down": (2, 8, 1, 1), "mid": (2, 2, 3, 3), "up": (12, 2, 1, 1)}
    own = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    x = torch.randn(1, 8, 5, 5, generator=generator)
    theirs: Any = x
    for name, tensor in own.items():
        theirs = nn.functional.conv2d(theirs, tensor, padding=1 if name == "mid" else 0)
    file = {f"lora_unet_conv.lora_{name}.weight": tensor for name, tensor in own.items()}
    file["lora_unet_conv.alpha"] = torch.tensor(ALPHA)
    weight = product(file, "conv").view(12, 8, 3, 3)
    ours = nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(ours, ALPHA / 2 * theirs, atol=1e-4, rtol=1e-4)


def test_a_whole_difference_is_kept_and_one_of_a_norm_is_left_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 24), (24, 20), (12, 8, 3, 3)):
        whole = torch.randn(shape, generator=generator)
        torch.testing.assert_close(product({"lora_unet_x.diff": whole}, "x"), whole.flatten(1))
    norm = {"lora_unet_norm.diff": torch.ones(4)}
    assert as_low_rank(norm).keys() == norm.keys()
