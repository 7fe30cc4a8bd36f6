"""Eight-bit floats are multiplied by their scales, and other formats are refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from server.errors import ModelMismatch
from server.models.scaled_weights import unscaled


def format_of(kind: str) -> Tensor:
    """The format as ComfyUI writes it: JSON in bytes."""
    return torch.tensor([*json.dumps({"format": kind}).encode()], dtype=torch.uint8)


EIGHTHS = (torch.arange(6.0).view(2, 3) / 8).to(torch.float8_e4m3fn)
OTHER = {"bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("beside", "factors"),
    [
        ({"scaled_fp8": torch.zeros(2), "a.scale_weight": torch.tensor(4.0)}, [[4.0], [4.0]]),
        (
            {
                "a.weight_scale": torch.tensor([[2.0], [3.0]]),
                "a.input_scale": torch.ones(1),
                "a.comfy_quant": format_of("float8_e4m3fn"),
            },
            [[2.0], [3.0]],
        ),
        ({}, [[1.0], [1.0]]),
    ],
)
def test_a_weight_is_multiplied_by_its_scale(
    beside: dict[str, Tensor], factors: list[list[float]]
) -> None:
    made = unscaled({"a.weight": EIGHTHS, **beside, **OTHER}, "it", torch.float32)
    assert made.keys() == {"a.weight", "bias"}
    assert torch.equal(made["a.weight"].float(), EIGHTHS.float() * torch.tensor(factors))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a.comfy_quant": format_of("nvfp4")}, "it has weights in the format 'nvfp4'"),
        (
            {"a.weight.quant_state.bitsandbytes__nf4": torch.ones(1)},
            "in the format 'nf4' .a.weight",
        ),
        ({"a.comfy_quant": torch.zeros(3)}, "in the format 'None'"),
        ({"a.weight_scale": torch.ones(2, 5)}, r"scale of shape \[2, 5\] for a.weight"),
        ({"b.weight_scale": torch.ones(1)}, "for b.weight, which is missing"),
        ({"a.weight": torch.ones(2, 3), "a.scale_weight": torch.ones(1)}, "which is float32"),
    ],
)
def test_another_format_is_refused(tensors: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ModelMismatch, match=says):
        unscaled({"a.weight": EIGHTHS} | tensors, "it")
