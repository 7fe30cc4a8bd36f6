"""The IP-Adapters available to a model: found in folders by name, loaded on demand."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from server.errors import ImagePromptMismatch
from server.models.folder_cache import FolderCache
from server.models.image_prompts.encoder_folder import subfolders
from server.models.image_prompts.image_prompt import IPAdapter, Widths
from server.models.image_prompts.ip_adapter_file import (
    ENDING,
    IPAdapterFile,
    stamp_with_encoders,
)
from server.models.weight_shelf import WeightShelf

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from server.models.image_prompts.image_prompt import ImageEncoder
    from server.models.weight_memory import WeightMemory

__all__ = ["ImagePromptShelf"]


class ImagePromptShelf(WeightShelf[IPAdapterFile, IPAdapter, Widths]):
    """The IP-Adapters that fit one model, files ``NAME.safetensors``.

    The image encoders are folders beside the files. Each is loaded once for all its adapters, and
    kept in the same memory.
    """

    what = "IP-Adapter"
    asked = "image prompts"
    ending = ENDING
    mismatch = ImagePromptMismatch

    @override
    def check_together(self, found: Iterable[IPAdapterFile]) -> None:
        files = {one.path: one for one in found}.values()
        encoders = {one.encoder.path: one.encoder for one in files}.values()
        sizes = [one.own_bytes(self._dtype) for one in files]
        sizes += [one.nbytes(self._dtype) for one in encoders]
        if refusal := self._memory.never_together(sizes):
            raise self.mismatch(refusal)

    @override
    def load(self, name: str) -> IPAdapter:
        found = self.find(name)
        # Referenced here until the adapter references it, so that making room does not evict it.
        encoder = self._encoder_of(found)
        return self._memory.get(
            (self._model, found.path, found.stamp),
            found.own_bytes(self._dtype),
            lambda: found.load(self._device, self._dtype, encoder),
        )

    def _encoder_of(self, found: IPAdapterFile) -> ImageEncoder:
        memory: WeightMemory[Any] = self._memory
        return memory.get(
            (self._model, found.encoder.path, found.encoder.stamp),
            found.encoder.nbytes(self._dtype),
            lambda: found.load_encoder(self._device, self._dtype),
        )

    @cached_property
    def _subfolders(self) -> FolderCache[Sequence[Path]]:
        """Subfolders of the folders, each of which may hold an encoder."""
        return FolderCache(subfolders)

    def _is_one(self, path: Path) -> bool:
        return path.is_file()

    def _stamp(self, path: Path) -> tuple[int, int]:
        return stamp_with_encoders(path, self._subfolders.of(path.parent))

    def _understood(self, name: str, path: Path, wanted: Widths) -> IPAdapterFile:
        return IPAdapterFile.read(name, path, self._model, wanted)
