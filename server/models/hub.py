"""Models of the Hugging Face hub: named with a revision, downloaded once into the hub's own cache.

Only files that are loaded are downloaded: safetensors weights, configs and tokenizer files of the
parts that ``model_index.json`` lists, and the variant ``fp16`` or ``bf16`` if it exists and weights
are wanted in half precision. Pickles, code and the same weights in other formats are not
downloaded.
"""

from __future__ import annotations

import errno
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from server.errors import ModelMismatch
from server.models.folder import INDEX, parts_of
from server.models.weight_files import NETWORK, TEXT_ENCODER, weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

__all__ = ["HubModel", "chosen_files", "fetch"]

log = logging.getLogger("weft")

NEWEST: Final = "main"
NAMED: Final = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?"
)
WEIGHTS: Final = re.compile(
    r"(diffusion_pytorch_model|model)"
    r"((\.(fp|bf)16)?(-\d{5}-of-\d{5})?(\.(fp|bf)16)?\.safetensors"
    r"|\.safetensors\.index(\.(fp|bf)16)?\.json)"
)
HALVES: Final = ("fp16", "bf16")
"""Variants in half precision; the first one that exists is downloaded."""

TEXTS: Final = re.compile(r"[\w.-]+\.(json|txt|model)")
OTHER_INDICES: Final = re.compile(r".*\.index(\.\w+)?\.json")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the hub at a revision: a commit, a tag or a branch."""

    repository: str
    revision: str

    @classmethod
    def of(cls, text: str) -> Self | None:
        """The model for ``org/name`` or ``org/name@revision``; None for other texts."""
        named = NAMED.fullmatch(text)
        if named is None or ".." in text:
            return None
        return cls(named["repository"], named["revision"] or NEWEST)

    @property
    def name(self) -> str:
        """Name that requests use if the operator gives it none."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def fetch(
    model: HubModel,
    *,
    half: bool,
    check: Callable[[Path], object],
    on_progress: Callable[[int, int], None] | None = None,
    replaced: Collection[str] = (),
) -> Path:
    """Download a model into the hub's cache unless it is there, and return its folder.

    A model that is in the cache is not looked up again, so a branch stays at the commit at which it
    was first downloaded. An interrupted download resumes where it stopped.

    Args:
        model: model of the hub at ``HF_ENDPOINT``, accessed with the token ``HF_TOKEN`` if set.
        half: whether weights are wanted in half precision.
        check: refuses a folder by its ``model_index.json``, before its weights are downloaded.
        on_progress: called with the number of bytes downloaded so far, and with that of all files.
        replaced: parts whose weights are replaced by others and need not be downloaded.

    Raises:
        ModelMismatch: it cannot be downloaded, or is refused.
    """
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _snapshot(model, half, check, on_progress, replaced, cached=True)
    except (EntryNotFoundError, OSError):
        log.info("fetching %s from the hub", model)
    try:
        folder = _snapshot(model, half, check, on_progress, replaced, cached=False)
    except ModelMismatch:
        raise
    except Exception as error:
        raise ModelMismatch(_sentence(model, error)) from error
    if model.revision == NEWEST:
        log.warning("%s is not pinned; write %s@%s", model, model.repository, folder.name)
    return folder


def chosen_files(
    paths: Iterable[str], parts: Iterable[str], *, half: bool, replaced: Collection[str] = ()
) -> list[str]:
    """Choose the files of a repository to download.

    Args:
        paths: paths of all files of the repository.
        parts: subfolders that ``model_index.json`` lists.
        half: whether to prefer the variant ``fp16``, or ``bf16`` if there is none.
        replaced: parts whose weights are left out.
    """
    chosen = [INDEX]
    listed = sorted(paths)
    for part in parts:
        names = [path.partition("/")[2] for path in listed if path.startswith(f"{part}/")]
        weights = [name for name in names if WEIGHTS.fullmatch(name)]
        fp16, bf16 = ([name for name in weights if f".{one}" in name] for one in HALVES)
        plain = [name for name in weights if not any(f".{one}" in name for one in HALVES)]
        variant = fp16 or bf16
        taken = (variant or plain) if half else (plain or variant)
        if part in replaced:
            taken = []
        texts = [n for n in names if TEXTS.fullmatch(n) and not OTHER_INDICES.fullmatch(n)]
        chosen += [f"{part}/{name}" for name in (*taken, *texts)]
    return chosen


def _snapshot(
    model: HubModel,
    half: bool,
    check: Callable[[Path], object],
    on_progress: Callable[[int, int], None] | None,
    replaced: Collection[str],
    *,
    cached: bool,
) -> Path:
    """The model's folder with all chosen files, only from the cache or from the hub as well."""
    from huggingface_hub import get_cached_repo_tree, hf_hub_download, list_repo_tree
    from huggingface_hub import snapshot_download as download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    here: Any = {"repo_id": model.repository, "revision": model.revision}
    folder = Path(hf_hub_download(**here, filename=INDEX, local_files_only=cached)).parent
    check(folder)
    parts = parts_of(folder)
    try:
        tree = get_cached_repo_tree(**here) if cached else list_repo_tree(**here, recursive=True)
    except CachedRepoTreeNotFoundError:
        # Downloaded by an older client, which keeps no list of the repository's files.
        if _has_weights(folder, [part for part in parts if part not in replaced]):
            return folder
        raise LocalEntryNotFoundError(f"{folder} is not complete") from None
    sizes = {one.path: one.size for one in tree if isinstance(one, RepoFile)}
    files = chosen_files(sizes, parts, half=half, replaced=replaced)
    damaged = [file for file in files if _is_damaged(folder / file, sizes.get(file))]
    if damaged and cached:
        raise LocalEntryNotFoundError(f"{damaged} of {folder} do not have the hub's size")
    for file in damaged:
        hf_hub_download(**here, filename=file, force_download=True)
    return Path(
        download(
            **here, allow_patterns=files, local_files_only=cached, tqdm_class=_progress(on_progress)
        )
    )


def _is_damaged(file: Path, size: int | None) -> bool:
    """Whether a file in the cache does not have its size, as after a loss of power.

    The client does not sync what it writes, and takes any file that is there for complete.
    """
    return size is not None and file.is_file() and file.stat().st_size != size


def _has_weights(folder: Path, parts: Iterable[str]) -> bool:
    """Whether each part exists, with weights if it is a network."""
    for part in parts:
        if not (folder / part).is_dir():
            return False
        networks = [weight_files(folder, part, stem).names for stem in (NETWORK, TEXT_ENCODER)]
        whole = [all((folder / part / name).is_file() for name in names) for names in networks]
        if (folder / part / "config.json").exists() and not any(whole):
            return False
    return True


def _progress(on_progress: Callable[[int, int], None] | None) -> Any:
    """A progress bar class without output, which passes on the client's counts of bytes."""
    from tqdm.std import tqdm

    bar: Any = tqdm

    class ProgressBar(bar):
        monitor_interval = 0

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named, file=_NOWHERE)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if on_progress is not None and self.unit == "B":
                on_progress(int(self.n), int(self.total or self.n))
            return shown

    return ProgressBar


class _Nowhere:
    def write(self, _: str) -> None: ...

    def flush(self) -> None: ...


_NOWHERE: Final = _Nowhere()


def _sentence(model: HubModel, error: Exception) -> str:
    from httpx2 import TransportError
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():
            return (
                f"hub model {str(model)!r} is gated: accept its conditions on its page, and set "
                "HF_TOKEN to a token of that account."
            )
        case RepositoryNotFoundError():
            return (
                f"hub model {str(model)!r} does not exist, or HF_TOKEN has no access to it; there "
                "is no folder of that name either."
            )
        case RevisionNotFoundError():
            return f"hub model {model.repository!r} has no revision {model.revision!r}."
        case LocalEntryNotFoundError() | OfflineModeIsEnabled() | TransportError():
            offline = " (HF_HUB_OFFLINE is set)" if is_offline_mode() else ""
            return (
                f"hub model {str(model)!r} is not complete in the cache, and the hub cannot be "
                f"reached{offline}; there is no folder of that name either."
            )
        case OSError(errno=errno.ENOSPC):
            return (
                f"hub model {str(model)!r} could not be fetched: the disk of "
                f"{constants.HF_HUB_CACHE!r} is full."
            )
        case EntryNotFoundError():
            return f"hub model {str(model)!r} has no {INDEX}; only diffusers models are hosted."
        case _:
            return f"hub model {str(model)!r} could not be fetched: {error}"
