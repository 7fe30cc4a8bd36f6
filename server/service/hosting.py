"""Loads the models and starts the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from server.engine.engine import Engine
from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterMemory, AdapterShelf
from server.models.folder import adapters_folder, embedded_folders
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.settings import Settings

__all__ = ["Hosted", "host"]

log = logging.getLogger("weft")

Tell: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Hosted:
    """A running engine and the models it serves, the default one first."""

    engine: Engine
    models: Mapping[str, HostedModel]


def host(
    settings: Settings,
    on_failure: Callable[[], None] | None = None,
    guessed_costs: Mapping[int, float] | None = None,
    tell: Tell | None = None,
) -> Hosted:
    """Load the models and start the engine; takes seconds to minutes.

    Args:
        settings: everything that may be set.
        on_failure: called, in the engine's thread, once the engine can never work again.
        guessed_costs: seconds of a tick by rows, instead of those that are measured at the start.
        tell: called with what is being loaded, how much of it is done, and of how much, in MB.

    Raises:
        ModelMismatch: a folder does not hold a supported model.
    """
    embedded = embedded_folders()
    folders = settings.model_folders(embedded)
    if settings.models_folder is not None and folders == embedded:
        log.warning(
            "%s has no model folder with a model_index.json: only the embedded models are hosted",
            settings.models_folder,
        )
    models = {
        name: load_model(
            folder,
            name=name,
            device=settings.device,
            dtype=settings.dtype,
            tell=None if tell is None else partial(_in_megabytes, tell, f"loading {name} (MB)"),
        )
        for name, folder in folders.items()
    }
    _give_adapters(models, folders, settings)
    engine = Engine(
        models,
        row_budget=settings.row_budget,
        live_tick_s=settings.live_tick_s,
        deterministic=settings.deterministic,
        max_pending=settings.max_pending,
        on_failure=on_failure,
        guessed_costs=guessed_costs,
    )
    engine.start()
    return Hosted(engine, models)


def _give_adapters(
    models: Mapping[str, HostedModel], folders: Mapping[str, Path], settings: Settings
) -> None:
    """Let each model have the adapters of its own folder and of the server's."""
    memory = AdapterMemory(settings.adapter_bytes)
    shared = () if settings.adapters is None else (settings.adapters,)
    for name, model in models.items():
        target = Target.of(name, model.adaptable())
        places = (*shared, adapters_folder(folders[name]))
        model.adapters = AdapterShelf(places, target, memory, model.device, model.dtype)
        # Headers are read now, so that no request waits for all of them.
        if known := [file.name for file in model.adapters.available()]:
            log.info("%s: adapters %s", name, ", ".join(known))


def _in_megabytes(tell: Tell, stage: str, done: int, total: int) -> None:
    tell(stage, done // 2**20, total // 2**20)
