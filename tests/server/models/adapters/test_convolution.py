"""Rows with their own kernels equal torch's convolution of each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from server.models.adapters.convolution import convolve_by_products, multiplies, turned

LAYERS = {
    "3 x 3": nn.Conv2d(5, 7, 3, padding=1),
    "no padding": nn.Conv2d(5, 7, 3),
    "oblong": nn.Conv2d(5, 7, (1, 5), padding=(0, 2)),
    "much padding": nn.Conv2d(5, 7, 3, padding=2),
    "steps of two": nn.Conv2d(5, 7, 3, stride=(2, 1), padding=1),
}


def of_each(layer: nn.Conv2d, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    reach = layer.stride, layer.padding, layer.dilation
    rows = zip(x.split(1), kernels, strict=True)
    conv: Any = torch.conv2d
    return torch.cat([conv(row, kernel, None, *reach) for row, kernel in rows])


@pytest.mark.parametrize("name", LAYERS)
def test_products_make_what_the_convolution_of_each_row_makes(name: str) -> None:
    layer = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6, 9, dtype=torch.float64)
    kernels = torch.randn(3, 4, 5, *layer.kernel_size, dtype=torch.float64)

    made = convolve_by_products(layer, x, turned(kernels))

    assert multiplies(layer)
    torch.testing.assert_close(made, of_each(layer, x, kernels), rtol=1e-12, atol=1e-12)


def test_holes_and_more_padding_than_kernel_need_the_convolution() -> None:
    assert not multiplies(nn.Conv2d(5, 7, 3, padding=1, dilation=2))
    assert not multiplies(nn.Conv2d(5, 7, 3, padding=3))
