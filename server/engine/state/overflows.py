"""What did not fit into the device's memory even alone, so that as much is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final

from server.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BELIEVED_S", "Overflows"]

BELIEVED_S: Final = 60.0
"""Seconds for which as much is refused: others' images may have had the room, so it is tried again
now and then."""


@dataclass(frozen=True, slots=True)
class _Overflow:
    """One image, or one group of images, that ran out of memory.

    Attributes:
        width: in pixels.
        height: in pixels.
        rows: that its forward had; 1 where the autoencoder ran out of memory, which takes one
            picture at a time.
        free: bytes that there were for it.
        until: when it is believed no longer.
    """

    width: int
    height: int
    rows: int
    free: int
    until: float

    @property
    def pixels(self) -> int:
        """Of all rows: what a forward needs grows at least as fast."""
        return self.rows * self.width * self.height


class Overflows:
    """The smallest work of each model that lately did not fit into memory by itself.

    Args:
        now: seconds of a clock.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._of_models: dict[str, _Overflow] = {}

    def note(self, model: str, width: int, height: int, rows: int, free: int) -> None:
        """Some work did not fit, though it ran alone.

        Args:
            model: by name.
            width: of its images in pixels.
            height: of its images in pixels.
            rows: of its forward; 1 for the autoencoder.
            free: bytes that there were for it.
        """
        new = _Overflow(width, height, rows, free, self._now() + BELIEVED_S)
        known = self._believed(model)
        if known is None or new.pixels <= known.pixels:
            self._of_models[model] = new

    def check(self, model: str, width: int, height: int, rows: int) -> None:
        """Refuse work that is at least as large as what did not fit.

        Raises:
            InvalidRequest: with the field ``width``, or ``guidance`` where only the rows are too
                many.
        """
        known = self._believed(model)
        if known is None or rows * width * height < known.pixels:
            return
        megabytes = known.free / 2**20
        what = f"{known.width} x {known.height} pixels"
        if width * height < known.width * known.height:
            raise InvalidRequest(
                "guidance",
                f"guidance needs {rows} rows of {width} x {height} pixels in one forward pass; "
                f"{known.rows} of {what} did not fit into the {megabytes:.0f} MB of memory that "
                f"were free for model {model!r}, so ask for fewer branches or a smaller size.",
            )
        raise InvalidRequest(
            "width",
            f"width x height is {width} x {height}; an image of {what} did not fit into the "
            f"{megabytes:.0f} MB of memory that were free for model {model!r}, so ask for a "
            "smaller one.",
        )

    def forget(self, model: str | None = None) -> None:
        """Believe nothing any longer of a model, or of any: there may be more room now."""
        if model is None:
            self._of_models.clear()
        else:
            self._of_models.pop(model, None)

    def _believed(self, model: str) -> _Overflow | None:
        known = self._of_models.get(model)
        return known if known is not None and self._now() < known.until else None
