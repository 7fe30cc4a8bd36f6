"""The text of a picture in a request: large, and so let go of as soon as it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

__all__ = ["Upload"]


class Upload:
    """Base64, or a data URI of it, that is handed out once.

    A request is kept until its images are made, and would keep megabytes of text with it.

    Args:
        text: as it was sent.
        released: called when the text is no longer held.
    """

    def __init__(self, text: str, released: Callable[[], None] = lambda: None) -> None:
        self._text: str | None = text
        self._released = released

    @contextmanager
    def opened(self) -> Generator[str]:
        """The text, which is gone afterwards.

        Raises:
            ValueError: it was handed out before.
        """
        text, self._text = self._text, None
        if text is None:
            raise ValueError("the upload was opened before")
        try:
            yield text
        finally:
            self._released()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def upload(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Upload:
            return value if isinstance(value, Upload) else cls(validate(value))

        return core_schema.no_info_wrap_validator_function(upload, core_schema.str_schema())
