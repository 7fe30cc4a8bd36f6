"""Choice of the ordinary images of the next tick, by fair turns of their clients: pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from heapq import heapify, heappop, heapreplace
from itertools import chain
from typing import TYPE_CHECKING

from server.engine.mixed_tick import costs_of_tick, joining
from server.engine.scheduler import Load, fill, in_time, units_of, urgency

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from server.engine.client import Client
    from server.engine.fair_queue import Turns
    from server.engine.scheduler import Candidate, LaneCosts

__all__ = ["MAX_STRETCH", "fair_tick", "in_turn"]

MAX_STRETCH = 1.5
"""Maximum factor by which images of clients whose turn it is not may lengthen a tick."""


def fair_tick(
    candidates: Sequence[Candidate],
    turns: Turns,
    lanes: Mapping[int, LaneCosts],
    rows_of: Callable[[Load], int],
) -> list[int]:
    """Choose the next tick without live images: one lane, and lanes that can be mixed with it.

    The lane is that of the first image in turn: the most urgent one of the least served flow of the
    least served client. That image runs in any case. The number of rows is chosen for those images
    of the lane whose client is due, that is owed service or ahead of the first by no more than a
    tick. Due images of other sizes join if the model can evaluate them in the same forward pass and
    that takes less time (``mixed_tick.py``). Images of other clients, and batch images beside
    others, join if they do not lengthen the tick by more than :data:`MAX_STRETCH`. Interactive
    images of all clients go before batch ones.

    Args:
        candidates: every image under way, oldest first.
        turns: service that their clients have had.
        lanes: costs of the lanes of all candidates.
        rows_of: function that returns the best number of rows for a load.

    Returns:
        Indices into ``candidates``, in the order of their turns, with those of a group side by
        side.
    """
    units, members = units_of(candidates)
    if not units:
        return []
    ready = _ready(units, range(len(units)))
    first = next(_turn_by_turn(units, ready, turns, lanes))
    lane, costs = units[first].lane, lanes[units[first].lane]
    here = [i for i, unit in enumerate(units) if unit.lane == lane]
    mixable = [
        i
        for i, unit in enumerate(units)
        if unit.lane != lane and costs.mixes_with(lanes[unit.lane])
    ]
    clients = {units[i].flow.client for i in (*here, *mixable)}
    # Relative to clients that can run now: others may be ahead of all of them, and have to wait.
    latest = turns.virtual_times_of(units[first].flow)[0] + costs.max_tick_s
    owed = {client for client in clients if turns.due(client, latest)}
    due = [i for i in here if i in ready and units[i].flow.client in owed]
    wanted = [units[i].rows for i in due]
    rows = max(units[first].rows, rows_of(Load(lane, sum(wanted), max(wanted), live=False)))
    chosen = fill(units, _turn_by_turn(units, due, turns, lanes), rows)
    if len(chosen) == len(due):
        others = [i for i in mixable if i in ready and units[i].flow.client in owed]
        chosen += joining(units, chosen, _turn_by_turn(units, others, turns, lanes), lanes)
        costs = costs_of_tick(units, chosen, lanes)
        rows = _stretched(sum(units[i].rows for i in chosen), costs)
    room = rows - sum(units[i].rows for i in chosen)
    if room > 0:
        left = in_turn(units, sorted({*here} - {*due}), turns, lanes)
        chosen += fill(units, left, room)
        left = in_turn(units, sorted({*mixable} - {*chosen}), turns, lanes)
        chosen += joining(units, chosen, left, lanes, costs.seconds(rows))
    return [i for unit in chosen for i in members[unit]]


def in_turn(
    units: Sequence[Candidate],
    among: Iterable[int],
    turns: Turns,
    lanes: Mapping[int, LaneCosts],
) -> Iterator[int]:
    """The order in which images are served if each is served alone.

    Args:
        units: images and groups.
        among: indices of the units to order.
        turns: service that their clients have had.
        lanes: costs of the lanes of all of them.
    """
    indices = list(among)
    ready = _ready(units, indices)
    later = [i for i in indices if i not in ready]
    return chain(
        _turn_by_turn(units, ready, turns, lanes), _turn_by_turn(units, later, turns, lanes)
    )


def _ready(units: Sequence[Candidate], among: Sequence[int]) -> set[int]:
    """Indices of all but batch images, or of all if there are no others."""
    return {i for i in among if in_time(units[i].priority, units[i].age)} or set(among)


def _turn_by_turn(
    units: Sequence[Candidate],
    among: Iterable[int],
    turns: Turns,
    lanes: Mapping[int, LaneCosts],
) -> Iterator[int]:
    waiting: dict[Client, dict[Hashable, deque[int]]] = {}
    for i in sorted(among, key=lambda i: urgency(units[i])):
        client, kind = units[i].flow
        waiting.setdefault(client, {}).setdefault(kind, deque()).append(i)
    prices = {lane: costs.seconds_a_row for lane, costs in lanes.items()}
    clients = [
        (turns.virtual_times_of(units[i].flow)[0], number, client)
        for number, (client, i) in enumerate(_firsts(waiting))
    ]
    heapify(clients)
    own = {
        client: {
            kind: turns.virtual_times_of(units[queue[0]].flow)[1] for kind, queue in kinds.items()
        }
        for client, kinds in waiting.items()
    }
    while clients:
        had, number, client = clients[0]
        kinds = waiting[client]
        kind = min(kinds, key=own[client].__getitem__)
        i = kinds[kind].popleft()
        yield i
        seconds = units[i].rows * prices[units[i].lane]
        own[client][kind] += seconds
        if not kinds[kind]:
            del kinds[kind]
        if kinds:
            heapreplace(clients, (had + seconds / client.weight, number, client))
        else:
            heappop(clients)


def _firsts(
    waiting: Mapping[Client, Mapping[Hashable, deque[int]]],
) -> Iterator[tuple[Client, int]]:
    for client, kinds in waiting.items():
        yield client, next(iter(kinds.values()))[0]


def _stretched(rows: int, costs: LaneCosts) -> int:
    """Maximum number of rows of a tick that would otherwise have ``rows``."""
    alone = costs.seconds(rows)
    longest = max(alone, min(MAX_STRETCH * alone, costs.max_tick_s))
    return max(rows, bisect_right(range(1, costs.max_rows + 1), longest, key=costs.seconds))
