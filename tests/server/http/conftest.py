"""A browser for the tests of the page, and a server of trained models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import Settings
from tests.server.conftest import Running
from tests.server.http.browser import browsing

# It takes minutes, and its imports half a second of each run; `make contract` runs it.
collect_ignore = [] if "CONTRACT_EXAMPLES" in os.environ else ["test_contract.py"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a browser's debugging port."""
    with browsing(tmp_path_factory.mktemp("browser")) as address:
        yield address


@pytest.fixture(scope="session")
def trained_image_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The IP-Adapters folder of the server of trained models, which sees new files at once."""
    return tmp_path_factory.mktemp("trained_image_prompts")


@pytest.fixture(scope="session")
def trained(trained_image_prompts: Path) -> Iterator[Running]:
    """A server of the models that ship with Weft, for tests that depend on what pictures show."""
    settings = Settings(row_budget=8, deterministic=True, image_prompts=trained_image_prompts)
    server = Running(settings)
    server.start()
    yield server
    server.stop()
