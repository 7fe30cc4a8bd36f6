"""A picture in a request, which is large and therefore released as soon as it is decoded."""

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
    """A picture as base64, a base64 data URI or a file, which can be read once.

    A request is kept until its images are made, and would otherwise keep megabytes with it.

    Args:
        data: data as sent: text in JSON, bytes in a form.
        released: function that is called when the data is no longer held.
        form: for a mask, how it marks what is repainted.
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
        """Move the data to a new upload that is decoded as a mask.

        Args:
            form: how the mask marks what is repainted.

        Raises:
            ValueError: it was handed out before.
        """
        mask = Upload(self._taken(), self._released, form)
        self._released = lambda: None
        return mask

    def copied(self, form: MaskForm | None = None) -> Upload:
        """Return another upload with the same data; both can be decoded.

        Args:
            form: how it marks what is repainted, if it is decoded as a mask.

        Raises:
            ValueError: it was handed out before.
        """
        self._data = data = self._taken()
        return Upload(data, form=form)

    @contextmanager
    def opened(self) -> Generator[str | bytes]:
        """Give access to the data in a `with` block, after which it is released.

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
    """Yield the pictures of a request, each with its dotted path.

    Args:
        value: request, or a part of it.
        path: path of that part.
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
    """Return parsed JSON without the fields that were replaced by uploads."""
    if isinstance(value, list):
        # Keeps the place for :func:`put_upload`.
        return [None if isinstance(one, Upload) else without_uploads(one) for one in value]
    if isinstance(value, dict):
        return {k: without_uploads(one) for k, one in value.items() if not isinstance(one, Upload)}
    return value


def put_upload(fields: dict[str, Any], path: str, data: str) -> None:
    """Put a picture back to its place in parsed JSON; reverses :func:`without_uploads`.

    Args:
        fields: JSON, changed in place.
        path: path as in :func:`uploads_in`.
        data: picture in base64.
    """
    *above, name = path.split(".")
    inner: Any = fields
    for step in above:
        # A field that takes a list may also hold a single picture.
        inner = inner[int(step)] if isinstance(inner, list) else inner.setdefault(step, [None])
    inner[int(name) if isinstance(inner, list) else name] = data
