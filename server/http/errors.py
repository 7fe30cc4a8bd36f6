"""HTTP responses for errors, in the format that OpenAI's clients read too."""

from __future__ import annotations

import math
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from server.errors import (
    InvalidRequest,
    NotReady,
    Overloaded,
    TooLarge,
    Unauthorized,
    WeftError,
)
from server.http.headers import set_security_headers
from server.requests.messages import explain

__all__ = ["AUTOMATIC1111", "CHALLENGE", "ErrorBody", "answer", "body_of", "install"]


OPENAI_IMAGES: Final = "/v1/images/"
"""Below this path an invalid value has the status 400, as in OpenAI's API."""

AUTOMATIC1111: Final = ("/sdapi/", "/internal/", "/controlnet/")
"""Below these paths errors have AUTOMATIC1111's format."""


CHALLENGE: Final = 'Basic realm="weft"'
"""Authentication challenge for AUTOMATIC1111's clients, which send a key as a password; the realm
is required (RFC 7617)."""


class ErrorDetail(BaseModel):
    """What went wrong, and in which field."""

    message: str = Field(
        description="One sentence that names the field, its value and what is allowed."
    )
    type: str = Field(description="The kind of error.")
    param: str | None = Field(description="Dotted path of the field, such as `guidance.scale`.")
    code: str = Field(description="A stable identifier for programs.")


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


def body_of(error: Exception) -> dict[str, Any]:
    """Return the JSON body for an error; an unexpected error reveals no details."""
    if not isinstance(error, WeftError):
        error = WeftError("An unexpected error occurred; the server's log has the details.")
    detail = ErrorDetail(
        message=_encodable(error.message),
        type=error.type,
        param=None if error.field is None else _encodable(error.field),
        code=error.code,
    )
    return ErrorBody(error=detail).model_dump()


def answer(error: Exception, path: str = "") -> JSONResponse:
    """Return the HTTP response for an error, in the format that clients of a path expect."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | NotReady):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = CHALLENGE if path.startswith(AUTOMATIC1111) else "Bearer"
    status = error.status if isinstance(error, WeftError) else WeftError.status
    if path.startswith(OPENAI_IMAGES) and status == InvalidRequest.status:
        status = 400
    return JSONResponse(_in_form_of(path, body_of(error)), status, headers)


def _in_form_of(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if not path.startswith(AUTOMATIC1111):
        return body
    detail = body["error"]
    return {
        "error": detail["code"],
        "detail": detail["message"],
        "body": "",
        "errors": detail["message"],
    }


def install(app: FastAPI) -> None:
    """Make `app` answer every error in this format."""

    @app.exception_handler(WeftError)
    async def _ours(request: Request, error: WeftError) -> JSONResponse:
        return answer(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        refusal = explain(error.errors(), _body_model(request), within=1)
        return answer(refusal, request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return _of_http(request, error)

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        # This response is made outside of all other middleware.
        response = answer(error, request.url.path)
        response.headers["x-request-id"] = request.state.request_id
        set_security_headers(response.headers)
        return response


def _body_model(request: Request) -> type[BaseModel] | None:
    body_field = getattr(request.scope.get("route"), "body_field", None)
    annotation = getattr(getattr(body_field, "field_info", None), "annotation", None)
    return annotation if isinstance(annotation, type) else None


def _of_http(request: Request, error: HTTPException) -> JSONResponse:
    if error.status_code == TooLarge.status:
        max_bytes = request.app.state.settings.limits.body_bytes
        return answer(TooLarge.body(max_bytes), request.url.path)
    sentences = {
        400: "The body cannot be read as JSON.",
        404: f"There is nothing at {request.url.path}.",
        405: f"{request.url.path} does not accept {request.method}.",
    }
    message = sentences.get(error.status_code, f"{error.detail}.")
    body = body_of(InvalidRequest(None, message))
    body["error"]["code"] = error.detail.lower().replace(" ", "_")
    body = _in_form_of(request.url.path, body)
    return JSONResponse(body, error.status_code, dict(error.headers or {}))


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
