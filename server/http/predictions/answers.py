"""Response bodies for durable jobs, in the format of Replicate's predictions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from server.jobs.job import Job, Status

__all__ = ["Prediction", "PredictionPage", "Step", "predicted"]

PATH = "/v1/predictions"


class Urls(BaseModel):
    """Paths of the job on this server."""

    get: str
    cancel: str
    stream: str = Field(description="Server-sent events.")


class Metrics(BaseModel):
    """Seconds; for several images, those of the slowest."""

    predict_time: float = Field(description="Denoising and decoding.")
    total_time: float = Field(description="From acceptance to the stored images.")


class PredictionError(BaseModel):
    """Why the job failed, as in the body of an error."""

    message: str
    code: str
    param: str | None


class Prediction(BaseModel):
    """A durable job."""

    id: str
    status: Status
    queue_position: int | None = Field(
        default=None,
        description="While `starting`: number of jobs that begin before it, if no others arrive.",
    )
    input: dict[str, Any] = Field(description="As sent, without pictures.")
    output: list[str] | None = Field(
        default=None, description="Once it succeeded: the path of each image on this server."
    )
    error: str | None = Field(default=None, description="One sentence, if it failed.")
    error_detail: PredictionError | None = None
    attempts: int = Field(description="How often it was started.")
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    expires_at: datetime | None = Field(
        description="Once it has ended: when it and its images are deleted."
    )
    model: str | None = None
    seeds: list[int] | None = Field(default=None, description="As in `POST /v1/generate`.")
    settings: dict[str, Any] | None = Field(default=None, description="As in `POST /v1/generate`.")
    warnings: list[str] | None = Field(default=None, description="As in `POST /v1/generate`.")
    notes: list[str] | None = Field(default=None, description="As in `POST /v1/generate`.")
    metrics: Metrics | None = None
    webhook: str | None = None
    urls: Urls


class PredictionPage(BaseModel):
    """One page of a key's jobs, the newest first."""

    results: list[Prediction]
    next: str | None = Field(description="Path of the page with older jobs, if there are any.")


class Step(BaseModel):
    """Progress of one image; a slow reader gets only the latest event of each image."""

    index: int = Field(description="Index of the image, from 0.")
    step: int = Field(description="Steps completed.")
    steps: int = Field(description="Steps in total.")


def predicted(job: Job, position: int | None = None) -> Prediction:
    """Return the response body for a job.

    Args:
        job: job to describe.
        position: number of jobs that begin before it, while it waits.
    """
    path = f"{PATH}/{job.id}"
    made = job.result or {}
    seeds: list[int] | None = made.get("seeds")
    return Prediction(
        id=job.id,
        status=job.status,
        queue_position=position,
        input=dict(job.input),
        output=None if seeds is None else [f"{path}/output/{i}" for i in range(len(seeds))],
        error=None if job.error is None else job.error["message"],
        error_detail=None if job.error is None else PredictionError(**job.error),
        attempts=job.attempt,
        created_at=datetime.fromtimestamp(job.created_at, UTC),
        started_at=_time(job.started_at),
        completed_at=_time(job.completed_at),
        expires_at=_time(job.expires_at),
        model=made.get("model"),
        seeds=seeds,
        settings=made.get("settings"),
        warnings=made.get("warnings"),
        notes=made.get("notes"),
        metrics=_metrics(job),
        webhook=job.webhook,
        urls=Urls(get=path, cancel=f"{path}/cancel", stream=f"{path}/events"),
    )


def _metrics(job: Job) -> Metrics | None:
    if job.result is None or job.completed_at is None:
        return None
    return Metrics(
        predict_time=job.result["denoise_s"] + job.result["decode_s"],
        total_time=job.completed_at - job.created_at,
    )


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
