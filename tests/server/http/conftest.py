"""A browser for the tests of the page, and a server whose pictures show something."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import Settings
from tests.server.conftest import Running
from tests.server.http.browser import browsing

# It takes minutes, and what it imports half a second of each run; `make contract` runs it.
collect_ignore = [] if "CONTRACT_EXAMPLES" in os.environ else ["test_contract.py"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a browser's debugging port."""
    with browsing(tmp_path_factory.mktemp("browser")) as address:
        yield address


@pytest.fixture(scope="session")
def trained_image_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the server of the trained models, which sees new IP-Adapters at once."""
    return tmp_path_factory.mktemp("trained_image_prompts")


@pytest.fixture(scope="session")
def trained(trained_image_prompts: Path) -> Iterator[Running]:
    """A server of the models that ship with Weft, for what depends on what pictures show."""
    settings = Settings(row_budget=8, deterministic=True, image_prompts=trained_image_prompts)
    server = Running(settings)
    server.start()
    yield server
    server.stop()
