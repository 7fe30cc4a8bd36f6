"""A browser for the tests of the page."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.server.http.browser import browsing

# It takes minutes, and what it imports half a second of each run; `make contract` runs it.
collect_ignore = [] if "CONTRACT_EXAMPLES" in os.environ else ["test_contract.py"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a browser's debugging port."""
    with browsing(tmp_path_factory.mktemp("browser")) as address:
        yield address
