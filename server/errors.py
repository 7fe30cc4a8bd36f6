"""The errors that Weft raises on purpose.

    WeftError                        500  an error in the server
    |- InvalidRequest                422  a field has an invalid value
    |   |- MalformedBody             400  the body is not valid JSON
    |   |- MalformedRequest          400  the request is not valid HTTP
    |   |- HeadersTooLarge           431  the headers are too large
    |   |- NotAcceptable             406  no media type in the Accept header is supported
    |   |- UnsupportedMediaType      415  the body is not declared as JSON
    |   |- DidNotFit                 422  work of this size recently did not fit into memory
    |   |- ReusedKey                 422  an idempotency key was used before with another body
    |   |- TooLarge                  413  the body or an image in it is too large
    |   `- RequestTimeout            408  the request did not arrive in time
    |- Unauthorized                  401  the key is missing or wrong
    |- Forbidden                     403  the Host or Origin header, or this key, is not allowed to
    |- UnknownModel                  404  no model of that name is hosted
    |- UnknownGeneration             404  no generation of that identifier is running
    |- UnknownJob                    404  the client has no job of that identifier
    |- UnknownResult                 404  there is no image at this URL, or no longer
    |- JobsOff                       404  there are no durable jobs here
    |- CaptionsOff                   404  there is no model here that describes images
    |- DuplicateGeneration           409  the identifier is in use by a running generation
    |- ModelInUse                    409  the model cannot be unloaded while it is in use
    |- Cancelled                     409  the client cancelled the generation
    |- Overloaded                    429  the queue is full
    |- NotReady                      503  loading, draining or broken
    |   |- DeviceLost                503  the GPU failed in a way that only a restart repairs
    |   `- JobsUnavailable           503  the database of durable jobs cannot be used now
    |- ModelMismatch                 500  a model folder is unsupported
    |- ModelTooLarge                 507  a model does not fit in memory
    |- CannotListen                  500  the address or port cannot be listened on
    |- AdapterMismatch               500  an adapter cannot be used with a model
    |- ControlMismatch               500  a ControlNet cannot be used with a model
    |- EmbeddingMismatch             500  an embedding cannot be used with a model
    |- ImagePromptMismatch           500  an IP-Adapter cannot be used with a model
    `- RowFailed                     500  one image failed
        `- OutOfMemory               500  there was not enough memory for it

Each carries the sentence that the user reads; only `server.http.errors` turns them into responses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self

__all__ = [
    "AdapterMismatch",
    "BindError",
    "Cancelled",
    "CaptionsOff",
    "ControlMismatch",
    "DeviceLost",
    "DidNotFit",
    "DuplicateGeneration",
    "EmbeddingMismatch",
    "Forbidden",
    "HeadersTooLarge",
    "ImagePromptMismatch",
    "InvalidRequest",
    "JobsOff",
    "JobsUnavailable",
    "MalformedBody",
    "MalformedRequest",
    "ModelInUse",
    "ModelMismatch",
    "ModelTooLarge",
    "NotAcceptable",
    "NotReady",
    "OutOfMemory",
    "Overloaded",
    "RequestTimeout",
    "ReusedKey",
    "RowFailed",
    "TooLarge",
    "Unauthorized",
    "UnknownGeneration",
    "UnknownJob",
    "UnknownModel",
    "UnknownResult",
    "UnsupportedMediaType",
    "WeftError",
    "failed_with",
]


class WeftError(Exception):
    """The root of the tree; `status`, `type` and `code` go into the response."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(WeftError):
    """A field (dotted path, e.g. `guidance.scale`) has an invalid value."""

    status = 422
    type = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message, field=field)


class DidNotFit(InvalidRequest):
    """Work as large as the request's recently did not fit into the device's memory.

    Args:
        retry_after_s: seconds until it is tried again, since other images may have had the memory.
    """

    def __init__(self, field: str, message: str, retry_after_s: float) -> None:
        super().__init__(field, message)
        self.retry_after_s = retry_after_s


class MalformedBody(InvalidRequest):
    """The body cannot be read as JSON."""

    status = 400
    code = "malformed_body"


class MalformedRequest(InvalidRequest):
    """The request cannot be read as HTTP."""

    status = 400
    code = "malformed_request"

    def __init__(self) -> None:
        super().__init__(None, "The request is not valid HTTP/1.1.")


class HeadersTooLarge(InvalidRequest):
    """There are more headers, or more bytes of them, than this server reads."""

    status = 431
    code = "headers_too_large"

    def __init__(self, max_bytes: int, max_count: int) -> None:
        super().__init__(
            None,
            f"The headers are too large; at most {max_count} headers and {max_bytes} bytes of them "
            "are allowed.",
        )


class NotAcceptable(InvalidRequest):
    """The Accept header names no media type that this server can answer with."""

    status = 406
    code = "not_acceptable"


class UnsupportedMediaType(InvalidRequest):
    """The body is not declared as `application/json`."""

    status = 415
    code = "unsupported_media_type"


class TooLarge(InvalidRequest):
    """The body, or an image in it, is larger than this server accepts."""

    status = 413
    code = "too_large"

    @classmethod
    def body(cls, max_bytes: int) -> Self:
        """The error for a body of more than `max_bytes` bytes."""
        return cls(None, f"The body is too large; at most {max_bytes} bytes are allowed.")


class RequestTimeout(InvalidRequest):
    """The request, or the next message of a stream, did not arrive in time."""

    status = 408
    code = "request_timeout"

    def __init__(self, message: str) -> None:
        super().__init__(None, message)


class Unauthorized(WeftError):
    """The bearer key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(WeftError):
    """The Host or Origin header names a site that is not served, or the key lacks the right."""

    status = 403
    type = "permission_error"
    code = "not_allowed"


class UnknownModel(WeftError):
    """No model of this name is hosted; `allowed` are the names of those that are."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, name: str, allowed: Iterable[str]) -> None:
        message = f"model {name!r} is not hosted here; allowed are: {', '.join(sorted(allowed))}."
        super().__init__(message, field="model")


class UnknownGeneration(WeftError):
    """No generation of this identifier is running."""

    status = 404
    type = "invalid_request_error"
    code = "generation_not_found"

    def __init__(self, identifier: str) -> None:
        super().__init__(f"No generation {identifier!r} is running.", field="id")


class UnknownJob(WeftError):
    """The client has no job of this identifier; it may have expired."""

    status = 404
    type = "invalid_request_error"
    code = "prediction_not_found"

    def __init__(self, identifier: str) -> None:
        super().__init__(f"You have no prediction {identifier[:64]!r}.", field="id")


class UnknownResult(WeftError):
    """There is no image at this URL, or no longer; the message says what the reason may be."""

    status = 404
    type = "invalid_request_error"
    code = "result_not_found"

    def __init__(self, reason: str = "") -> None:
        super().__init__(f"There is no image at this URL{reason and f'; {reason}'}.")


class JobsOff(WeftError):
    """The operator has not turned on durable jobs."""

    status = 404
    type = "invalid_request_error"
    code = "predictions_off"

    def __init__(self) -> None:
        super().__init__(
            "This server keeps no predictions; the operator can turn them on with "
            "WEFT_JOBS__FOLDER. POST /v1/generate makes images without them."
        )


class CaptionsOff(WeftError):
    """An image should be described, but no model for that is hosted."""

    status = 404
    type = "invalid_request_error"
    code = "captions_off"

    def __init__(self) -> None:
        super().__init__("There is no model on this server that describes images.")


class ReusedKey(InvalidRequest):
    """An idempotency key was used before with another body."""

    code = "idempotency_key_reused"

    def __init__(self, key: str) -> None:
        super().__init__(
            "idempotency-key",
            f"idempotency-key is {key[:60]!r}, which was used with another body before; choose a "
            "new key for a new prediction.",
        )


class DuplicateGeneration(WeftError):
    """The identifier that the client chose is in use by a running generation."""

    status = 409
    type = "invalid_request_error"
    code = "duplicate_id"

    def __init__(self, identifier: str) -> None:
        message = (
            f"x-request-id is {identifier!r}, which a running generation uses; choose another."
        )
        super().__init__(message, field="x-request-id")


class ModelInUse(WeftError):
    """A model should be unloaded, but requests or live streams use it."""

    status = 409
    type = "invalid_request_error"
    code = "model_in_use"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Model {name!r} is in use, so it is not unloaded; ask again once its requests and "
            "live streams have ended."
        )


class Cancelled(WeftError):
    """The client cancelled the generation."""

    status = 409
    type = "cancelled"
    code = "cancelled"

    def __init__(self, message: str = "The generation was cancelled.") -> None:
        super().__init__(message)


class Overloaded(WeftError):
    """The queue is full; room is expected after `retry_after_s` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, retry_after_s: float, message: str | None = None) -> None:
        super().__init__(message or f"The queue is full; try again in {retry_after_s:.0f} s.")
        self.retry_after_s = retry_after_s


class NotReady(WeftError):
    """The server is loading, draining or broken, and accepts no work now."""

    status = 503
    type = "server_error"
    code = "not_ready"

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeviceLost(NotReady):
    """The device no longer answers; the process ends, and its supervisor restarts it."""

    code = "device_lost"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The server's device failed and it must restart: {reason}", retry_after_s=60
        )


class JobsUnavailable(NotReady):
    """The database of durable jobs cannot be reached, or cannot store anything."""

    code = "predictions_unavailable"

    def __init__(self) -> None:
        super().__init__("The database of durable jobs cannot be used now; try again later.")


class ModelMismatch(WeftError):
    """This server cannot host a model folder; the message says why."""

    code = "model_mismatch"


class ModelTooLarge(WeftError):
    """The memory cannot hold a model, whatever else is unloaded."""

    status = 507
    code = "model_too_large"

    def __init__(self, message: str) -> None:
        super().__init__(message, field="model")

    @classmethod
    def on_host(cls, name: str, needed: int, free: int) -> Self:
        """The error for a model whose weights are kept in host memory beside a GPU."""
        return cls(
            f"Model {name!r} needs {needed} bytes of host memory for weights that do not fit on "
            f"the device; {free} bytes are free."
        )


class BindError(WeftError):
    """The address or port that the server was told to listen on cannot be used."""

    code = "cannot_listen"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message, field=field)


class AdapterMismatch(WeftError):
    """An adapter cannot be used with a model; the message says why."""

    code = "adapter_mismatch"


class ControlMismatch(WeftError):
    """A ControlNet cannot be used with a model; the message says why."""

    code = "control_mismatch"


class EmbeddingMismatch(WeftError):
    """An embedding cannot be used with a model; the message says why."""

    code = "embedding_mismatch"


class ImagePromptMismatch(WeftError):
    """An IP-Adapter cannot be used with a model; the message says why."""

    code = "image_prompt_mismatch"


class RowFailed(WeftError):
    """One image failed (NaN, out of memory); the others are unaffected."""

    code = "image_failed"


class OutOfMemory(RowFailed):
    """There was not enough memory for one image; others may have had it."""

    def __init__(self) -> None:
        super().__init__(
            "There was not enough memory for this image; ask for a smaller width or height."
        )


def failed_with(part: str, error: BaseException) -> str:
    """The sentence that a client gets if a part, which a package may define, fails.

    Args:
        part: name of the part, as the beginning of a sentence.
        error: error of the part; its text may contain what clients must not read.
    """
    return f"{part} failed with {type(error).__name__}; the server's log has the details."
