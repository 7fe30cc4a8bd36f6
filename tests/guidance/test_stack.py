"""Parameters of many rows as tensors."""

import torch
from pydantic import BaseModel

from guidance import stack
from guidance.apg import APG
from guidance.unguided import Unguided


class Mixed(BaseModel):
    name: str = "mixed"
    scale: float = 2.0
    layers: int = 3
    strict: bool = True


def test_each_numeric_field_is_one_value_a_row() -> None:
    stacked = stack([Mixed(), Mixed(scale=5.0, layers=7)], torch.zeros(2, 4, 8, 8))
    assert set(stacked) == {"scale", "layers"}
    assert stacked["scale"].shape == (2, 1, 1, 1)
    assert stacked["scale"].flatten().tolist() == [2, 5]
    assert stacked["layers"].flatten().tolist() == [3, 7]


def test_type_and_axes_are_those_of_the_latents() -> None:
    stacked = stack([APG()], torch.zeros(1, 16, dtype=torch.float64))
    assert stacked["scale"].shape == (1, 1)
    assert stacked["scale"].dtype == torch.float64


def test_a_rule_without_numbers_stacks_to_nothing() -> None:
    assert stack([Unguided(), Unguided()], torch.zeros(2, 4, 8, 8)) == {}


class Spread(BaseModel):
    name: str = "spread"
    scales: tuple[float, ...] = (1.0, 2.0)
    layers: tuple[str, ...] = ("middle",)
    steps: int = 3


def test_a_tuple_of_numbers_is_as_many_values_a_row() -> None:
    stacked = stack([Spread(), Spread(scales=(5.0, 7.0))], torch.zeros(2, 4, 8, 8))
    assert set(stacked) == {"scales", "steps"}
    assert stacked["scales"].shape == (2, 2, 1, 1, 1)
    assert stacked["scales"].flatten(1).tolist() == [[1, 2], [5, 7]]
    assert stacked["steps"].shape == (2, 1, 1, 1)
