"""Fair queueing by seconds of the device, not by number of images.

This is start-time fair queueing (Goyal, Vin and Cheng, 1996). Clients with work are served in the
order of a virtual time, which is the service that each has had from the device divided by its
weight. The cost of a request need not be known before it is served, which suits work that is served
in ticks: each tick is charged after it has run, by the seconds that it took. Deficit round robin
would serve each client for a quantum in turn; here a tick serves many clients at once, and there is
no turn to end.

There is one departure. A client that returns from a pause begins a little before the clock
(:data:`BURST_S`), where start-time fair queueing would have it begin at the clock. So a client that
leaves most of its share unused is served at once, as long as it does, and can never be owed more
than that.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Generic, TypeVar

from server.engine.client import Client, Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Mapping

__all__ = ["BURST_S", "FLOW_EXPIRY_S", "MAX_LEAD_S", "FairQueue", "Turns"]

BURST_S = 2.0
"""Seconds of the device that whoever returns from a pause may have before the others have any;
proportionally less for a weight below 1."""

MAX_LEAD_S = 0.1
"""Seconds by which others may go ahead of whoever is next: turns cannot be finer than ticks."""

FLOW_EXPIRY_S = 10.0
"""Seconds without work after which a flow is not expected back."""

Key = TypeVar("Key", bound="Hashable")


class FairQueue(Generic[Key]):
    """Service that each key has had from the device, in seconds divided by weight.

    Args:
        weight_of: share of each key relative to the others; equal shares by default.
        endless: whether ever new keys may come. So that not all of these go before whoever stays,
            the clock also advances by an equal part of all service.

    Attributes:
        clock: virtual time of the least served key with work; it never goes back.
    """

    def __init__(
        self, weight_of: Callable[[Key], float] = lambda _: 1.0, *, endless: bool = False
    ) -> None:
        self.clock = 0.0
        self._weight_of = weight_of
        self._endless = endless
        self._served = 0.0
        self._virtual_times: dict[Key, float] = {}
        self._waiting: set[Key] = set()

    def wait(self, waiting: Collection[Key]) -> None:
        """Set which keys have work now.

        Newcomers begin before the clock if others had work already, otherwise at it. A key without
        work is forgotten once it would begin there as a newcomer.
        """
        known = [self._virtual_times[one] for one in waiting if one in self._waiting]
        if known:
            equal = self._served / len(self._waiting) if self._endless else 0.0
            self.clock = max(self.clock + equal, min(known))
        self._served = 0.0
        start = self._start if known else lambda _: self.clock
        virtual_times = {one: self._virtual_times.get(one, start(one)) for one in waiting}
        virtual_times |= {
            one: max(start(one), virtual_times[one]) for one in waiting if one not in self._waiting
        }
        self._virtual_times = {
            one: spent for one, spent in self._virtual_times.items() if spent > start(one)
        } | virtual_times
        self._waiting = set(waiting)

    def virtual_time(self, one: Key) -> float:
        """Virtual time of a key; the one with the least is next."""
        return self._virtual_times.get(one, self._start(one))

    def charge(self, one: Key, seconds: float) -> None:
        """Charge seconds of the device to a key."""
        by_weight = seconds / self._weight_of(one)
        self._virtual_times[one] = self.virtual_time(one) + by_weight
        self._served += by_weight

    def _start(self, one: Key) -> float:
        """Virtual time at which a key begins that was away, while others have work."""
        return self.clock - BURST_S / max(1.0, self._weight_of(one))


class Turns:
    """Shares the device among clients by weight, and a client's part equally among its flows.

    The unit is the flow, not the request, so that requests of one client that can share a forward
    pass are ordered for the least mean latency (``scheduler.py``), while large pictures and small
    ones take turns.

    Attributes:
        spent: seconds of the device that each client has had since start-up.
    """

    def __init__(self) -> None:
        self._clients = FairQueue[Client](lambda client: client.weight)
        self._kinds: dict[Client, FairQueue[Hashable]] = {}
        self._seen: dict[Flow, float] = {}
        self._waiting: Mapping[Client, Collection[Hashable]] = {}
        self.spent: dict[Client, float] = {}

    def wait(self, flows: Iterable[Flow], now: float) -> None:
        """Set which flows have work.

        Args:
            flows: flows whose images wait, run or have to be decoded.
            now: time in seconds, of any clock.
        """
        kinds: dict[Client, set[Hashable]] = {}
        for flow in flows:
            kinds.setdefault(flow.client, set()).add(flow.kind)
            self._seen[flow] = now
        self._seen = {flow: at for flow, at in self._seen.items() if at > now - FLOW_EXPIRY_S}
        self._waiting = kinds
        self._clients.wait(kinds)
        known = {flow.client for flow in self._seen}
        self._kinds = {client: own for client, own in self._kinds.items() if client in known}
        for client, own in kinds.items():
            self._kinds.setdefault(client, FairQueue(endless=True)).wait(own)

    @property
    def contended(self) -> bool:
        """Whether several flows have had work recently, so that a long tick makes others wait."""
        return len(self._seen) > 1

    def clients(self) -> Mapping[Client, float]:
        """Virtual times of the clients that have work."""
        return {client: self._clients.virtual_time(client) for client in self._waiting}

    def kinds(self, client: Client) -> Mapping[Hashable, float]:
        """Virtual times of a client's flows that have work, by their kind."""
        queue = self._kinds[client]
        return {kind: queue.virtual_time(kind) for kind in self._waiting.get(client, ())}

    def virtual_times_of(self, flow: Flow) -> tuple[float, float]:
        """Virtual times of its client, and of the flow within its client; the least is next."""
        kinds = self._kinds.get(flow.client)
        own = -inf if kinds is None else kinds.virtual_time(flow.kind)
        return self._clients.virtual_time(flow.client), own

    def due(self, client: Client, latest: float) -> bool:
        """Whether a client is owed service, or its virtual time is at most ``latest``."""
        own = self._clients.virtual_time(client)
        return own < self._clients.clock or own <= latest

    def flow_due(self, flow: Flow, within_s: float) -> bool:
        """Whether it is a flow's turn, or it is ahead of those before it by at most ``within_s``.

        It is never the turn of a flow that has no work, or that must leave the device to others.
        """
        if flow.kind not in self._waiting.get(flow.client, ()):
            return False
        own, kinds = self._kinds[flow.client].virtual_time(flow.kind), self.kinds(flow.client)
        latest = min(self.clients().values()) + within_s
        return self.due(flow.client, latest) and own <= min(kinds.values()) + within_s

    def charge(self, flow: Flow, seconds: float) -> None:
        """Charge seconds of the device to a flow and its client."""
        self.spent[flow.client] = self.spent.get(flow.client, 0.0) + seconds
        self._clients.charge(flow.client, seconds)
        self._kinds.setdefault(flow.client, FairQueue(endless=True)).charge(flow.kind, seconds)
