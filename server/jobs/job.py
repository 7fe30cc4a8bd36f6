"""A job as it is stored: what was asked for, how far it is, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["ENDED", "EVENTS", "WAITING", "Delivery", "Event", "Job", "NewJob", "Status"]

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]
Event = Literal["start", "completed"]

WAITING: Final[Status] = "starting"
ENDED: Final[frozenset[Status]] = frozenset({"succeeded", "failed", "canceled"})
EVENTS: Final[tuple[Event, ...]] = ("start", "completed")
"""Of which webhooks tell: the job begins for the first time, and it ends."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a client asked for.

    Attributes:
        id: new and random.
        owner: SHA-256 of the client's key in hexadecimal digits; empty on a server without keys.
        input: the request as sent, without its pictures.
        uploads: dotted paths of the fields whose pictures are stored beside it.
        digest: SHA-256 of the body; equal for equal bodies.
        idempotency_key: under which the client may send it again.
        webhook: URL that is told of the job.
        webhook_events: of which it is told.
    """

    id: str
    owner: str
    input: Mapping[str, Any]
    uploads: tuple[str, ...]
    digest: str
    idempotency_key: str | None
    webhook: str | None
    webhook_events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A stored job.

    Attributes:
        id: as of :class:`NewJob`.
        owner: as of :class:`NewJob`.
        status: how far it is.
        input: as of :class:`NewJob`; empty if it is damaged in the database.
        uploads: as of :class:`NewJob`.
        digest: as of :class:`NewJob`.
        webhook: as of :class:`NewJob`.
        attempt: how often it was begun; whoever commits a result names the attempt that made it.
        spared: attempts that ended for no reason of the job's own.
        created_at: Unix time at which it was accepted.
        started_at: Unix time at which it was first begun.
        completed_at: Unix time at which it ended.
        expires_at: Unix time from which it may be forgotten.
        result: how its pictures were made, if it succeeded.
        error: message, code and field, if it failed.
    """

    id: str
    owner: str
    status: Status
    input: Mapping[str, Any]
    uploads: tuple[str, ...]
    digest: str
    webhook: str | None
    attempt: int
    spared: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook that is to be sent.

    Attributes:
        id: the same at each try, by which receivers know a repetition.
        job: that it tells of.
        event: what happened.
        tries: how often it was sent in vain.
    """

    id: str
    job: Job
    event: Event
    tries: int
