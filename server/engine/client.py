"""Who shares the device: a client, and the flows of work that it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["ANYONE", "ANY_FLOW", "Client", "Flow"]


@dataclass(frozen=True, slots=True)
class Client:
    """Whoever has a share of the device of its own; with API keys, each key is one.

    Attributes:
        name: under which it is counted; unique among clients.
        weight: its share of the device beside those of the other clients that have work.
        most_images: that it may have waiting or running.
        most_seconds: of the device likewise, as estimated.
        batch: all its images have the priority batch.
    """

    name: str
    weight: float = 1.0
    most_images: int | None = None
    most_seconds: float | None = None
    batch: bool = False

    def __hash__(self) -> int:
        # Of one field: what a tick keeps by client is looked up many times a tick.
        return hash(self.name)


ANYONE = Client("anyone")
"""All requests of a server without keys, and those of programs that use an engine directly."""


class Flow(NamedTuple):
    """Images of one client that cost the same: of one model and one size.

    Attributes:
        client: whose images.
        kind: equal for images of the same model and size.
    """

    client: Client
    kind: Hashable


ANY_FLOW = Flow(ANYONE, None)
