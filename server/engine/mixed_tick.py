"""Choice of images of several sizes for one forward pass, where that saves time: pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from server.engine.scheduler import Candidate, LaneCosts

__all__ = ["costs_of_tick", "joining"]


def costs_of_tick(
    units: Sequence[Candidate], chosen: Iterable[int], lanes: Mapping[int, LaneCosts]
) -> LaneCosts:
    """The costs of a tick, whose rows each cost as much as one of its largest size.

    If there are several sizes, all rows take longer by the cost of mixing.

    Args:
        units: images and groups.
        chosen: indices of the units in the tick, at least one.
        lanes: costs of the lanes of all units.
    """
    sizes = {units[i].lane for i in chosen}
    costs = max((lanes[lane] for lane in sizes), key=lambda costs: costs.area)
    if len(sizes) == 1:
        return costs
    return replace(costs, seconds=lambda rows: costs.mixing * costs.seconds(rows))


def joining(
    units: Sequence[Candidate],
    chosen: Sequence[int],
    order: Iterable[int],
    lanes: Mapping[int, LaneCosts],
    max_tick_s: float | None = None,
) -> list[int]:
    """Choose images of other sizes that join a tick.

    A size joins with the number of images that saves most time. The saving is the cost that their
    rows would have in a tick with all that waits in their own lane, less the time by which they
    lengthen this one.

    Args:
        units: images and groups.
        chosen: indices of the units in the tick so far, at least one.
        order: indices of those that may join, in the order of their turns; their lanes can share a
            forward pass with those chosen.
        lanes: costs of the lanes of all units.
        max_tick_s: maximum seconds of the tick; by default what its largest lane allows.

    Returns:
        Indices of the units that join.
    """
    waiting: dict[int, list[int]] = {}
    for i in order:
        waiting.setdefault(units[i].lane, []).append(i)
    joined: list[int] = []
    for lane, own in waiting.items():
        tick = [*chosen, *joined]
        before = costs_of_tick(units, tick, lanes)
        after = costs_of_tick(units, [*tick, own[0]], lanes)
        rows = sum(units[i].rows for i in tick)
        in_all = min(sum(units[i].rows for i in own), lanes[lane].max_rows)
        price = lanes[lane].seconds(in_all) / in_all
        max_rows = min(before.max_rows, lanes[lane].max_rows)
        until_s = after.max_tick_s if max_tick_s is None else max_tick_s
        count, saved_s = 0, 0.0
        for number, more in enumerate(accumulate(units[i].rows for i in own), 1):
            seconds = after.seconds(rows + more)
            if rows + more > max_rows or seconds > until_s:
                break
            saving_s = more * price - (seconds - before.seconds(rows))
            if saving_s > saved_s:
                count, saved_s = number, saving_s
        joined += own[:count]
    return joined
