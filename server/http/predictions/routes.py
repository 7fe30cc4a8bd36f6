"""`/v1/predictions`: jobs that complete even if the client leaves or the server restarts."""

from __future__ import annotations

import hashlib
import json
import uuid
from asyncio import to_thread
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import Response

from server.errors import InvalidRequest, JobsOff, UnknownJob
from server.http.dependencies import OwnerDep, ServiceDep
from server.http.errors import ErrorBody
from server.http.predictions.answers import PATH, Prediction, PredictionPage, predicted
from server.http.predictions.body import PredictionRoute, sent_input
from server.http.predictions.prefer import waiting_s
from server.image_codec import MEDIA_TYPES
from server.jobs.job import Job, NewJob
from server.requests.prediction import PredictionRequest
from server.requests.upload import uploads_in

if TYPE_CHECKING:
    from server.jobs.jobs import Jobs
else:
    # Its dependencies are optional.
    Jobs = Any

__all__ = ["router"]

router = APIRouter(tags=["predictions"], route_class=PredictionRoute)

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 422, 503)
}
_MORE_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody} for status in (408, 413, 415, 429)
}

PAGE: Final = 100


async def _jobs(request: Request) -> Jobs:
    jobs: Jobs | None = request.app.state.jobs
    if jobs is None:
        raise JobsOff
    return jobs


JobsDep = Annotated[Jobs, Depends(_jobs)]
Identifier = Annotated[str, Path(max_length=64)]


@router.post(
    PATH,
    status_code=201,
    response_model=Prediction,
    responses=_ERRORS
    | _MORE_ERRORS
    | {202: {"model": Prediction, "description": "Accepted, but not finished yet."}},
)
async def create(
    body: PredictionRequest,
    request: Request,
    service: ServiceDep,
    jobs: JobsDep,
    owner: OwnerDep,
    prefer: Annotated[str, Header(max_length=200)] = "",
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Any:
    """Accept a job, which is stored on disk before the response is sent.

    With `Prefer: wait` the response waits for the end of the job, for 60 s or as many as `wait=10`
    says, at most 60. The status is 201 if the job has ended and 202 otherwise. Requests with the
    same `Idempotency-Key` and the same body refer to the same job, however often and to whichever
    server they are sent.
    """
    wait_s = waiting_s(prefer)
    if body.input.stream:
        raise InvalidRequest(
            "input.stream",
            f"input.stream is true; a prediction's events are at {PATH}/ID/events.",
        )
    if "response_format" in body.input.model_fields_set:
        raise InvalidRequest(
            "input.response_format",
            f"input.response_format is {body.input.response_format!r}; a prediction's images are "
            "at the paths that its output lists, so leave it out.",
        )
    jobs.check_webhook(body.webhook)
    try:
        await service.check(body.input)
    except InvalidRequest as error:
        error.field = f"input.{error.field}" if error.field else "input"
        raise
    job = await _accepted(jobs, body, sent_input(request), owner, idempotency_key)
    if wait_s:
        job = await jobs.ended(job, wait_s)
    return await _answer(jobs, job, 201 if job.ended else 202)


@router.get(PATH, responses=_ERRORS)
async def listed(
    jobs: JobsDep,
    owner: OwnerDep,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
) -> PredictionPage:
    """List the jobs of this key in pages, the newest first."""
    try:
        found = await jobs.page(owner, cursor, limit + 1)
    except UnknownJob:
        raise InvalidRequest(
            "cursor",
            "cursor is not a prediction of yours, or an expired one; begin again without it.",
        ) from None
    page = found[:limit]
    positions = await jobs.positions(page)
    more = f"{PATH}?cursor={page[-1].id}&limit={limit}" if len(found) > limit else None
    return PredictionPage(
        results=[predicted(job, positions.get(job.id)) for job in page], next=more
    )


@router.get(PATH + "/{identifier}", response_model=Prediction, responses=_ERRORS)
async def get(identifier: Identifier, jobs: JobsDep, owner: OwnerDep) -> Any:
    """Get a job of this key."""
    return await _answer(jobs, await jobs.get(owner, identifier))


@router.post(PATH + "/{identifier}/cancel", response_model=Prediction, responses=_ERRORS)
async def cancel(identifier: Identifier, jobs: JobsDep, owner: OwnerDep) -> Any:
    """Cancel a job of this key; a job that has ended is unchanged."""
    return await _answer(jobs, await jobs.cancel(owner, identifier))


@router.get(
    PATH + "/{identifier}/events",
    responses=_ERRORS | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(identifier: Identifier, jobs: JobsDep, owner: OwnerDep) -> Response:
    """Stream a job's events: `status` at once, at each change and at the end; `progress`.

    Disconnecting does not cancel the job, and a client may reconnect.
    """
    from server.http.predictions.events import PredictionStream

    return PredictionStream(jobs, await jobs.get(owner, identifier))


@router.get(
    PATH + "/{identifier}/output/{index}",
    response_class=Response,
    responses=_ERRORS
    | {
        200: {
            "content": {
                media: {"schema": {"type": "string", "format": "binary"}}
                for media in MEDIA_TYPES.values()
            }
        }
    },
)
async def output(
    identifier: Identifier,
    index: Annotated[int, Path(ge=0, le=10**6)],
    jobs: JobsDep,
    owner: OwnerDep,
) -> Response:
    """Get an image of a job that succeeded."""
    job = await jobs.get(owner, identifier)
    if job.result is None or index >= len(job.result["seeds"]):
        raise UnknownJob(f"{identifier}/output/{index}")
    data = await jobs.picture(job, index)
    return Response(data, media_type=MEDIA_TYPES[job.result["output_format"]])


async def _answer(jobs: Jobs, job: Job, status: int = 200) -> Response:
    position = (await jobs.positions([job])).get(job.id)
    headers = {"location": f"{PATH}/{job.id}"} if status != 200 else {}
    text = predicted(job, position).model_dump_json()
    return Response(text, status, headers, media_type="application/json")


async def _accepted(
    jobs: Jobs, body: PredictionRequest, sent: dict[str, Any], owner: str, key: str | None
) -> Job:
    """Store a job and return it; the body's pictures are released as soon as they are stored."""
    with ExitStack() as opened:
        uploads: dict[str, bytes] = {}
        for name, upload in uploads_in(body.input):
            data = opened.enter_context(upload.opened())
            uploads[name] = data if isinstance(data, bytes) else data.encode()
        new = await to_thread(_new, body, sent, uploads, owner, key)
        return await jobs.add(new, uploads)


def _new(
    body: PredictionRequest,
    sent: dict[str, Any],
    uploads: dict[str, bytes],
    owner: str,
    key: str | None,
) -> NewJob:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in uploads.items()}
    whole = [sent, digests, body.webhook, sorted(body.webhook_events_filter)]
    return NewJob(
        id=uuid.uuid4().hex,
        owner=owner,
        input=sent,
        uploads=tuple(uploads),
        digest=hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest(),
        idempotency_key=key,
        webhook=body.webhook,
        webhook_events=body.webhook_events_filter,
    )
