"""How much may wait: bounds on images, seconds of the device and bytes, divided among clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import ceil, inf
from typing import TYPE_CHECKING, NamedTuple

from server.engine.client import ANYONE, Client
from server.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from server.engine.footprint import Kind

__all__ = ["Amounts", "Backlog", "Bounds", "Holding"]

LATITUDE = 4.0
"""A client of weight 1 may have so many times what is free: 4/5 of everything if it is alone, so
that whoever comes next finds room, and equal parts of 4 n / (4 n + 1) if there are n of them.

These are the dynamic thresholds of Choudhury and Hahne (1998) for queues that share a memory."""

LARGEST_PART = 0.5
"""Of the seconds that may wait, what one request counts for at most: a larger one is possible."""


NOTHING = 1e-6
"""Fewer evaluations are what rounding left of none."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that may wait or run at once, frames of live streams apart.

    Attributes:
        images: how many.
        seconds: of the device, as estimated.
        nbytes: of states and pictures, as estimated.
    """

    images: int
    seconds: float = inf
    nbytes: float = inf


class Amounts(NamedTuple):
    """What some work comes to."""

    images: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Holding:
    """What one request has of the queue; the backlog alone changes it.

    Attributes:
        client: whose it is.
        images: that are not done, each drawing of one counted by itself.
        runs: how often each image is drawn, of which the limit of its client counts one.
        rows: evaluations that they still need, by model and shape of the latents; what ControlNets
            cost is counted as further ones.
        nbytes: that they need at once.
        part: of its seconds, what is counted; less than 1 for a request of very many.
    """

    client: Client
    images: int
    runs: int = 1
    rows: dict[Kind, float] = field(default_factory=dict["Kind", float])
    nbytes: int = 0
    part: float = 1.0


@dataclass(slots=True)
class Total:
    """What the holdings of a client come to; rows are those that are counted.

    Attributes:
        images: that are not done, each drawing of one counted by itself.
        limited: of these, what its limit counts.
    """

    images: int = 0
    limited: float = 0.0
    rows: dict[Kind, float] = field(default_factory=dict["Kind", float])
    nbytes: int = 0


class Backlog:
    """Admits work by what it costs; not safe from several threads.

    A request that finds nothing else of its client is admitted whatever it takes and whoever else
    waits, as far as images and bytes allow: a limit is no reason to shut a client out.

    Args:
        bounds: for all clients together.
        seconds_a_row: what an evaluation costs, by model and shape.
    """

    def __init__(self, bounds: Bounds, seconds_a_row: Callable[[Kind], float]) -> None:
        self._bounds = bounds
        self._seconds_a_row = seconds_a_row
        self._totals: dict[Client, Total] = {}

    def reserve(self, client: Client, images: int, pace: float = 1.0, *, runs: int = 1) -> Holding:
        """Room for some images whose cost is not known yet.

        Args:
            client: whose images.
            images: how many, each drawing of one counted by itself.
            pace: share of the device that ordinary images have now.
            runs: how often each image is drawn.

        Raises:
            InvalidRequest: the client may never have so many.
            Overloaded: there is no room now.
        """
        limited = images / runs
        if client.most_images is not None and limited > client.most_images:
            raise InvalidRequest(
                "n",
                f"n is {limited:g}; at most {client.most_images} images of this key may wait or "
                "run at once.",
            )
        waiting = self.by_client()
        self._check_images(client, waiting, images, limited, pace)
        self._check_seconds(client, waiting, 0.0, pace)
        holding = Holding(client, 0, runs)
        self._count(holding, images=images)
        return holding

    def claim(
        self, holding: Holding, rows: Mapping[Kind, float], nbytes: int, pace: float = 1.0
    ) -> None:
        """Room for what the images of a holding cost, which is now known.

        Raises:
            InvalidRequest: they cost more than their client may ever have, or need more memory
                than there is for all.
            Overloaded: there is no room now.
        """
        client = holding.client
        seconds = sum(count * self._seconds_a_row(kind) for kind, count in rows.items())
        if nbytes > self._bounds.nbytes:
            raise InvalidRequest(
                _largest_field(holding),
                f"The request needs about {_megabytes(nbytes)} for its images; at most "
                f"{_megabytes(self._bounds.nbytes)} are allowed, so ask for fewer or smaller ones.",
            )
        if client.most_seconds is not None and seconds > client.most_seconds:
            raise InvalidRequest(
                _largest_field(holding),
                f"The request needs about {seconds:.0f} s of the device; at most "
                f"{client.most_seconds:g} s of this key may wait or run at once, so ask for fewer "
                "images, fewer steps or a smaller size.",
            )
        # Its own images are no reason to refuse them.
        self._count(holding, images=-(images := holding.images))
        try:
            waiting = self.by_client()
            self._check_seconds(client, waiting, seconds, pace)
            self._check_bytes(client, waiting, nbytes, pace)
        finally:
            self._count(holding, images=images)
        if seconds > 0:
            holding.part = min(1.0, LARGEST_PART * self._bounds.seconds / seconds)
        self._count(holding, rows=rows, nbytes=nbytes)

    def move(
        self, holding: Holding, images: int, rows: Mapping[Kind, float], nbytes: int
    ) -> Holding:
        """Count some images of a holding by themselves, without rows, which are to be counted.

        Args:
            holding: whose cost was claimed.
            images: how many of its images.
            rows: evaluations that they need, as at the claim.
            nbytes: that they need, likewise; the last images have all that is left.
        """
        own = Holding(holding.client, 0, holding.runs, part=holding.part)
        if images == holding.images:
            rows, nbytes = holding.rows, holding.nbytes
        nbytes = min(nbytes, holding.nbytes)
        moved = {kind: -min(count, holding.rows.get(kind, 0.0)) for kind, count in rows.items()}
        self._count(holding, -images, moved, -nbytes)
        self._count(own, images, nbytes=nbytes)
        return own

    def count_rows(self, holding: Holding, kind: Kind, more: float) -> None:
        """Count evaluations that images of a holding need more, or less, than was counted."""
        self._count(holding, rows={kind: more})

    def end_image(self, holding: Holding) -> None:
        """Count one image less, whose rows are counted apart."""
        self._count(holding, images=-1, nbytes=-round(holding.nbytes / holding.images))

    def release(self, holding: Holding) -> None:
        """Count nothing of it any longer."""
        rows = {kind: -count for kind, count in holding.rows.items()}
        self._count(holding, -holding.images, rows, -holding.nbytes)

    def by_client(self) -> dict[Client, Amounts]:
        """What waits or runs."""
        # Clients have sizes in common.
        a_row = cache(self._seconds_a_row)
        return {
            client: Amounts(
                total.images,
                sum(count * a_row(kind) for kind, count in total.rows.items()),
                total.nbytes,
            )
            for client, total in self._totals.items()
        }

    def _count(
        self,
        holding: Holding,
        images: int = 0,
        rows: Mapping[Kind, float] | None = None,
        nbytes: int = 0,
    ) -> None:
        total = self._totals.setdefault(holding.client, Total())
        holding.images += images
        holding.nbytes += nbytes
        total.images += images
        total.limited += images / holding.runs
        total.nbytes += nbytes
        for kind, count in (rows or {}).items():
            holding.rows[kind] = holding.rows.get(kind, 0.0) + count
            left = total.rows.get(kind, 0.0) + holding.part * count
            if left < NOTHING:
                total.rows.pop(kind, None)
            else:
                total.rows[kind] = left
        if not total.images:
            # Rounding must not add up for ever.
            del self._totals[holding.client]

    def _check_images(
        self,
        client: Client,
        waiting: Mapping[Client, Amounts],
        images: int,
        limited: float,
        pace: float,
    ) -> None:
        own = waiting.get(client, Amounts())
        has = self._totals[client].limited if client in self._totals else 0.0
        if client.most_images is not None and has + limited > client.most_images:
            excess = (has + limited - client.most_images) / has
            raise _quota_used(
                self._until(client, waiting, excess, pace),
                f"{ceil(has)} images",
                str(client.most_images),
            )
        total = sum(one.images for one in waiting.values())
        self._check_room(client, waiting, own.images, images, total, self._bounds.images, pace)

    def _check_seconds(
        self, client: Client, waiting: Mapping[Client, Amounts], seconds: float, pace: float
    ) -> None:
        own = waiting.get(client, Amounts())
        if client.most_seconds is not None and own.seconds + seconds > client.most_seconds:
            excess = (own.seconds + seconds - client.most_seconds) / own.seconds
            raise _quota_used(
                self._until(client, waiting, excess, pace),
                f"about {own.seconds:.0f} s of work",
                f"{client.most_seconds:g} s",
            )
        if not own.images:
            return
        total = sum(one.seconds for one in waiting.values())
        part = min(seconds, LARGEST_PART * self._bounds.seconds)
        self._check_room(client, waiting, own.seconds, part, total, self._bounds.seconds, pace)

    def _check_bytes(
        self, client: Client, waiting: Mapping[Client, Amounts], nbytes: int, pace: float
    ) -> None:
        own = waiting.get(client, Amounts())
        total = sum(one.nbytes for one in waiting.values())
        self._check_room(client, waiting, own.nbytes, nbytes, total, self._bounds.nbytes, pace)

    def _check_room(
        self,
        client: Client,
        waiting: Mapping[Client, Amounts],
        own: float,
        more: float,
        total: float,
        most: float,
        pace: float,
    ) -> None:
        """Whether there is room for more of one measure, of which the client has its own part."""
        if total + more > most:
            excess = (total + more - most) / (total or more)
            raise Overloaded(self._until_all(waiting, excess, pace))
        # A key may have the name, and be equal to it.
        if client is ANYONE or not own:
            return
        allowed = LATITUDE * client.weight * (most - total)
        if own + more > allowed:
            excess = (own + more - allowed) / own
            raise Overloaded(self._until(client, waiting, excess, pace))

    def _until(
        self, client: Client, waiting: Mapping[Client, Amounts], part: float, pace: float
    ) -> float:
        """Seconds until a client's work is less by some part of it, at its share of the device.

        At most until all that waits is done: a small weight counts only beside others' work.
        """
        share = client.weight / sum(one.weight for one in {client, *waiting})
        own = min(1.0, part) * waiting[client].seconds / share
        return max(1.0, min(own, sum(one.seconds for one in waiting.values())) / pace)

    def _until_all(self, waiting: Mapping[Client, Amounts], part: float, pace: float) -> float:
        seconds = sum(one.seconds for one in waiting.values())
        return max(1.0, min(1.0, part) * seconds / pace)


def _largest_field(holding: Holding) -> str:
    return "n" if holding.images > 1 else "width"


def _quota_used(retry_after_s: float, has: str, most: str) -> Overloaded:
    return Overloaded(
        retry_after_s,
        f"This key has {has} waiting or running; at most {most} are allowed. Try again in "
        f"{retry_after_s:.0f} s.",
    )


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MB"
