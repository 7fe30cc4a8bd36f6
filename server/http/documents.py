"""`/` and `/docs`: pages of the package, which load nothing from other sites."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from server.models.folder import stamp_of

__all__ = ["PATHS", "WEB", "router"]

WEB: Final = Path(__file__).parents[1] / "web"

FRAMED_BY_NOBODY: Final = "frame-ancestors 'none'"
PAGE_POLICY: Final = (
    "default-src 'self'; img-src 'self' data: blob:{images}; connect-src 'self'{images}; "
    + FRAMED_BY_NOBODY
)
"""Content security policy of the page; `{images}` is the origin of images at URLs, if it differs
from the page's."""

DOCS_POLICY: Final = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    + FRAMED_BY_NOBODY
)

DOCUMENTS: Final = {
    "/": ("index.html", PAGE_POLICY),
    **{
        f"/page/{file.name}": (f"page/{file.name}", PAGE_POLICY)
        for file in sorted((WEB / "page").iterdir())
    },
    "/docs": ("docs/index.html", DOCS_POLICY),
    "/docs/start.js": ("docs/start.js", DOCS_POLICY),
    "/docs/swagger-ui.css": ("docs/swagger-ui.css", DOCS_POLICY),
    "/docs/swagger-ui-bundle.js": ("docs/swagger-ui-bundle.js", DOCS_POLICY),
}
"""For each path, its file below `WEB` and its content security policy."""

PATHS: Final = frozenset(DOCUMENTS)

router = APIRouter(include_in_schema=False)


def _serve(path: str, name: str, policy: str) -> None:
    @router.get(path)
    async def document(request: Request) -> Response:
        base_url = request.app.state.settings.results.base_url
        images = "" if base_url is None else f" {_origin_of(base_url)}"
        allowed = policy.replace("{images}", images)
        # A browser that cached the page for some time would keep its old policy and scripts too.
        headers = {
            "content-security-policy": allowed,
            "cache-control": "no-cache",
            "etag": _etag_of(WEB / name, allowed),
        }
        if request.headers.get("if-none-match") == headers["etag"]:
            # Not starlette's response, which lacks the policy: browsers update their cached headers
            # from any that a 304 has.
            return Response(status_code=304, headers=headers)
        return FileResponse(WEB / name, headers=headers)


def _etag_of(file: Path, policy: str) -> str:
    """Return an ETag that also depends on the policy, which the browser caches with the file."""
    stamp = *stamp_of(file), policy
    return f'"{sha256(repr(stamp).encode()).hexdigest()[:32]}"'


def _origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


for _path, (_name, _policy) in DOCUMENTS.items():
    _serve(_path, _name, _policy)
