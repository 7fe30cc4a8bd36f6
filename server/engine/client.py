"""The parties that share the device: clients, and the flows of work that each has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["ANONYMOUS", "ANY_FLOW", "Client", "Flow"]


@dataclass(frozen=True, slots=True)
class Client:
    """A party with a share of the device of its own; with API keys, each key is a client.

    Attributes:
        name: name under which it is counted; unique among clients.
        weight: its share of the device relative to other clients that have work.
        max_images: maximum number of its images that may wait or run.
        max_device_s: maximum seconds of the device that these may need, as estimated.
        batch: whether all its images have the priority batch.
    """

    name: str
    weight: float = 1.0
    max_images: int | None = None
    max_device_s: float | None = None
    batch: bool = False

    def __hash__(self) -> int:
        # Of one field only: a tick looks up its data by client many times.
        return hash(self.name)


ANONYMOUS = Client("anyone")
"""All requests of a server without keys, and of programs that use an engine directly."""


class Flow(NamedTuple):
    """Images of one client that cost the same: those of one model and one size.

    Attributes:
        client: client that the images are for.
        kind: value that is equal for images of the same model and size.
    """

    client: Client
    kind: Hashable


ANY_FLOW = Flow(ANONYMOUS, None)
