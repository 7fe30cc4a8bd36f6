"""Loading of models, at start-up and on demand, and start of the engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple, TypeAlias

import torch

from server.engine.engine import Engine
from server.errors import ModelMismatch, ModelTooLarge
from server.heap import gc_paused
from server.lookup import Lookup
from server.models.checkpoint import converted
from server.models.compiling.compiler import BlockCompiler, missing_compiler
from server.models.compiling.model_blocks import compile_blocks
from server.models.folder import INDEX, embedded_folders, stamp_of
from server.models.given_autoencoder import add_tiny_autoencoder
from server.models.given_denoiser import DENOISERS, with_denoiser
from server.models.hosted import HostedModel
from server.models.hub import HubModel, fetch
from server.models.loading import choose_device, choose_dtype, family_of, load_model
from server.models.memory import HOST, attainable_bytes, measure
from server.models.placement import Placement, first_that_fits, options
from server.models.weight_files import FLOAT32, bytes_in_memory, bytes_on_host
from server.models.weights_held import bytes_of
from server.service.model_shelf import MemoryBudget, Source
from server.service.named_weights import NamedWeights
from server.settings import Settings

__all__ = ["Hosted", "host"]

log = logging.getLogger("weft")

SAME_PRODUCTS: Final = ("MKL_CBWR", "AVX2,STRICT")
"""Variable, read at MKL's first product, and its value, with which the bits of a row do not depend
on where the threads of a CPU split the batch."""

LOG_INTERVAL_S: Final = 10.0

OFFLOADED: Final = {
    "text": "its text encoders stay in host memory, block by block on the device as they run",
    "all": "its denoiser and text encoders stay in host memory, block by block on the device as "
    "they run, which is slow",
}

ProgressCallback: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Hosted:
    """A running engine, the loaded models with the default one first, and the source of others."""

    engine: Engine
    models: Mapping[str, HostedModel]
    source: Source


def host(
    settings: Settings,
    on_failure: Callable[[], None] | None = None,
    guessed_costs: Mapping[int, float] | None = None,
    on_progress: ProgressCallback | None = None,
) -> Hosted:
    """Load the models and start the engine; takes seconds to minutes.

    It loads the models that ``models`` names, as far as there is memory for them; if it names none,
    the first of ``models_folder``, or the embedded ones. All others wait for a request.

    Args:
        settings: settings of the operator.
        on_failure: function that is called in the engine's thread once the engine has failed for
            good.
        guessed_costs: seconds of a tick by number of rows, used instead of measuring them at
            start-up.
        on_progress: callback for progress, called with what is being loaded, how much of it is
            done, and of how much, in MB.

    Raises:
        ModelMismatch: a folder does not hold a supported model or may not be read, a model of the
            hub cannot be fetched, or the cache is needed and cannot be written to.
        ModelTooLarge: not even the first model fits in memory.
    """
    if settings.deterministic:
        os.environ.setdefault(*SAME_PRODUCTS)
    embedded = embedded_folders()
    places = settings.model_folders(embedded)
    if settings.models_folder is not None:
        _check_readable(settings.models_folder)
    _check_names(settings, places)
    with _cache_written_to(settings.cache.expanduser()):
        folders = {
            name: _folder_of(name, place, settings, on_progress) for name, place in places.items()
        }
    if settings.models_folder is not None and folders == embedded:
        log.warning(
            "%s has no model folder with a model_index.json: only the embedded models are hosted",
            settings.models_folder,
        )
    first = folders if folders == embedded else list(folders)[:1]
    named = settings.named_folders() or first
    source = _Folders(
        settings,
        folders,
        NamedWeights(settings),
        _compiler_of(settings),
    )
    models: dict[str, HostedModel] = {}
    for name in named:
        needed, room = source.bytes_of(name), source.room(sum(map(bytes_of, models.values())))
        on_host, host_free = source.bytes_on_host(name), source.host_free()
        if (needed > room.free or on_host > host_free) and models:
            log.warning("%s is loaded when a request names it: memory is short", name)
            continue
        if needed > room.free:
            raise ModelTooLarge(
                f"model {name!r} needs {needed} bytes for its weights; {room.free} bytes of memory "
                "are free for them."
            )
        if on_host > host_free:
            raise ModelTooLarge.on_host(name, on_host, host_free)
        report = (
            None
            if on_progress is None
            else partial(_in_megabytes, on_progress, f"loading {name} (MB)")
        )
        with gc_paused():
            models[name] = source.load_from_folder(name, report)
    engine = Engine(
        models,
        row_budget=settings.row_budget,
        live_tick_s=settings.live_tick_s,
        deterministic=settings.deterministic,
        cuda_graphs=settings.cuda_graphs == "auto",
        max_pending=settings.max_pending,
        max_pending_s=settings.max_pending_s,
        max_pending_bytes=settings.max_pending_bytes,
        on_failure=on_failure,
        guessed_costs=guessed_costs,
        max_bytes=settings.memory_bytes,
    )
    engine.start()
    return Hosted(engine, models, source)


class _Found(NamedTuple):
    """A model folder, and the time at which it was made in seconds of Unix time."""

    folder: Path
    created: int


@dataclass(slots=True, eq=False)
class _Folders:
    """Models in folders, as a source for the model shelf.

    Attributes:
        settings: settings with the device and the memory limits.
        first: folders that existed at start-up, by name.
        named: weights that requests name besides the model.
        compiler: compiler of blocks; a clause that says why there is none, or None if none is
            wanted.
        lookup: looks for the folders that there are.
    """

    settings: Settings
    first: Mapping[str, Path]
    named: NamedWeights
    compiler: BlockCompiler | str | None = None
    lookup: Lookup[Mapping[str, _Found]] = field(init=False)

    def __post_init__(self) -> None:
        before = {name: _Found(folder, 0) for name, folder in self.first.items()}
        self.lookup = Lookup(self._looked, before, "folders of models")

    def created(self) -> Mapping[str, int]:
        return {name: found.created for name, found in self.lookup.latest().items()}

    def needs(self, name: str) -> int:
        with self._told_to_clients(name):
            return self.bytes_of(name)

    def needs_on_host(self, name: str) -> int:
        with self._told_to_clients(name):
            return self.bytes_on_host(name)

    def host_free(self) -> int:
        return measure(torch.device(HOST)).free

    def room(self, loaded_bytes: int) -> MemoryBudget:
        free, max_bytes = measure(choose_device(self.settings.device))
        allowed = self.settings.memory_bytes
        return MemoryBudget(int(min(free, allowed - loaded_bytes)), int(min(max_bytes, allowed)))

    def load(self, name: str, on_progress: Callable[[int, int], None]) -> HostedModel:
        with self._told_to_clients(name):
            return self.load_from_folder(name, on_progress)

    def bytes_of(self, name: str) -> int:
        """Like :meth:`needs`, with a sentence for the operator if it is not a model."""
        return self._bytes_in(name, self.placement(name))

    def bytes_on_host(self, name: str) -> int:
        """Like :meth:`needs_on_host`, with a sentence for the operator if it is not a model."""
        device = choose_device(self.settings.device)
        if device.type == HOST:
            return 0
        dtype = choose_dtype(self.settings.dtype, device)
        return bytes_on_host(self._folder(name), dtype, self.placement(name))

    def placement(self, name: str) -> Placement:
        """Placement of a model: the first that fits by itself, of those that the operator allows.

        Raises:
            ModelMismatch: the operator's choice is not available on this device.
        """
        settings, device = self.settings, choose_device(self.settings.device)
        choices = options(settings.offload, settings.quantization_of(name), device)
        max_bytes = int(min(attainable_bytes(device), settings.memory_bytes))
        return first_that_fits(choices, partial(self._bytes_in, name), max_bytes)

    def _bytes_in(self, name: str, placement: Placement) -> int:
        dtype = choose_dtype(self.settings.dtype, choose_device(self.settings.device))
        return bytes_in_memory(self._folder(name), dtype, placement)

    def load_from_folder(
        self, name: str, on_progress: Callable[[int, int], None] | None
    ) -> HostedModel:
        """Load a model, with weights that requests may name, from its own folder and the server's.

        Raises:
            ModelMismatch: with a sentence for the operator that names the folder.
        """
        folder = self._folder(name)
        model = load_model(
            folder,
            name=name,
            device=self.settings.device,
            dtype=self.settings.dtype,
            placement=(placement := self.placement(name)),
            vae=(vae := self.settings.vae_of(name)),
            on_progress=on_progress,
        )
        log.info(
            "%s: attention by %s, memory format %s", name, model.attention, model.memory_format
        )
        if vae is not None:
            log.info("%s: autoencoder from %s", name, vae)
        if (tiny_vae := self.settings.tiny_vae_of(name)) is not None:
            add_tiny_autoencoder(model, tiny_vae)
            log.info("%s: tiny autoencoder from %s", name, tiny_vae)
        if (denoiser := self.settings.denoiser_of(name)) is not None:
            model.facts = replace(model.facts, given_denoiser=denoiser.stem)
        if model.gguf_types:
            log.info("%s: weights in blocks of a GGUF file: %s", name, ", ".join(model.gguf_types))
        if placement.offload != "none":
            log.info("%s: %s", name, OFFLOADED[placement.offload])
        if self.settings.compile:
            self._have_compiled(model)
        self.named.give(model, folder)
        return model

    def _have_compiled(self, model: HostedModel) -> None:
        if isinstance(self.compiler, str):
            model.runs_eager = self.compiler
        elif self.compiler is not None:
            compile_blocks(model, self.compiler)
        if model.runs_eager is not None:
            log.warning("%s: runs without compiled blocks: %s", model.facts.name, model.runs_eager)

    def _looked(self) -> Mapping[str, _Found]:
        return {
            name: _Found(folder, stamp_of(folder / INDEX)[0] // 10**9)
            for name, folder in self._folders().items()
        }

    def _folders(self) -> Mapping[str, Path]:
        """Folders from start-up that still exist, and new ones in the folder of models."""
        place = self.settings.models_folder
        # A named one stays; loading it fails with a description of what is wrong.
        named = self.settings.named_folders()
        first = {
            name: folder for name, folder in self.first.items() if name in named or folder.is_dir()
        }
        if place is None or not place.is_dir():
            return first
        found = {folder.name: folder for folder in self.settings.found_folders()}
        return {**found, **first}

    def _folder(self, name: str) -> Path:
        found = self.lookup.latest()
        if name not in found:
            raise ModelMismatch(f"Model {name!r} is no longer in the folder of models.")
        return found[name].folder

    @contextmanager
    def _told_to_clients(self, name: str) -> Generator[None]:
        """Log an error about a folder; raise it without the path, which clients must not see."""
        # Looked up before the folder is removed, which may be why it cannot be loaded.
        found = self.lookup.latest()
        folder = str(found[name].folder if name in found else name)
        try:
            yield
        except ModelMismatch as error:
            unforeseen = error.__cause__ is not None
            log.error("model %s cannot be loaded: %s", name, error, exc_info=unforeseen)
            if unforeseen:
                # An error of a library, whose text may name any file.
                sentence = f"Model {name!r} could not be loaded; the server's log says why."
                raise ModelMismatch(sentence) from None
            sentence = error.message.replace(f"model folder {folder!r}", f"model {name!r}")
            raise ModelMismatch(sentence.replace(folder, name)) from None


def _compiler_of(settings: Settings) -> BlockCompiler | str | None:
    """The compiler of blocks, the reason why there is none, or None if none is wanted."""
    if not settings.compile:
        return None
    if (lacking := missing_compiler()) is not None:
        return lacking
    folder = settings.cache.expanduser() / "compiled"
    try:
        return BlockCompiler(folder)
    except OSError as error:
        return f"the folder {str(folder)!r} cannot be written to: {error.strerror}"


def _check_readable(place: Path) -> None:
    """Log which model folders are left out because this process may not read them.

    Raises:
        ModelMismatch: the process may not read the folder that contains them.
    """
    user = os.geteuid()
    if not _may_look_into(place):
        raise ModelMismatch(
            f"models_folder is {str(place)!r}, which user {user}, as whom the server runs, may not "
            "read."
        )
    for folder in sorted(place.iterdir()):
        if _is_closed(folder):
            log.warning(
                "%s is left out: user %d, as whom the server runs, may not read it", folder, user
            )


def _is_closed(folder: Path) -> bool:
    """Whether a path is a folder that this process may not read, or a link to such a place."""
    try:
        return folder.is_dir() and not _may_look_into(folder)
    except PermissionError:
        return True


def _may_look_into(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=True)


def _check_names(settings: Settings, names: Collection[str]) -> None:
    """Refuse settings for unknown models, unless these may come into the folder later."""
    for setting, unknown in settings.unknown_models(names):
        sentence = f"{setting} names the model {unknown!r}; there are {', '.join(names)}."
        if settings.models_folder is None:
            raise ModelMismatch(sentence)
        log.warning("%s", sentence)


@contextmanager
def _cache_written_to(cache: Path) -> Generator[None]:
    """Raise an error that names the cache if it cannot be written to."""
    try:
        yield
    except OSError as error:
        place = Path(str(error.filename))
        if not (cache.is_relative_to(place) or place.is_relative_to(cache)):
            raise
        raise ModelMismatch(
            f"cache is {str(cache)!r}, which cannot be written to: {error.strerror}."
        ) from None


def _folder_of(
    name: str, place: Path | HubModel, settings: Settings, on_progress: ProgressCallback | None
) -> Path:
    """The folder of a model, with a replaced denoiser if the settings name one."""
    denoiser = settings.denoiser_of(name)
    folder = _own_folder_of(place, settings, on_progress, () if denoiser is None else DENOISERS)
    if denoiser is None:
        return folder
    log.info("%s: denoiser from %s", name, denoiser)
    return with_denoiser(folder, denoiser, settings.cache.expanduser())


def _own_folder_of(
    place: Path | HubModel,
    settings: Settings,
    on_progress: ProgressCallback | None,
    replaced: Collection[str],
) -> Path:
    """The folder of a model: fetched if it is on the hub, converted if it is a single file.

    For a model on the hub, weights of replaced parts are not fetched.
    """
    if isinstance(place, Path) and os.path.isfile(place):
        return converted(
            place,
            settings.cache.expanduser(),
            on_convert=lambda: log.info("converting %s to a folder in the diffusers layout", place),
        )
    if isinstance(place, Path):
        return place
    half = choose_dtype(settings.dtype, choose_device(settings.device)).itemsize < FLOAT32
    report = partial(_in_megabytes, on_progress or _logged(), f"fetching {place} (MB)")
    return fetch(place, half=half, check=family_of, on_progress=report, replaced=replaced)


def _logged() -> ProgressCallback:
    """Return a callback that logs progress every few seconds."""
    due = monotonic() + LOG_INTERVAL_S

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal due
        if monotonic() >= due:
            due = monotonic() + LOG_INTERVAL_S
            log.info("%s: %d of %d", stage, done, total)

    return on_progress


def _in_megabytes(on_progress: ProgressCallback, stage: str, done: int, total: int) -> None:
    on_progress(stage, done // 2**20, total // 2**20)
