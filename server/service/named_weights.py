"""Weights that requests name besides their model, and where each hosted model finds them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from server.models.adapters.adapter import Adapter
from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterShelf
from server.models.controls.control import Control
from server.models.controls.shelf import ControlShelf
from server.models.embeddings.embedding import Embedding
from server.models.embeddings.shelf import EmbeddingShelf
from server.models.folder import (
    adapters_folder,
    controls_folder,
    embeddings_folder,
    image_prompts_folder,
)
from server.models.hosted import HostedModel
from server.models.image_prompts.shelf import ImagePromptShelf
from server.models.weight_memory import WeightMemory
from server.models.weight_shelf import WeightShelf
from server.settings import Settings

__all__ = ["NamedWeights"]

log = logging.getLogger("weft")

EMBEDDING_BYTES: Final = 64 * 2**20
"""Memory for loaded embeddings of all models: a hundred of the longest possible for Stable
Diffusion XL, in float32."""


class NamedWeights:
    """Adapters, embeddings, ControlNets and IP-Adapters, in memory that all models share.

    Args:
        settings: settings with the shared folders and the memory limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._adapters = WeightMemory[Adapter](settings.adapter_bytes, "adapters")
        self._embeddings = WeightMemory[Embedding](EMBEDDING_BYTES, "embeddings")
        self._controls = WeightMemory[Control](settings.control_bytes, "ControlNets")
        self._image_prompts = WeightMemory[Any](settings.image_prompt_bytes, "IP-Adapters")

    def give(self, model: HostedModel, folder: Path) -> None:
        """Let a model find the weights that requests name, in its own folder and the server's.

        Args:
            model: loaded model.
            folder: folder of the model.
        """
        name, settings, attention = model.facts.name, self._settings, model.image_attention
        own = model.device, model.dtype
        model.adapters = AdapterShelf(
            _places(settings.adapters, adapters_folder(folder)),
            Target.of(name, model.adaptable()),
            self._adapters,
            *own,
        )
        model.embeddings = EmbeddingShelf(
            _places(settings.embeddings, embeddings_folder(folder)),
            model.embedding_target(),
            self._embeddings,
            *own,
        )
        model.controls = ControlShelf(
            _places(settings.controls, controls_folder(folder)),
            name,
            model.control_kind,
            self._controls,
            *own,
        )
        model.image_prompts = ImagePromptShelf(
            _places(settings.image_prompts, image_prompts_folder(folder)),
            name,
            None if attention is None else attention.widths,
            self._image_prompts,
            *own,
        )
        for shelf in (model.adapters, model.embeddings, model.controls, model.image_prompts):
            _log_found(name, shelf)


def _places(shared: Path | None, own: Path) -> tuple[Path, ...]:
    """Folders to search; the model's own is last, and so takes precedence."""
    return (own,) if shared is None else (shared, own)


def _log_found(model: str, shelf: WeightShelf[Any, Any, Any]) -> None:
    # Reads all headers now, so that no request has to wait for it.
    if known := [one.name for one in shelf.available()]:
        log.info("%s: %ss %s", model, shelf.what, ", ".join(known))
