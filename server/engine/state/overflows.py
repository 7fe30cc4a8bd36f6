"""Work that did not fit into the device's memory even alone; work as large is refused."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final

from server.errors import DidNotFit

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OVERFLOW_EXPIRY_S", "Overflows"]

OVERFLOW_EXPIRY_S: Final = 60.0
"""Seconds for which work as large is refused. Then it is tried again, since others' images may have
taken the memory."""


@dataclass(frozen=True, slots=True)
class _Overflow:
    """One image, or one group of images, that ran out of memory.

    Attributes:
        width: width in pixels.
        height: height in pixels.
        rows: number of rows of its forward pass, with the share of ControlNets counted as rows;
            None if the autoencoder ran out of memory, which takes one picture at a time.
        free: bytes that were free for it.
        until: time from which it is ignored.
    """

    width: int
    height: int
    rows: int | None
    free: int
    until: float

    @property
    def pixels(self) -> int:
        """Pixels of all rows; the memory of a forward pass grows at least as fast."""
        return (self.rows or 1) * self.width * self.height


class Overflows:
    """The smallest work of each model that recently did not fit into memory by itself.

    Forward passes and the autoencoder are recorded separately, since neither says anything about
    the other.

    Args:
        now: clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._of_forwards: dict[str, _Overflow] = {}
        self._of_autoencoders: dict[str, _Overflow] = {}

    def note(self, model: str, width: int, height: int, rows: int | None, free: int) -> None:
        """Record work that did not fit although it ran alone.

        Args:
            model: name of the model.
            width: width of its images in pixels.
            height: height of its images in pixels.
            rows: number of rows of its forward pass, with the share of ControlNets counted as rows;
                None for the autoencoder.
            free: bytes that were free for it.
        """
        new = _Overflow(width, height, rows, free, self._now() + OVERFLOW_EXPIRY_S)
        of_models = self._of_autoencoders if rows is None else self._of_forwards
        known = self._believed(of_models.get(model))
        if known is None or new.pixels <= known.pixels:
            of_models[model] = new

    def knows(self, model: str) -> bool:
        """Whether any work of a model did not fit recently."""
        known = self._of_forwards.get(model), self._of_autoencoders.get(model)
        return any(self._believed(one) for one in known)

    def check(
        self, model: str, width: int, height: int, rows: int, *, refers: bool = False
    ) -> None:
        """Refuse work that is at least as large as work that did not fit.

        Args:
            model: name of the model.
            width: width of its images in pixels.
            height: height of its images in pixels.
            rows: number of rows of its forward pass, with everything read besides the images
                counted as rows.
            refers: whether that includes reference images.

        Raises:
            DidNotFit: with the field ``width``, with ``guidance`` if only the rows are too many, or
                with ``reference_images`` if these may be the cause.
        """
        forward = self._believed(self._of_forwards.get(model))
        picture = self._believed(self._of_autoencoders.get(model))
        if picture is not None and width * height >= picture.pixels:
            raise self._too_large(model, width, height, picture)
        if forward is None or rows * width * height < forward.pixels:
            return
        if refers or width * height < forward.width * forward.height:
            what = f"{forward.width} x {forward.height} pixels"
            field = "reference_images" if refers else "guidance"
            needs = f"{field} and guidance need as much as" if refers else f"{field} needs"
            instead = "fewer or smaller pictures, fewer branches" if refers else "fewer branches"
            raise DidNotFit(
                field,
                f"{needs} {rows} rows of {width} x {height} pixels in one forward pass; "
                f"{forward.rows} of {what} did not fit into the {_megabytes(forward)} of memory "
                f"that were free for model {model!r}, so ask for {instead} or a smaller size.",
                forward.until - self._now(),
            )
        raise self._too_large(model, width, height, forward)

    def forget(self, model: str | None = None) -> None:
        """Ignore what is known of a model, or of all: there may be more room now."""
        for known in (self._of_forwards, self._of_autoencoders):
            if model is None:
                known.clear()
            else:
                known.pop(model, None)

    def _believed(self, known: _Overflow | None) -> _Overflow | None:
        return known if known is not None and self._now() < known.until else None

    def _too_large(self, model: str, width: int, height: int, known: _Overflow) -> DidNotFit:
        return DidNotFit(
            "width",
            f"width x height is {width} x {height}; an image of {known.width} x {known.height} "
            f"pixels did not fit into the {_megabytes(known)} of memory that were free for model "
            f"{model!r}, so ask for a smaller one.",
            known.until - self._now(),
        )


def _megabytes(known: _Overflow) -> str:
    return f"{known.free / 2**20:.0f} MB"
