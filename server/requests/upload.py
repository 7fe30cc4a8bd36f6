"""A picture in a request: large, and so let go of as soon as it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from server.decoding.picture import MaskForm

__all__ = ["Upload", "put_upload", "uploads_in", "without_uploads"]


class Upload:
    """Base64 or a data URI of it, or a file, that is handed out once.

    A request is kept until its images are made, and would keep megabytes with it.

    Args:
        data: as it was sent: text in JSON, bytes in a form.
        released: called when the data is no longer held.
        form: of a mask, how it says what is repainted.
    """

    def __init__(
        self,
        data: str | bytes,
        released: Callable[[], None] = lambda: None,
        form: MaskForm | None = None,
    ) -> None:
        self.form = form
        self._data: str | bytes | None = data
        self._released = released

    def as_mask(self, form: MaskForm) -> Upload:
        """The same data, to be decoded as a mask; this one is left with nothing.

        Args:
            form: how it says what is repainted.

        Raises:
            ValueError: it was handed out before.
        """
        mask = Upload(self._taken(), self._released, form)
        self._released = lambda: None
        return mask

    def copied(self, form: MaskForm | None = None) -> Upload:
        """The same data once more, to be decoded beside this picture.

        Args:
            form: how it says what is repainted, if it is decoded as a mask.

        Raises:
            ValueError: it was handed out before.
        """
        self._data = data = self._taken()
        return Upload(data, form=form)

    @contextmanager
    def opened(self) -> Generator[str | bytes]:
        """The data, which is gone afterwards.

        Raises:
            ValueError: it was handed out before.
        """
        data = self._taken()
        try:
            yield data
        finally:
            self._released()

    def _taken(self) -> str | bytes:
        data, self._data = self._data, None
        if data is None:
            raise ValueError("the upload was opened before")
        return data

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def upload(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Upload:
            return value if isinstance(value, Upload) else cls(validate(value))

        return core_schema.no_info_wrap_validator_function(upload, core_schema.str_schema())


def uploads_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Upload]]:
    """The pictures of a request, each with its dotted path.

    Args:
        value: the request, or a part of it.
        path: of that part.
    """
    if isinstance(value, Upload):
        yield ".".join(path), value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from uploads_in(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from uploads_in(entry, (*path, str(index)))


def without_uploads(value: Any) -> Any:
    """Parsed JSON without the fields that were made uploads."""
    if isinstance(value, list):
        # What is put back has a place to go to.
        return [None if isinstance(one, Upload) else without_uploads(one) for one in value]
    if isinstance(value, dict):
        return {k: without_uploads(one) for k, one in value.items() if not isinstance(one, Upload)}
    return value


def put_upload(fields: dict[str, Any], path: str, data: str) -> None:
    """Put a picture back where it was in parsed JSON; the opposite of :func:`without_uploads`.

    Args:
        fields: the JSON, changed in place.
        path: as of :func:`uploads_in`.
        data: base64.
    """
    *above, name = path.split(".")
    inner: Any = fields
    for step in above:
        # A single picture, where a list of them may be.
        inner = inner[int(step)] if isinstance(inner, list) else inner.setdefault(step, [None])
    inner[int(name) if isinstance(inner, list) else name] = data
