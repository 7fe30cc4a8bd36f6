"""Routes that accept bodies with any fields that AUTOMATIC1111's clients send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from typing_extensions import override

from server.http.body import JsonRoute
from server.requests.automatic1111_controlnet import is_controlnet, units_in

__all__ = ["ERRORS", "AutomaticError", "TolerantRoute"]


class AutomaticError(BaseModel):
    """The body of every error response of these routes."""

    error: str
    detail: str
    body: str
    errors: str


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": AutomaticError}
    for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 507)
}

UNITS: Final = "controlnet"

MANY_IMAGES: Final = "init_images after the first"


class TolerantRoute(JsonRoute):
    """A route that reads the fields it knows and ignores all others."""

    @override
    def narrowed(self, parsed: Any) -> Any:
        """Return the fields that the route knows; others may be large.

        Of a list of images only the first is kept, of the ControlNet script the enabled units, and
        of other scripts the names of those that would take effect.
        """
        if not isinstance(parsed, dict):
            return parsed
        annotation = getattr(getattr(self.body_field, "field_info", None), "annotation", None)
        known: Mapping[str, Any] = getattr(annotation, "model_fields", {})
        narrow = {name: value for name, value in parsed.items() if name in known}
        asked = parsed.get("alwayson_scripts")
        narrow.pop(UNITS, None)
        if UNITS in known and (units := units_in(asked)):
            narrow[UNITS] = units
        scripts = _acting(asked)
        if isinstance(images := narrow.get("init_images"), list):
            narrow["init_images"] = images[0] if images else None
            scripts += [MANY_IMAGES] if len(images) > 1 else []
        return narrow | {"scripts": scripts} if scripts else narrow


def _acting(scripts: Any) -> list[str]:
    """Return the names of the scripts that are not disabled by their arguments."""
    if not isinstance(scripts, dict):
        return []
    acting: list[str] = []
    for name, script in scripts.items():
        if is_controlnet(name):
            continue
        arguments = script.get("args") if isinstance(script, dict) else script
        first = arguments[0] if isinstance(arguments, list) and arguments else arguments
        if first and not (isinstance(first, dict) and first.get("enabled") is False):
            acting.append(str(name)[:60])
    return acting[:8]
