"""Images that clients fetch by URL for some time, in a folder or any storage of fsspec."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from server.errors import InvalidRequest, NotReady, UnknownResult
from server.image_codec import OutputFormat
from server.locked_folders import locked, remove_abandoned

if TYPE_CHECKING:
    from server.blobs import Blobs

__all__ = ["Kept", "Results"]

log = logging.getLogger("weft")

TEMPORARY: Final = "weft-results-"
STABLE_AGE_S: Final = 60.0
"""Age from which a temporary folder must have been locked by its server, if that still runs."""

RANDOM_BYTES: Final = 24
MAX_SLEEP_S: Final = 60.0
MIN_SLEEP_S: Final = 0.05

EXPIRED: Final = "it has expired"
MISSING: Final = (
    "it has not expired, so it was deleted to make room or when its server stopped, or another "
    "server made it that has no WEFT_RESULTS__PLACE in common with this one"
)
"""Reasons for which an image is not found."""

_NAME: Final = re.compile(r"([0-9a-f]{8})-[A-Za-z0-9_-]{32}\.(?:png|jpeg|webp)")


@dataclass(frozen=True, slots=True)
class Kept:
    """A stored image.

    Attributes:
        name: name of its file: the time at which it expires, and 192 random bits.
        owner: owner of the image.
        nbytes: bytes of its file.
        expires_at: Unix time from which it is not served.
    """

    name: str
    owner: str
    nbytes: int
    expires_at: int


class Results:
    """Images with names that nobody can guess.

    A name contains the time at which its image expires. Any server that reaches the place can
    therefore serve the image and delete it in time, without a database and without a secret.

    Args:
        place: path, or URL for fsspec; None for a temporary folder that ends with the process.
        keep_s: seconds for which an image is kept.
        max_bytes: maximum bytes of all images; beyond it, the oldest ones of the owner with the
            most are deleted.
    """

    def __init__(self, place: str | None, keep_s: float, max_bytes: int) -> None:
        self._place = place
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._opening = asyncio.Lock()
        self._blobs: Blobs | None = None
        # Oldest first.
        self._kept: dict[str, Kept] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self._discard: Callable[[], object] | None = None

    async def open(self) -> Blobs:
        """Open the storage; files of an earlier process are counted from here on.

        Raises:
            NotReady: the storage cannot be used.
        """
        async with self._opening:
            if self._blobs is not None:
                return self._blobs
            try:
                blobs = await asyncio.to_thread(_blobs_at, self._place or self._temporary())
                await blobs.create()
                left = await blobs.sizes()
            except (OSError, ImportError, ValueError) as error:
                raise NotReady(f"Images cannot be kept for URLs: {error}.") from error
            for name in sorted(left):
                # Includes unfinished files of processes that were killed.
                if (expires_at := _expiry_of(name.removesuffix(blobs.unfinished))) is not None:
                    self._kept[name] = Kept(name, "", left[name], expires_at)
            self._blobs = blobs
            self._watch()
            return blobs

    async def close(self) -> None:
        """Delete a temporary folder; images in another place are left for the next process."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._discard is not None:
            await asyncio.to_thread(self._discard)

    async def keep(
        self, owner: str, output_format: OutputFormat, files: Sequence[bytes]
    ) -> list[Kept]:
        """Store images.

        Args:
            owner: owner of the images; empty if there are no keys.
            output_format: format of the files.
            files: content of each image file.

        Raises:
            InvalidRequest: they are larger than the limit for all stored images.
            NotReady: they cannot be stored.
        """
        needed = sum(map(len, files))
        if needed > self._max_bytes:
            raise InvalidRequest(
                "response_format",
                f"response_format is 'url', but the images have {needed} bytes and at most "
                f"{self._max_bytes} are kept; ask for 'b64_json' or for fewer images.",
            )
        blobs = await self.open()
        expires_at = math.ceil(time.time() + self._keep_s)
        kept = [
            Kept(_new_name(expires_at, output_format), owner, len(file), expires_at)
            for file in files
        ]
        crowded_out = self._make_room(owner, needed)
        self._kept |= {one.name: one for one in kept}
        try:
            await blobs.delete(crowded_out)
            for one, file in zip(kept, files, strict=True):
                await blobs.write(one.name, file)
        except OSError as error:
            log.error("images could not be stored for their URLs: %s", error)
            await self._drop(one.name for one in kept)
            raise NotReady(
                "The images could not be stored; try again later, or ask for 'b64_json'."
            ) from None
        # Other requests may have needed the room while these were being written.
        await blobs.delete([one.name for one in kept if one.name not in self._kept])
        self._watch()
        return kept

    async def read(self, name: str) -> tuple[bytes, float]:
        """Read an image; also return the seconds for which it will be kept.

        Raises:
            UnknownResult: there is no image of this name, or no longer.
            NotReady: the storage cannot be read.
        """
        expires_at = _expiry_of(name)
        if expires_at is None:
            raise UnknownResult
        left_s = expires_at - time.time()
        if left_s <= 0:
            raise UnknownResult(EXPIRED)
        try:
            return await (await self.open()).read(name), left_s
        except FileNotFoundError:
            raise UnknownResult(MISSING) from None
        except OSError as error:
            # Without the file's name, which is all that its URL needs.
            log.error("an image could not be read for its URL: %s", error.strerror or error)
            raise NotReady("The image cannot be read now; try again later.") from None

    def _make_room(self, owner: str, needed: int) -> list[str]:
        """Forget as many images as it takes to store those of an owner, and return their names."""
        # Including what will be stored: otherwise others would make room for an owner that has most
        # by then.
        held = Counter({owner: needed})
        stored = Counter[str]()
        for one in self._kept.values():
            held[one.owner] += one.nbytes
            stored[one.owner] += 1
        forgotten: list[str] = []
        while held.total() > self._max_bytes:
            greediest = max(+stored, key=held.__getitem__)
            oldest = next(one for one in self._kept.values() if one.owner == greediest)
            del self._kept[oldest.name]
            held[greediest] -= oldest.nbytes
            stored[greediest] -= 1
            forgotten.append(oldest.name)
        return forgotten

    def _watch(self) -> None:
        if self._kept and (self._sweeping is None or self._sweeping.done()):
            self._sweeping = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        """Delete images as they expire, until none is left."""
        while self._kept:
            now = time.time()
            await self._drop([one.name for one in self._kept.values() if one.expires_at <= now])
            next_s = min((one.expires_at for one in self._kept.values()), default=now) - now
            await asyncio.sleep(min(max(next_s, MIN_SLEEP_S), MAX_SLEEP_S))

    async def _drop(self, names: Iterable[str]) -> None:
        gone = [name for name in names if self._kept.pop(name, None) is not None]
        try:
            await (await self.open()).delete(gone)
        except OSError as error:
            # Clients can no longer fetch them, and the next process deletes them.
            log.error("images that have expired could not be deleted: %s", error)

    def _temporary(self) -> str:
        # Removes temporary folders of servers that were killed.
        remove_abandoned(Path(tempfile.gettempdir()), TEMPORARY, older_than_s=STABLE_AGE_S)
        folder = tempfile.mkdtemp(prefix=TEMPORARY)
        held = ExitStack()
        held.enter_context(locked(Path(folder), wait=False))
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        # Also runs if nobody closes the storage.
        self._discard = weakref.finalize(self, held.close)
        return folder


def _blobs_at(place: str) -> Blobs:
    # Imported here: fsspec takes a moment to import, and most servers never need it.
    from server.blobs import Blobs

    return Blobs(place)


def _new_name(expires_at: int, output_format: OutputFormat) -> str:
    return f"{expires_at:08x}-{secrets.token_urlsafe(RANDOM_BYTES)}.{output_format}"


def _expiry_of(name: str) -> int | None:
    """Time at which an image of this name expires; None if it is no image's name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1], 16)
