"""The pages compared with the code that they describe: fields, routes, names, errors, links."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from server.errors import (
    AdapterMismatch,
    BindError,
    ControlMismatch,
    EmbeddingMismatch,
    ImagePromptMismatch,
    WeftError,
)
from server.http.app import create_app
from server.http.native.answers import GenerateResponse, QueuedEvent
from server.requests.catalog import catalog
from server.requests.schema import GenerateRequest
from server.requests.stream_schema import StreamSettings
from server.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    + [page for folder in ("embedded", "examples") for page in (ROOT / folder).rglob("*.md")]
)
NOT_OF_REQUESTS = (
    AdapterMismatch,
    BindError,
    ControlMismatch,
    EmbeddingMismatch,
    ImagePromptMismatch,
)
"""Errors that only the operator sees; requests are answered with other errors instead."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def unnamed(names: Iterable[str], page: str) -> set[str]:
    """The names that a page does not contain in backticks."""
    return set(names) - set(re.findall(r"`([^`\s]+)`", text_of(page)))


@pytest.mark.parametrize(
    ("model", "page"),
    [
        (GenerateRequest, "docs/requests.md"),
        (GenerateResponse, "docs/requests.md"),
        (QueuedEvent, "docs/requests.md"),
        (StreamSettings, "docs/streaming.md"),
    ],
)
def test_a_page_names_every_field(model: type[BaseModel], page: str) -> None:
    assert unnamed(model.model_fields, page) == set()


def test_the_readme_names_everything_that_a_request_can_choose() -> None:
    listed = catalog()
    names = {entry.name for choice in listed.choices for entry in getattr(listed, choice.entries)}
    assert len(names) > 60
    assert unnamed(names, "README.md") == set()


@pytest.fixture(scope="module")
def paths() -> dict[str, Any]:
    """The routes of the application's own schema."""
    return create_app(Settings()).openapi()["paths"]


def test_every_route_is_on_a_page(paths: dict[str, Any]) -> None:
    pages = "\n".join(page.read_text("utf-8") for page in PAGES)
    assert len(paths) > 40
    # A page about routes below one path gives that path once, and then only their last parts.
    short = re.compile(r"/(?:sdapi/v1|controlnet)/(.+)")
    names = [short.sub(r"`\1`", path.partition("/{")[0]) for path in paths]
    assert [name for name in names if name not in pages] == []


def kinds_of(error: type[WeftError]) -> Iterator[type[WeftError]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds_of(kind)


def test_the_page_of_requests_has_every_error_with_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", text_of("docs/requests.md"), re.MULTILINE)
    told = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    raised = {
        (kind.status, kind.code)
        for kind in kinds_of(WeftError)
        if kind not in NOT_OF_REQUESTS and kind.__module__ == WeftError.__module__
    }
    assert raised | {(404, "not_found"), (405, "method_not_allowed")} == told


def test_the_schema_of_a_request_has_the_errors_of_its_headers(paths: dict[str, Any]) -> None:
    answers = paths["/v1/generate"]["post"]["responses"]
    assert {"401", "403", "406", "408", "415"} <= set(answers)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub derives from the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


def test_every_link_of_a_page_leads_somewhere() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        targets: list[str] = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
        for target in map("".join, targets):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            named = (page.parent / path) if path else page
            assert named.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in anchors_of(named), f"{page}: {target}"
