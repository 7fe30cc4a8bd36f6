"""A stored job: its request, its status and its result."""

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
"""Events that webhooks report: the job begins for the first time, and it ends."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A request for a job.

    Attributes:
        id: new, random identifier.
        owner: SHA-256 of the client's key in hexadecimal digits; empty on a server without keys.
        input: request as sent, without its pictures.
        uploads: dotted paths of the fields whose pictures are stored beside it.
        digest: SHA-256 of the body; equal for equal bodies.
        idempotency_key: key under which the client may send it again.
        webhook: URL that is notified about the job.
        webhook_events: events that it is notified of.
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
        id: see :class:`NewJob`.
        owner: see :class:`NewJob`.
        status: current status.
        input: see :class:`NewJob`; empty if it is damaged in the database.
        uploads: see :class:`NewJob`.
        digest: see :class:`NewJob`.
        webhook: see :class:`NewJob`.
        attempt: number of times that it was begun; a committed result names the attempt that made
            it.
        spared: number of attempts that ended for a reason outside of the job.
        created_at: Unix time at which it was accepted.
        started_at: Unix time at which it was first begun.
        completed_at: Unix time at which it ended.
        expires_at: Unix time from which it may be deleted.
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
        """Whether its status is final."""
        return self.status in ENDED


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook to be sent.

    Attributes:
        id: identifier, the same at each attempt, by which receivers recognize a repetition.
        job: job that it reports.
        event: event that it reports.
        tries: number of failed attempts.
    """

    id: str
    job: Job
    event: Event
    tries: int
