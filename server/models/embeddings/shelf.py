"""The embeddings available to a model's prompts: found in folders, loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from server.errors import EmbeddingMismatch
from server.models.embeddings.embedding import Embedding
from server.models.embeddings.embedding_file import EmbeddingFile, EmbeddingTarget
from server.models.embeddings.naming import named
from server.models.folder import stamp_of
from server.models.weight_shelf import WeightShelf

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from server.models.weight_memory import WeightMemory

__all__ = ["EmbeddingShelf"]


class EmbeddingShelf(WeightShelf[EmbeddingFile, Embedding, EmbeddingTarget]):
    """The embeddings that fit one model, files ``NAME.safetensors``; see :class:`WeightShelf`.

    Args:
        folders: folders that hold the files.
        target: the model's text encoders.
        memory: keeps loaded embeddings.
        device: device of the model.
        dtype: dtype of its weights.
    """

    what = "embedding"
    asked = "embeddings"
    ending = ".safetensors"
    mismatch = EmbeddingMismatch

    def __init__(
        self,
        folders: Sequence[Path],
        target: EmbeddingTarget,
        memory: WeightMemory[Embedding],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        wanted = target if target.widths else None
        super().__init__(folders, target.model, wanted, memory, device, dtype)

    def named_in(self, *texts: str) -> tuple[EmbeddingFile, ...]:
        """Embeddings that occur in the texts and fit the model, each once."""
        outcomes = self._outcomes_in(texts)
        return tuple(one for one in outcomes.values() if not isinstance(one, str))

    def unfit_in(self, *texts: str) -> Mapping[str, str]:
        """Embeddings that occur in the texts and cannot be used: a sentence of why, by name."""
        return {name: one for name, one in self._outcomes_in(texts).items() if isinstance(one, str)}

    @override
    def _is_one(self, path: Path) -> bool:
        return path.is_file()

    @override
    def _stamp(self, path: Path) -> tuple[int, int]:
        return stamp_of(path)

    @override
    def _understood(self, name: str, path: Path, wanted: EmbeddingTarget) -> EmbeddingFile:
        return EmbeddingFile.read(name, path, wanted)

    def _outcomes_in(self, texts: Sequence[str]) -> dict[str, EmbeddingFile | str]:
        places = self._places()
        names = sorted({name for entries in places for name in entries})
        found = dict.fromkeys(name for text in texts for name in named(text, names))
        paths = {name: self._chosen(name, places) for name in found}
        return {name: self._outcome(name, path) for name, path in paths.items() if path}
