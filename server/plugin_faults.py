"""What plug-ins do at fault beside raising errors, which an engine or a server must survive."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from server.errors import WeftError, failed_with

__all__ = ["containing_exits"]

log = logging.getLogger(__name__)


@contextmanager
def containing_exits() -> Generator[None]:
    """Have a plug-in that exits fail its own request, where it would end a thread or the server.

    Raises:
        WeftError: `SystemExit` was raised inside.
    """
    try:
        yield
    except SystemExit as error:
        log.exception("a plug-in failed")
        raise WeftError(failed_with("A plug-in", error)) from error
