"""`/` and `/docs`: pages from the package, which take nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import FileResponse

__all__ = ["PATHS", "WEB", "router"]

WEB: Final = Path(__file__).parents[1] / "web"

FRAMED_BY_NOBODY: Final = "frame-ancestors 'none'"
PAGE_POLICY: Final = f"default-src 'self'; img-src 'self' data: blob:; {FRAMED_BY_NOBODY}"
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
"""The file of each path below `WEB`, and what its page may load."""

PATHS: Final = frozenset(DOCUMENTS)

router = APIRouter(include_in_schema=False)


def _serve(path: str, name: str, policy: str) -> None:
    @router.api_route(path, methods=["GET", "HEAD"])
    async def document() -> FileResponse:
        return FileResponse(WEB / name, headers={"content-security-policy": policy})


for _path, (_name, _policy) in DOCUMENTS.items():
    _serve(_path, _name, _policy)
