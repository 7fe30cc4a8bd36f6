"""Blends of prompts: weighted means, arcs, and prompts that cannot be mixed."""

from __future__ import annotations

import math

import pytest
import torch

from server.errors import InvalidRequest
from server.models.blend import Blend, BlendKind, conditioning_of, texts_of
from server.models.conditioning import Conditioning


def encoded(*vectors: list[list[float]], length: int = 2) -> dict[str | None, Conditioning]:
    names = "abcdefgh"
    return {
        names[i]: Conditioning({"states": torch.tensor(one)}, length + i)
        for i, one in enumerate(vectors)
    }


def states(blend: Blend, known: dict[str | None, Conditioning]) -> torch.Tensor:
    return conditioning_of(blend, known).tensors["states"]


def test_a_linear_blend_is_the_mean_by_weights_whatever_their_sum() -> None:
    known = encoded([[1.0, 0.0]], [[0.0, 4.0]])
    mixed = states(Blend((("a", 3.0), ("b", 1.0))), known)
    torch.testing.assert_close(mixed, torch.tensor([[0.75, 1.0]]))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_spherical_blend_of_two_unit_vectors_turns_by_its_share_of_the_angle(
    share: float,
) -> None:
    angle = 1.2
    known = encoded([[1.0, 0.0], [0.0, 1.0]], [[math.cos(angle), math.sin(angle)], [0.0, 1.0]])
    mixed = states(Blend((("a", 1 - share), ("b", share)), "spherical"), known)
    turned = [math.cos(share * angle), math.sin(share * angle)]
    torch.testing.assert_close(mixed, torch.tensor([turned, [0.0, 1.0]]))


def test_three_equal_weights_on_one_arc_meet_at_its_middle() -> None:
    known = encoded(*([[math.cos(a), math.sin(a)]] for a in (0.0, 0.6, 1.2)))
    parts = tuple((name, 1.0) for name in "abc")
    mixed = states(Blend(parts, "spherical"), known)
    torch.testing.assert_close(mixed, torch.tensor([[math.cos(0.6), math.sin(0.6)]]))


@pytest.mark.parametrize("kind", ["linear", "spherical"])
def test_opposite_vectors_and_zeros_blend_to_finite_ones(kind: BlendKind) -> None:
    known = encoded([[1.0, 0.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 1.0]])
    assert states(Blend((("a", 1.0), ("b", 1.0)), kind), known).isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "spherical"])
def test_a_part_without_weight_leaves_no_trace(kind: BlendKind) -> None:
    known = encoded([[1.0, 2.0]], [[float("nan"), 0.0]])
    blend = Blend((("a", 2.0), ("b", 0.0)), kind)
    assert torch.equal(states(blend, known), known["a"].tensors["states"])


def test_a_blend_of_blends_is_the_mixture_of_their_mixtures_and_as_long_as_the_longest() -> None:
    known = encoded([[4.0]], [[0.0]], [[1.0]])
    inner = Blend((("a", 1.0), ("b", 1.0)))
    outer = Blend(((inner, 1.0), ("c", 3.0)))
    assert texts_of(outer) == ("a", "b", "c")
    mixed = conditioning_of(outer, known)
    torch.testing.assert_close(mixed.tensors["states"], torch.tensor([[1.25]]))
    assert mixed.length == 4


def test_equal_tensors_of_any_type_stay_as_they_are_and_other_whole_numbers_are_refused() -> None:
    sizes = torch.tensor([128, 128])
    known: dict[str | None, Conditioning] = {
        name: Conditioning({"sizes": one}, 1)
        for name, one in {"a": sizes, "b": sizes.clone(), "c": sizes + 1}.items()
    }
    same = conditioning_of(Blend((("a", 1.0), ("b", 1.0))), known)
    assert torch.equal(same.tensors["sizes"], sizes)
    with pytest.raises(InvalidRequest, match="prompt is a blend"):
        conditioning_of(Blend((("a", 1.0), ("c", 1.0))), known)


def test_texts_of_different_lengths_are_refused() -> None:
    known = encoded([[1.0]], [[1.0], [2.0]])
    with pytest.raises(InvalidRequest, match="different lengths"):
        conditioning_of(Blend((("a", 1.0), ("b", 1.0))), known)
