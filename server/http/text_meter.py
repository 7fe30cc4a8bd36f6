"""Measurement of how much of a JSON body is not pictures, while it arrives."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["LONG_STRING", "QUOTES", "TEXT_BYTES", "TextMeter"]

TEXT_BYTES: Final = 128 * 2**10
"""Maximum bytes of a body besides its pictures: two prompts of maximum length, escaped, and some
room."""

QUOTES: Final = 8192
"""Maximum number of quotes in a body. Strings are scanned one by one, which takes microseconds
each."""

LONG_STRING: Final = 16 * 2**10
"""Bytes above which a string can only be a picture; no text of a request is longer."""

ESCAPE_EVERY: Final = 16
"""Minimum number of bytes per backslash in base64, which has them only before a slash or at the end
of a line."""

_INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


class TextMeter:
    """Counts the bytes outside of long base64 strings, however the JSON is split into chunks.

    A body of megabytes is cheap to parse if it consists of a few long base64 strings, and takes
    seconds if it consists of millions of fields or escapes. The meter distinguishes the two before
    the body is parsed.
    """

    def __init__(self) -> None:
        self.text = 0
        self._quotes = 0
        self._in_string = False
        self._after_backslash = False
        self._length = 0
        self._counted = 0
        self._backslashes = 0

    @property
    def too_costly(self) -> bool:
        """Whether there is more text than a request needs."""
        return self.text > TEXT_BYTES or self._quotes > QUOTES

    def feed(self, chunk: bytes) -> None:
        """Count the next bytes of the body; once it is too costly, the count is no longer exact."""
        self._quotes += chunk.count(b'"')
        if self.too_costly:
            self.text += len(chunk)
            return
        position = 0
        while position < len(chunk):
            advance = self._inside if self._in_string else self._outside
            position = advance(chunk, position)

    def _outside(self, chunk: bytes, start: int) -> int:
        quote = chunk.find(b'"', start)
        stop = len(chunk) if quote < 0 else quote + 1
        self.text += stop - start
        self._in_string = quote >= 0
        self._length = self._counted = self._backslashes = 0
        return stop

    def _inside(self, chunk: bytes, start: int) -> int:
        stop = self._end_of_string(chunk, start)
        closed = stop < len(chunk) and chunk[stop] == ord('"')
        self._after_backslash = stop < len(chunk) and not closed
        part = chunk[start : stop if closed else len(chunk)]
        self._length += len(part)
        self._backslashes += part.count(b"\\")
        if not part.isascii() or self._escaped_too_often():
            self._counted += len(part)
            self.text += len(part)
        if not closed:
            return len(chunk)
        if self._length <= LONG_STRING:
            self.text += self._length - self._counted
        self.text += 1
        self._in_string = False
        return stop + 1

    def _end_of_string(self, chunk: bytes, start: int) -> int:
        """Return the position of the closing quote or a final backslash, or the chunk's length."""
        if self._after_backslash:
            start += 1
        quote = chunk.find(b'"', start)
        quote = len(chunk) if quote < 0 else quote
        if chunk.find(b"\\", start, quote) < 0:
            return quote
        inside = _INSIDE.match(chunk, start)
        return start if inside is None else inside.end()

    def _escaped_too_often(self) -> bool:
        return self._length > LONG_STRING and self._backslashes * ESCAPE_EVERY > self._length
