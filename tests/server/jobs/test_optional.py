"""Durable jobs are an extra: a server without them needs none of its packages."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
from pathlib import Path

import pytest
from pydantic import ValidationError

import server
from server import settings
from server.errors import NotReady
from server.jobs.jobs import Jobs
from server.service.service import Service
from server.settings import JobSettings, Limits, Settings

ROOT = Path(server.__file__).parent
WITHOUT = {"server.jobs.job"}
"""What other packages import from it."""
LATER = {"http/predictions/events.py"}
"""Imported only when jobs are on."""


def imported_at_once(path: Path) -> set[str]:
    """Modules that are imported with a module, except those only for type checkers."""
    body = ast.parse(path.read_text()).body
    return {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}


def test_a_server_without_jobs_imports_nothing_of_theirs() -> None:
    for path in ROOT.rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name.startswith("jobs/") or name in LATER:
            continue
        of_jobs = {module for module in imported_at_once(path) if module.startswith("server.jobs")}
        assert of_jobs <= WITHOUT, path
    assert not {m for m in imported_at_once(ROOT / "jobs/job.py") if m.startswith("sqlalchemy")}


@pytest.mark.parametrize(
    ("lacking", "given", "extra"),
    [
        ("alembic", {"folder": "/x"}, "jobs"),
        ("psycopg", {"folder": "/x", "database": "postgresql://h/n"}, "postgresql"),
    ],
)
def test_what_to_install_is_said(
    monkeypatch: pytest.MonkeyPatch, lacking: str, given: dict[str, str], extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == lacking else find(name))
    with pytest.raises(ValidationError, match=rf"pip install 'weft\[{extra}\]'"):
        JobSettings.model_validate(given)
    assert not JobSettings().on


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"database": "mysql://h/n", "folder": "/x"}, "begins with postgresql://"),
        ({"database": "postgresql://h/n"}, "set pictures"),
        ({"database": "postgresql://u:pass@word@h/n", "pictures": "/x"}, "write it as %40"),
        ({"database": "postgresql://u:pass@wo:rd@h/n", "pictures": "/x"}, "write it as %40"),
        ({"webhook_secret": "correct horse battery staple"}, "whsec_"),
        ({"webhook_secret": "whsec_c2hvcnQ="}, "24 to 64 bytes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        JobSettings.model_validate(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"database": "postgresql://u:secret@127.0.0.1:1/x", "pictures": "/x"}, "refused"),
        ({"folder": __file__}, "File exists"),
        ({"folder": "HERE", "pictures": "nothing://x"}, "nothing"),
    ],
)
def test_places_that_cannot_be_used_are_named_at_the_start(
    tmp_path: Path, given: dict[str, str], said: str
) -> None:
    found = JobSettings.model_validate(given)
    if found.folder == Path("HERE"):
        found = found.model_copy(update={"folder": tmp_path})
    service = Service(Limits())
    jobs = Jobs(Settings(jobs=found), service, lambda _: b"")
    with pytest.raises(NotReady, match=said) as refusal:
        asyncio.run(jobs.open())
    assert "secret" not in refusal.value.message
    service.close()
