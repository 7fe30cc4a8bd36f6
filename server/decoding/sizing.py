"""The size that an uploaded picture is resampled to, and how; needs nothing but Pillow."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

from PIL import Image, ImageOps
from PIL.Image import Resampling

__all__ = ["Mode", "PictureTarget", "ResizeMode", "fit", "resize_to"]

ResizeMode = Literal["stretch", "crop", "fill"]
"""Treatment of other proportions: stretch the picture, crop it around its middle, or fit it in and
repeat its edges."""

Mode = ResizeMode | Literal["middle"]
"""The resize modes, and the way in which CLIP's image encoders are given a picture."""


@dataclass(frozen=True, slots=True)
class PictureTarget:
    """The size that a picture is resampled to.

    Attributes:
        width: width in pixels; None to derive it from the picture's own proportions and size.
        height: height in pixels; None to derive it likewise.
        mode: treatment of other proportions; ``middle`` is for squares only.
        multiple: number of which derived sides become multiples.
        longest: maximum of derived sides; None for no limit.
        sizes: sizes (width and height) of which the picture gets the nearest to its proportions, if
            no side is given and the server's limit allows any; empty for any size.
        area: number of pixels for derived sides, however large the picture is; None for that of the
            picture.
        max_pixels: maximum number of pixels for derived sides, in addition to the server's limit;
            None for no such bound.
    """

    width: int | None = None
    height: int | None = None
    mode: Mode = "stretch"
    multiple: int = 1
    longest: int | None = None
    max_pixels: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    area: int | None = None

    def size_of(self, width: int, height: int, max_pixels: int) -> tuple[int, int]:
        """The size that a picture gets: given sides, and derived ones within the limits.

        Args:
            width: width of the picture.
            height: height of the picture.
            max_pixels: maximum number of pixels if a side is derived.
        """
        if self.width is not None and self.height is not None:
            return self.width, self.height
        sizes = [one for one in self.sizes if one[0] * one[1] <= max_pixels]
        if sizes and self.width is None and self.height is None:
            return min(sizes, key=lambda size: abs(width / height - size[0] / size[1]))
        if self.max_pixels is not None:
            max_pixels = min(max_pixels, self.max_pixels)
        if self.width is not None:
            most = max_pixels // self.width
            return self.width, self._side(height * self.width / width, most)
        if self.height is not None:
            most = max_pixels // self.height
            return self._side(width * self.height / height, most), self.height
        if self.area is not None:
            scale = sqrt(min(self.area, max_pixels) / (width * height))
            sides = width * scale, height * scale
            # Rounded as in diffusers, which may give a few pixels more than that; rounded down if
            # these are too many.
            down = tuple(side // self.multiple * self.multiple for side in sides)
            for wide, high in (sides, down):
                found = self._side(wide, max_pixels), self._side(high, max_pixels)
                if found[0] * found[1] <= max_pixels:
                    return found
        scale = min(1.0, sqrt(max_pixels / (width * height)))
        if self.longest is not None:
            scale = min(scale, self.longest / max(width, height))
        # The other side keeps room for at least one multiple, whatever the proportions.
        found = self._side(width * scale, max_pixels // self.multiple)
        return found, self._side(height * scale, max_pixels // found)

    def _side(self, wanted: float, most: int) -> int:
        """The multiple nearest to a side, at least one multiple and at most ``most``."""
        most = most if self.longest is None else min(most, self.longest)
        steps = min(round(wanted / self.multiple), most // self.multiple)
        return max(steps, 1) * self.multiple


def resize_to(image: Image.Image, target: PictureTarget, max_pixels: int) -> Image.Image:
    """Resample a picture to its target, but leave it if that has more than ``max_pixels``."""
    width, height = target.size_of(image.width, image.height, max_pixels)
    if target.mode == "middle":
        return _middle(image, width)
    if width * height > max_pixels:
        return image
    match target.mode:
        case "stretch":
            return fit(image, width, height)
        case "crop":
            return ImageOps.fit(image, (width, height), Resampling.LANCZOS)
        case "fill":
            return _filled(image, width, height)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resample an image to a size, if it has another."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Resampling.LANCZOS)


def _middle(image: Image.Image, side: int) -> Image.Image:
    """The square in the middle, cropped as by the CLIP image processor of transformers."""
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    resized = image.resize((width, height), Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return resized.crop((left, top, left + side, top + side))


def _filled(image: Image.Image, width: int, height: int) -> Image.Image:
    inner = ImageOps.contain(image, (width, height), Resampling.LANCZOS)
    left, top = (width - inner.width) // 2, (height - inner.height) // 2
    right, bottom = left + inner.width, top + inner.height
    filled = Image.new(image.mode, (width, height))
    filled.paste(inner, (left, top))
    # One of the two pairs of borders is empty.
    for border, edge in (
        ((0, 0, left, height), (left, 0, left + 1, height)),
        ((right, 0, width, height), (right - 1, 0, right, height)),
        ((0, 0, width, top), (0, top, width, top + 1)),
        ((0, bottom, width, height), (0, bottom - 1, width, bottom)),
    ):
        size = border[2] - border[0], border[3] - border[1]
        if all(size):
            filled.paste(filled.crop(edge).resize(size, Resampling.NEAREST), border[:2])
    return filled
