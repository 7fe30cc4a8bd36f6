"""Faults of plug-ins other than ordinary exceptions, which the engine and the server survive."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from server.errors import WeftError, failed_with

__all__ = ["containing_exits"]

log = logging.getLogger(__name__)


@contextmanager
def containing_exits() -> Generator[None]:
    """Turn `SystemExit` raised by a plug-in into a failure of its own request.

    Otherwise it would end the engine's thread or the event loop.

    Raises:
        WeftError: `SystemExit` was raised inside.
    """
    try:
        yield
    except SystemExit as error:
        log.exception("a plug-in failed")
        raise WeftError(failed_with("A plug-in", error)) from error
