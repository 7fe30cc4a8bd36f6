"""Operations on stored jobs, each within one transaction.

A job may be begun more than once but ends once: a commit names the attempt that made the result,
and only the latest attempt of a job that is still processing is accepted.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from typing import Any, Final, get_args

from sqlalchemy import (
    Connection,
    Row,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from server.errors import Overloaded, ReusedKey, UnknownJob
from server.jobs.job import ENDED, WAITING, Delivery, Event, Job, NewJob, Status
from server.jobs.tables import DELIVERIES, JOBS

__all__ = [
    "add",
    "begin",
    "cancel",
    "counts",
    "delivered",
    "disown",
    "due",
    "expired",
    "finish",
    "forget",
    "free_all",
    "get",
    "known",
    "page",
    "positions",
    "renew",
    "repeated",
    "requeue",
]

RETRY_AFTER_S: Final = 30.0
SENDING_S: Final = 120.0
"""Seconds for which nobody else sends a webhook that is being sent."""

_SHOWN: Final = [JOBS.c[name] for name in Job.__dataclass_fields__]


def add(connection: Connection, new: NewJob, waiting: int, now: float) -> Job:
    """Add a job, or return the one that was added with the same idempotency key and body.

    Args:
        connection: connection in a transaction.
        new: request for the job.
        waiting: maximum number of the owner's jobs that may wait.
        now: Unix time.

    Raises:
        Overloaded: this many jobs of the owner already wait.
        ReusedKey: the idempotency key was used with another body.
    """
    same = repeated(connection, new.owner, new.idempotency_key, new.digest)
    if same is not None:
        return same
    count = select(func.count()).where(JOBS.c.status == WAITING, JOBS.c.owner == new.owner)
    if connection.execute(count).scalar_one() >= waiting:
        raise Overloaded(
            RETRY_AFTER_S,
            f"You have {waiting} predictions waiting, which is the maximum; try again in "
            f"{RETRY_AFTER_S:.0f} s.",
        )
    row = {name: getattr(new, name) for name in NewJob.__dataclass_fields__}
    row |= {"uploads": list(new.uploads), "webhook_events": list(new.webhook_events)}
    try:
        with connection.begin_nested():
            added = insert(JOBS).values(**row, status=WAITING, created_at=now).returning(*_SHOWN)
            return _job(connection.execute(added).one())
    except IntegrityError:
        # Another server added it first.
        same = repeated(connection, new.owner, new.idempotency_key, new.digest)
        if same is None:
            raise
        return same


def repeated(connection: Connection, owner: str, key: str | None, digest: str) -> Job | None:
    """Return the job with the same idempotency key, if there is one.

    Raises:
        ReusedKey: it has another body.
    """
    if key is None:
        return None
    found = select(*_SHOWN).where(JOBS.c.owner == owner, JOBS.c.idempotency_key == key)
    row = connection.execute(found).one_or_none()
    if row is None:
        return None
    if row.digest != digest:
        raise ReusedKey(key)
    return _job(row)


def get(connection: Connection, owner: str, identifier: str) -> Job:
    """Return a job of an owner; raises UnknownJob if the owner has no such job."""
    found = select(*_SHOWN).where(JOBS.c.owner == owner, JOBS.c.id == identifier)
    row = connection.execute(found).one_or_none()
    if row is None:
        raise UnknownJob(identifier)
    return _job(row)


def page(connection: Connection, owner: str, after: str | None, count: int) -> list[Job]:
    """Return a page of an owner's jobs, newest first.

    Args:
        connection: connection in a transaction.
        owner: owner of the jobs.
        after: identifier of the job that precedes the page; None to begin with the newest.
        count: maximum number of jobs.

    Raises:
        UnknownJob: the owner has no job `after`.
    """
    found = select(*_SHOWN).where(JOBS.c.owner == owner)
    if after is not None:
        at = select(JOBS.c.seq).where(JOBS.c.owner == owner, JOBS.c.id == after)
        seq = connection.execute(at).scalar_one_or_none()
        if seq is None:
            raise UnknownJob(after)
        found = found.where(JOBS.c.seq < seq)
    rows = connection.execute(found.order_by(JOBS.c.seq.desc()).limit(count))
    return [_job(row) for row in rows]


def positions(connection: Connection, identifiers: Collection[str]) -> dict[str, int]:
    """Number of jobs begun before each waiting one, if owners take turns and no job is added."""
    turn = func.row_number().over(partition_by=JOBS.c.owner, order_by=JOBS.c.seq).label("turn")
    turns = select(JOBS.c.id, JOBS.c.seq, turn).where(JOBS.c.status == WAITING).subquery()
    place = func.row_number().over(order_by=(turns.c.turn, turns.c.seq)).label("place")
    places = select(turns.c.id, place).subquery()
    found = select(places.c.id, places.c.place).where(places.c.id.in_(identifiers))
    return {row.id: row.place - 1 for row in connection.execute(found)}


def begin(
    connection: Connection,
    worker: str,
    lease_s: float,
    now: float,
    owners: Collection[str],
    but: Collection[str] = (),
) -> Job | None:
    """Begin the next job: the oldest one of the owner with the fewest running jobs.

    A job whose worker has not renewed it for `lease_s` is begun again.

    Args:
        connection: connection in a transaction.
        worker: worker that begins it.
        lease_s: seconds within which the worker must :func:`renew` it.
        now: Unix time.
        owners: owners whose jobs may be begun.
        but: jobs that the worker is running, even if it was too slow to renew them.
    """
    running = and_(JOBS.c.status == "processing", JOBS.c.lease_until >= now)
    counts = select(JOBS.c.owner, func.count().label("jobs")).where(running).group_by(JOBS.c.owner)
    busy = {row.owner: row.jobs for row in connection.execute(counts)}
    ready = and_(
        JOBS.c.owner.in_(owners),
        or_(
            and_(JOBS.c.status == WAITING, JOBS.c.not_before <= now),
            and_(JOBS.c.status == "processing", JOBS.c.lease_until < now, JOBS.c.id.not_in(but)),
        ),
    )
    oldest = select(JOBS.c.owner, func.min(JOBS.c.seq)).where(ready).group_by(JOBS.c.owner)
    heads = [(busy.get(owner, 0), seq) for owner, seq in connection.execute(oldest)]
    for _, seq in sorted(heads):
        # The condition is checked again: another server may have begun it in the meantime.
        begun = (
            update(JOBS)
            .where(JOBS.c.seq == seq, ready)
            .values(
                status="processing",
                attempt=JOBS.c.attempt + 1,
                worker=worker,
                lease_until=now + lease_s,
                started_at=func.coalesce(JOBS.c.started_at, now),
            )
            .returning(*_SHOWN)
        )
        row = connection.execute(begun).one_or_none()
        if row is not None:
            if row.attempt == 1:
                _tell(connection, row.id, "start", now)
            return _job(row)
    return None


def renew(
    connection: Connection, worker: str, identifiers: Collection[str], lease_s: float, now: float
) -> set[str]:
    """Renew the leases of jobs for another `lease_s`.

    Returns:
        The jobs that still belong to this worker; others were cancelled, or begun by another
        worker.
    """
    kept = (
        update(JOBS)
        .where(JOBS.c.id.in_(identifiers), JOBS.c.worker == worker, JOBS.c.status == "processing")
        .values(lease_until=now + lease_s)
        .returning(JOBS.c.id)
    )
    return set(connection.execute(kept).scalars())


def free_all(connection: Connection) -> None:
    """End the leases of all processing jobs, which nobody processes, to let them begin again."""
    connection.execute(update(JOBS).where(JOBS.c.status == "processing").values(lease_until=0.0))


def finish(
    connection: Connection,
    job: Job,
    status: Status,
    keep_s: float,
    now: float,
    *,
    result: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> bool:
    """End a job, unless it has ended or has been begun again since.

    May be repeated: a connection can be lost after the database has ended the job, and before it
    could say so.

    Args:
        connection: connection in a transaction.
        job: job as it was begun by the attempt that ends it.
        status: final status.
        keep_s: seconds for which the job is kept.
        now: Unix time.
        result: result of an attempt that succeeded.
        error: error of an attempt that failed.

    Returns:
        Whether this attempt ended it.
    """
    own = JOBS.c.id == job.id, JOBS.c.attempt == job.attempt
    ended = (
        update(JOBS)
        .where(*own, JOBS.c.status == "processing")
        .values(**_end(status, keep_s, now), result=result, error=error)
    )
    if connection.execute(ended).rowcount == 0:
        before = select(JOBS.c.id).where(*own, JOBS.c.status == status)
        return connection.execute(before).first() is not None
    _tell(connection, job.id, "completed", now)
    return True


def requeue(connection: Connection, job: Job, not_before: float, *, spare: bool) -> bool:
    """Let a job wait again, unless it has ended or has been begun again since.

    Args:
        connection: connection in a transaction.
        job: job as it was begun by the attempt that gives it up.
        not_before: Unix time before which it is not begun.
        spare: whether the attempt does not count.
    """
    waits = (
        update(JOBS)
        .where(JOBS.c.id == job.id, JOBS.c.attempt == job.attempt, JOBS.c.status == "processing")
        .values(
            status=WAITING, not_before=not_before, worker=None, spared=JOBS.c.spared + int(spare)
        )
    )
    return connection.execute(waits).rowcount == 1


def cancel(connection: Connection, owner: str, identifier: str, keep_s: float, now: float) -> Job:
    """Cancel a job that has not ended; return its state afterwards. Raises UnknownJob."""
    ended = (
        update(JOBS)
        .where(JOBS.c.owner == owner, JOBS.c.id == identifier, JOBS.c.status.not_in(ENDED))
        .values(**_end("canceled", keep_s, now))
    )
    if connection.execute(ended).rowcount:
        _tell(connection, identifier, "completed", now)
    return get(connection, owner, identifier)


def disown(
    connection: Connection,
    owners: Collection[str],
    accepted_before: float,
    error: Mapping[str, Any],
    keep_s: float,
    now: float,
) -> list[str]:
    """Fail the jobs of owners whose keys are no longer accepted; return their identifiers.

    Args:
        connection: connection in a transaction.
        owners: owners whose keys are accepted.
        accepted_before: Unix time; jobs accepted later continue to wait.
        error: error that they fail with.
        keep_s: seconds for which they are kept.
        now: Unix time.
    """
    nobody_works_on_it = or_(
        JOBS.c.status == WAITING,
        and_(JOBS.c.status == "processing", JOBS.c.lease_until < now),
    )
    ended = (
        update(JOBS)
        .where(JOBS.c.owner.not_in(owners), JOBS.c.created_at <= accepted_before)
        .where(nobody_works_on_it)
        .values(**_end("failed", keep_s, now), error=error)
        .returning(JOBS.c.id)
    )
    identifiers = list(connection.execute(ended).scalars())
    for identifier in identifiers:
        _tell(connection, identifier, "completed", now)
    return identifiers


def expired(connection: Connection, now: float, count: int) -> list[str]:
    """Identifiers of up to `count` expired jobs."""
    over = select(JOBS.c.id).where(JOBS.c.expires_at < now).limit(count)
    return list(connection.execute(over).scalars())


def forget(connection: Connection, identifiers: Collection[str]) -> None:
    """Delete jobs, and their webhooks that have not been sent."""
    connection.execute(delete(JOBS).where(JOBS.c.id.in_(identifiers)))


def known(connection: Connection, identifiers: Collection[str]) -> set[str]:
    """The identifiers that belong to a job."""
    found = select(JOBS.c.id).where(JOBS.c.id.in_(identifiers))
    return set(connection.execute(found).scalars())


def counts(connection: Connection) -> dict[Status, int]:
    """Number of stored jobs with each status."""
    grouped = select(JOBS.c.status, func.count()).group_by(JOBS.c.status)
    found = {row[0]: row[1] for row in connection.execute(grouped)}
    return {status: found.get(status, 0) for status in get_args(Status)}


def due(connection: Connection, now: float, count: int) -> list[Delivery]:
    """Take up to `count` webhooks that are due; nobody else gets them for some time."""
    ready = (
        select(DELIVERIES.c.id)
        .where(DELIVERIES.c.next_at <= now)
        .order_by(DELIVERIES.c.next_at)
        .limit(count)
        .with_for_update(skip_locked=True)
    )
    identifiers = list(connection.execute(ready).scalars())
    if not identifiers:
        return []
    mine = DELIVERIES.c.id.in_(identifiers)
    connection.execute(update(DELIVERIES).where(mine).values(next_at=now + SENDING_S))
    columns = [DELIVERIES.c.id.label("delivery"), DELIVERIES.c.event, DELIVERIES.c.tries]
    both = select(*columns, *_SHOWN).join(JOBS, JOBS.c.id == DELIVERIES.c.job).where(mine)
    return [
        Delivery(row.delivery, _job(row), row.event, row.tries) for row in connection.execute(both)
    ]


def delivered(connection: Connection, delivery: Delivery, again_at: float | None) -> None:
    """Record an attempt: the webhook is sent again at a time, or never."""
    this = DELIVERIES.c.id == delivery.id
    if again_at is None:
        connection.execute(delete(DELIVERIES).where(this))
        return
    tried = update(DELIVERIES).where(this)
    connection.execute(tried.values(tries=delivery.tries + 1, next_at=again_at))


def _end(status: Status, keep_s: float, now: float) -> dict[str, Any]:
    return {"status": status, "completed_at": now, "expires_at": now + keep_s}


def _tell(connection: Connection, identifier: str, event: Event, now: float) -> None:
    """Queue a webhook, if the job wants one for the event."""
    wanted = select(JOBS.c.webhook, JOBS.c.webhook_events).where(JOBS.c.id == identifier)
    row = connection.execute(wanted).one()
    if row.webhook is not None and event in _listed(row.webhook_events):
        name = f"msg_{uuid.uuid4().hex}"
        told = {"id": name, "job": identifier, "event": event, "next_at": now}
        connection.execute(insert(DELIVERIES).values(**told))


def _job(row: Row[Any]) -> Job:
    fields: dict[str, Any] = {name: getattr(row, name) for name in Job.__dataclass_fields__}
    fields["uploads"] = _listed(fields["uploads"])
    # Damaged values in the database may be of any type.
    for name, without in (("input", {}), ("result", None), ("error", None)):
        fields[name] = fields[name] if isinstance(fields[name], dict) else without
    return Job(**fields)


def _listed(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) else ()
