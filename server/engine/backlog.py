"""Admission control: bounds on waiting images, device seconds and bytes, divided among clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import ceil, inf
from typing import TYPE_CHECKING, NamedTuple

from server.engine.client import ANONYMOUS, Client
from server.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from server.engine.footprint import Kind

__all__ = ["Amounts", "Backlog", "Bounds", "Holding"]

LATITUDE = 4.0
"""Multiple of the free capacity that a client of weight 1 may hold. A client that is alone may hold
4/5 of everything, so that the next one finds room; n clients may hold 4 n / (4 n + 1)
together, in equal parts.

These are the dynamic thresholds of Choudhury and Hahne (1998) for queues that share a memory."""

MAX_FRACTION = 0.5
"""Maximum fraction of the allowed seconds that one request counts for; it may need more."""


MIN_COST = 1e-6
"""Number of evaluations below which a count is a rounding error and treated as zero."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits on what may wait or run at once, apart from frames of live streams.

    Attributes:
        images: number of images.
        seconds: seconds of the device, as estimated.
        nbytes: bytes of states and pictures, as estimated.
    """

    images: int
    seconds: float = inf
    nbytes: float = inf


class Amounts(NamedTuple):
    """Amount of some work."""

    images: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Holding:
    """What one request occupies in the queue; only the backlog changes it.

    Attributes:
        client: client that sent the request.
        images: number of images that are not done; each drawing of an image counts.
        runs: number of times that each image is drawn; the client's limit counts an image once.
        rows: evaluations that the images still need, by model and shape of the latents; the cost of
            ControlNets is counted as further evaluations.
        nbytes: bytes that they need at once.
        part: fraction of its seconds that is counted; below 1 for a very large request.
    """

    client: Client
    images: int
    runs: int = 1
    rows: dict[Kind, float] = field(default_factory=dict["Kind", float])
    nbytes: int = 0
    part: float = 1.0


@dataclass(slots=True)
class Total:
    """Sum of a client's holdings; rows are weighted by the part that is counted.

    Attributes:
        images: number of images that are not done; each drawing of an image counts.
        limited: number of images that the client's limit counts.
    """

    images: int = 0
    limited: float = 0.0
    rows: dict[Kind, float] = field(default_factory=dict["Kind", float])
    nbytes: int = 0


class Backlog:
    """Admits work according to its cost; not thread-safe.

    A request of a client with nothing else in the queue is admitted however many seconds it needs
    and however much others have waiting, as far as images and bytes allow. A limit is no reason to
    shut a client out.

    Args:
        bounds: limits for all clients together.
        seconds_a_row: function that returns the seconds of an evaluation, by model and shape.
    """

    def __init__(self, bounds: Bounds, seconds_a_row: Callable[[Kind], float]) -> None:
        self._bounds = bounds
        self._seconds_a_row = seconds_a_row
        self._totals: dict[Client, Total] = {}

    def reserve(self, client: Client, images: int, pace: float = 1.0, *, runs: int = 1) -> Holding:
        """Reserve room for some images whose cost is not known yet.

        Args:
            client: client that the images are for.
            images: number of images; each drawing of an image counts.
            pace: share of the device that ordinary images have now.
            runs: number of times that each image is drawn.

        Raises:
            InvalidRequest: the client may never have this many.
            Overloaded: there is no room now.
        """
        limited = images / runs
        if client.max_images is not None and limited > client.max_images:
            raise InvalidRequest(
                "n",
                f"n is {limited:g}; at most {client.max_images} images of this key may wait or "
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
        """Claim room for the cost of a holding's images, which is now known.

        Raises:
            InvalidRequest: they cost more than their client may ever have, or need more memory than
                all clients together may have.
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
        if client.max_device_s is not None and seconds > client.max_device_s:
            raise InvalidRequest(
                _largest_field(holding),
                f"The request needs about {seconds:.0f} s of device time; at most "
                f"{client.max_device_s:g} s of this key may wait or run at once, so ask for fewer "
                "images, fewer steps or a smaller size.",
            )
        # The holding's own images must not count against it.
        self._count(holding, images=-(images := holding.images))
        try:
            waiting = self.by_client()
            self._check_seconds(client, waiting, seconds, pace)
            self._check_bytes(client, waiting, nbytes, pace)
        finally:
            self._count(holding, images=images)
        if seconds > 0:
            holding.part = min(1.0, MAX_FRACTION * self._bounds.seconds / seconds)
        self._count(holding, rows=rows, nbytes=nbytes)

    def move(
        self, holding: Holding, images: int, rows: Mapping[Kind, float], nbytes: int
    ) -> Holding:
        """Move some images to a holding of their own, whose rows the caller counts afterwards.

        Args:
            holding: holding whose cost was claimed.
            images: number of its images to move.
            rows: evaluations that they need, as at the claim.
            nbytes: bytes that they need, as at the claim; the last images take all that is left.
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
        """Count more evaluations for images of a holding than before, or fewer."""
        self._count(holding, rows={kind: more})

    def end_image(self, holding: Holding) -> None:
        """Count one image less; its rows are counted separately."""
        self._count(holding, images=-1, nbytes=-round(holding.nbytes / holding.images))

    def release(self, holding: Holding) -> None:
        """Stop counting anything of a holding."""
        rows = {kind: -count for kind, count in holding.rows.items()}
        self._count(holding, -holding.images, rows, -holding.nbytes)

    def by_client(self) -> dict[Client, Amounts]:
        """Amounts that wait or run, by client."""
        # Cached, since clients have sizes in common.
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
            if left < MIN_COST:
                total.rows.pop(kind, None)
            else:
                total.rows[kind] = left
        if not total.images:
            # Otherwise rounding errors would add up forever.
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
        if client.max_images is not None and has + limited > client.max_images:
            excess = (has + limited - client.max_images) / has
            raise _quota_used(
                self._until(client, waiting, excess, pace),
                f"{ceil(has)} images",
                str(client.max_images),
            )
        total = sum(one.images for one in waiting.values())
        self._check_room(client, waiting, own.images, images, total, self._bounds.images, pace)

    def _check_seconds(
        self, client: Client, waiting: Mapping[Client, Amounts], seconds: float, pace: float
    ) -> None:
        own = waiting.get(client, Amounts())
        if client.max_device_s is not None and own.seconds + seconds > client.max_device_s:
            excess = (own.seconds + seconds - client.max_device_s) / own.seconds
            raise _quota_used(
                self._until(client, waiting, excess, pace),
                f"about {own.seconds:.0f} s of work",
                f"{client.max_device_s:g} s",
            )
        if not own.images:
            return
        total = sum(one.seconds for one in waiting.values())
        part = min(seconds, MAX_FRACTION * self._bounds.seconds)
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
        limit: float,
        pace: float,
    ) -> None:
        """Refuse more of one measure if the total or the client's own share leaves no room."""
        if total + more > limit:
            excess = (total + more - limit) / (total or more)
            raise Overloaded(self._until_all(waiting, excess, pace))
        # Compared by identity: a key may have the same name, and then compares equal.
        if client is ANONYMOUS or not own:
            return
        allowed = LATITUDE * client.weight * (limit - total)
        if own + more > allowed:
            excess = (own + more - allowed) / own
            raise Overloaded(self._until(client, waiting, excess, pace))

    def _until(
        self, client: Client, waiting: Mapping[Client, Amounts], part: float, pace: float
    ) -> float:
        """Seconds until a client's work has shrunk by a fraction, at its share of the device.

        This is at most the time until all waiting work is done, since a small weight matters only
        while others have work.
        """
        share = client.weight / sum(one.weight for one in {client, *waiting})
        own = min(1.0, part) * waiting[client].seconds / share
        return max(1.0, min(own, sum(one.seconds for one in waiting.values())) / pace)

    def _until_all(self, waiting: Mapping[Client, Amounts], part: float, pace: float) -> float:
        seconds = sum(one.seconds for one in waiting.values())
        return max(1.0, min(1.0, part) * seconds / pace)


def _largest_field(holding: Holding) -> str:
    return "n" if holding.images > 1 else "width"


def _quota_used(retry_after_s: float, has: str, limit: str) -> Overloaded:
    return Overloaded(
        retry_after_s,
        f"This key has {has} waiting or running; at most {limit} are allowed. Try again in "
        f"{retry_after_s:.0f} s.",
    )


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MB"
