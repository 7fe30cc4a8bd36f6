"""The request body for a durable job."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from server.requests.schema import GenerateRequest

__all__ = ["PredictionRequest"]


class PredictionRequest(BaseModel):
    """A request for images that are made even if the client leaves or the server restarts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: GenerateRequest = Field(description="Like the body of `POST /v1/generate`.")
    webhook: str | None = Field(
        default=None,
        description="A URL to which the prediction is posted when it begins and when it has ended.",
    )
    webhook_events_filter: tuple[Literal["start", "completed"], ...] = Field(
        default=("start", "completed"),
        max_length=2,
        strict=False,
        description="Events that are sent to the webhook; by default both.",
    )
