"""Reading of bodies for durable jobs, whose pictures are nested in `input`."""

from __future__ import annotations

import json
from typing import Any, Final

from fastapi import Request
from typing_extensions import override

from server.http.body import JsonRoute, Share, uploads_of
from server.requests.schema import GenerateRequest
from server.requests.upload import without_uploads

__all__ = ["PredictionRoute", "sent_input"]

UPLOADS: Final = uploads_of(GenerateRequest)


class PredictionRoute(JsonRoute):
    """A route that keeps `input` as it was sent, to be validated again when the job begins."""

    counted = False

    @override
    async def read(self, request: Request, uploads: frozenset[str], share: Share) -> Any:
        """Read the body like :meth:`JsonRoute.read`, and keep its `input`."""
        parsed = await super().read(request, uploads, share)
        if isinstance(parsed, dict) and isinstance(given := parsed.get("input"), dict):
            # As text, since validation may modify the parsed object.
            request.state.sent_input = json.dumps(without_uploads(given))
        return parsed

    @override
    def take_uploads(
        self, parsed: Any, uploads: frozenset[str], share: Share, path: tuple[str, ...] = ()
    ) -> None:
        """Check the shape of the body, and replace the pictures of `input` by uploads."""
        if not isinstance(parsed, dict):
            super().take_uploads(parsed, frozenset(), share)
            return
        super().take_uploads({**parsed, "input": None}, frozenset(), share)
        super().take_uploads(parsed.get("input"), UPLOADS, share, ("input",))


def sent_input(request: Request) -> dict[str, Any]:
    """Return the fields of `input` as they were sent, without its pictures."""
    return json.loads(request.state.sent_input)
