"""Rows with adapters equal the same row alone in a network with them merged into its weights."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from guidance.edits import (
    BlurredQueries,
    Edit,
    IdentityAttention,
    NormalizedAttention,
    SkippedBlocks,
    SkipScales,
)
from server.models.adapters.adapted_network import AdaptedNetwork
from server.models.adapters.adapter import Adapter, LowRank, RowAdapters, Weighted
from server.models.row_edits import RowEdits
from tests.server.models.adapters.low_rank import adapter, changes, merged

Row = tuple[Weighted, ...]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    network: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    return network.eval().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def adapters(unet: nn.Module) -> dict[str, Adapter]:
    """Adapters of different ranks: of all layers, of attention alone, of convolutions alone."""
    parts = {
        "all": changes(unet, 4, seed=1),
        "attention": changes(unet, 8, seed=2, within="attn"),
        "convolutions": changes(unet, 8, seed=3, within="conv"),
    }
    return {name: adapter(name, {"unet": own}) for name, own in parts.items()}


@pytest.fixture(scope="module")
def company(adapters: dict[str, Adapter]) -> list[Row]:
    whole, attention, convolutions = (Weighted(one, 1.0) for one in adapters.values())
    return [
        (),
        (whole,),
        (replace(attention, weight=0.6), replace(whole, weight=-0.3)),
        (),
        (convolutions,),
        (replace(whole, weight=0.5), convolutions, replace(attention, weight=2.0)),
        (attention,),
        (whole,),
    ]


def drawn(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    told = torch.randn(rows, 7, 32, generator=generator)
    return x, torch.linspace(900, 100, rows), told


@torch.no_grad()
def forward(network: Any, x: Tensor, t: Tensor, told: Tensor) -> Tensor:
    return network(x, t, told, return_dict=False)[0]


def adapted(
    network: nn.Module,
    rows: list[Row],
    *,
    fixed: bool = False,
    by: AdaptedNetwork | None = None,
) -> Tensor:
    by = by or AdaptedNetwork("unet", network, CPU)
    with by.applied(RowAdapters(tuple(rows), fixed)):
        return forward(network, *drawn(len(rows)))


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("fixed", [False, True])
def test_each_row_is_that_of_a_network_with_its_adapters_merged(
    unet: nn.Module, company: list[Row], fixed: bool
) -> None:
    ours = adapted(unet, company, fixed=fixed)
    x, t, told = drawn(len(company))
    for i, own in enumerate(company):
        row = slice(i, i + 1)
        assert_near(ours[row], forward(merged(unet, "unet", own), x[row], t[row], told[row]))


@pytest.mark.parametrize(
    "layout", ["-aa--", "aaaa", "aabb", "aaab", "-aabb-", "a-a-"], ids=lambda layout: layout
)
def test_rows_that_share_their_factors_are_adapted_too(
    unet: nn.Module, company: list[Row], layout: str
) -> None:
    """Adjacent rows, in part or all of the forward, or apart; one adapter, or several per row."""
    rows = [{"-": (), "a": company[2], "b": company[1]}[one] for one in layout]
    ours = adapted(unet, rows)
    x, t, told = drawn(len(rows))
    for i, own in enumerate(rows):
        row = slice(i, i + 1)
        assert_near(ours[row], forward(merged(unet, "unet", own), x[row], t[row], told[row]))


def test_convolutions_as_products_give_the_same_rows(unet: nn.Module, company: list[Row]) -> None:
    """With a stride as well as without."""
    by_products = AdaptedNetwork("unet", unet, CPU, by_products=True)
    assert_near(adapted(unet, company, by=by_products), adapted(unet, company))


def test_rows_without_adapters_are_not_touched_at_all(unet: nn.Module, company: list[Row]) -> None:
    ours, plain = adapted(unet, company), forward(unet, *drawn(len(company)))
    bare = [i for i, own in enumerate(company) if not own]
    assert torch.equal(ours[bare], plain[bare])
    moved = (ours - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert float(moved[[i for i, own in enumerate(company) if own]].min()) > 1e-3


def test_a_weight_of_zero_is_no_adapter(unet: nn.Module, adapters: dict[str, Adapter]) -> None:
    rows: list[Row] = [(Weighted(one, 0.0),) for one in adapters.values()]
    assert torch.equal(adapted(unet, rows), forward(unet, *drawn(len(rows))))


def test_a_network_is_as_it_was_once_the_forward_is_over(
    unet: nn.Module, company: list[Row]
) -> None:
    inputs = drawn(len(company))
    before = forward(unet, *inputs)
    adapted(unet, company)
    assert torch.equal(forward(unet, *inputs), before)
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_row_of_a_fixed_forward_is_the_same_whatever_its_neighbours_have(
    unet: nn.Module, company: list[Row]
) -> None:
    """Some of them have its adapters, and so share its pass; then none has, and then all have."""
    several = adapted(unet, company, fixed=True)
    for row in (1, 2, 5):
        alone: list[Row] = [()] * len(company)
        alone[row] = company[row]
        assert torch.equal(adapted(unet, alone, fixed=True)[row], several[row])
    everybody = adapted(unet, [company[1]] * len(company), fixed=True)
    assert torch.equal(everybody[1], several[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision_have_adapters_too(
    unet: nn.Module, company: list[Row], dtype: torch.dtype
) -> None:
    rows: list[Row] = [
        tuple(Weighted(_cast(one.adapter, dtype), one.weight) for one in own) for own in company
    ]
    x, t, told = (one.to(dtype) for one in drawn(len(rows)))
    network = copy.deepcopy(unet).to(dtype)
    with AdaptedNetwork("unet", network, CPU).applied(RowAdapters(tuple(rows))):
        ours = forward(network, x, t.float(), told).float()
    exact = adapted(unet, company)
    assert float((ours - exact).norm() / exact.norm()) < 0.05


def _cast(whole: Adapter, dtype: torch.dtype) -> Adapter:
    changed = {
        name: LowRank(one.down.to(dtype), one.up.to(dtype))
        for name, one in whole.parts["unet"].items()
    }
    return adapter(whole.name, {"unet": changed})


def test_broken_weights_stay_in_their_row(unet: nn.Module, company: list[Row]) -> None:
    one = changes(unet, 4)
    nowhere = {k: LowRank(c.down, torch.full_like(c.up, math.nan)) for k, c in one.items()}
    broken = [*company[:-1], (Weighted(adapter("broken", {"unet": nowhere}), 1.0),)]
    ours = adapted(unet, broken, fixed=True)
    assert ours[-1].isnan().all()
    assert torch.equal(ours[:-1], adapted(unet, company, fixed=True)[:-1])


EDITS: tuple[Edit, ...] = (
    IdentityAttention(("middle",)),
    BlurredQueries(("up_blocks.0",), 0.8),
    SkippedBlocks(("up_blocks.0.attentions.1",)),
    SkipScales((0.5, 1.0)),
    NormalizedAttention(3.0, 2.5, 0.5),
)


def test_an_edited_row_is_edited_as_adapted(unet: nn.Module, company: list[Row]) -> None:
    x, t, told = drawn(1 + len(EDITS))
    rows, edits, against = company[: len(x)], [(), *((edit,) for edit in EDITS)], told.flip(0)
    network = merged(unet, "unet", ())
    with (
        AdaptedNetwork("unet", network, CPU).applied(RowAdapters(tuple(rows))),
        RowEdits(network).applied(edits, x, against),
    ):
        ours = forward(network, x, t, told)
    for i, own in enumerate(rows):
        alone, row = merged(unet, "unet", own), slice(i, i + 1)
        with RowEdits(alone).applied(edits[row], x[row], against[row]):
            assert_near(ours[row], forward(alone, x[row], t[row], told[row]))


class Operations(TorchDispatchMode):
    """Counts the operations that a device would run; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_each_layer_of_the_next_forward_costs_two_operations(
    unet: nn.Module, adapters: dict[str, Adapter], company: list[Row]
) -> None:
    """Nothing is stacked or sent to the device again while rows have the same adapters."""
    rows: list[Row] = [(Weighted(adapters["attention"], 0.1 * i),) for i in range(1, 5)]
    network, plain, again = AdaptedNetwork("unet", unet, CPU), Operations(), Operations()
    adapted(unet, rows, by=network)
    with plain:
        forward(unet, *drawn(len(rows)))
    with again:
        adapted(unet, rows, by=network)
    layers = len(adapters["attention"].parts["unet"])
    assert again.counts - plain.counts == {"bmm": layers, "baddbmm_": layers}


def test_what_is_kept_is_not_given_to_other_rows_adapters_or_weights(
    unet: nn.Module, company: list[Row]
) -> None:
    network, moved = AdaptedNetwork("unet", unet, CPU), [*company[1:], company[0]]
    heavier: list[Row] = [
        tuple(Weighted(one.adapter, 2 * one.weight) for one in own) for own in company
    ]
    for rows in (company, moved, heavier, company):
        assert torch.equal(adapted(unet, rows, by=network), adapted(unet, rows))


def test_what_is_kept_goes_with_the_adapter(unet: nn.Module) -> None:
    network = AdaptedNetwork("unet", unet, CPU)
    passing, staying = (adapter(name, {"unet": changes(unet, 4)}) for name in "ps")
    adapted(unet, [(Weighted(staying, 1.0),), ()], by=network)
    alone = network.kept_bytes
    adapted(unet, [(Weighted(staying, 1.0),), (Weighted(passing, 1.0),)], by=network)
    assert network.kept_bytes == 3 * alone == 3 * staying.nbytes
    del passing
    with network.applied(None):
        assert network.kept_bytes == alone


def test_nothing_is_kept_beyond_the_bound(unet: nn.Module, company: list[Row]) -> None:
    network = AdaptedNetwork("unet", unet, CPU, max_bytes=1000)
    assert torch.equal(adapted(unet, company, by=network), adapted(unet, company))
    assert torch.equal(adapted(unet, company, by=network), adapted(unet, company))
    assert network.kept_bytes == 0


def test_a_forward_may_be_differentiated_that_reads_what_another_has_left(
    unet: nn.Module, company: list[Row]
) -> None:
    network = AdaptedNetwork("unet", unet, CPU)
    with torch.inference_mode():
        adapted(unet, company, by=network)
    x, t, told = drawn(len(company))
    x.requires_grad_()
    with network.applied(RowAdapters(tuple(company))):
        unet(x, t, told).sample.square().sum().backward()
    assert x.grad is not None
