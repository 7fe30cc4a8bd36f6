"""Replaces a model folder's U-Net or transformer by one in a single file.

The file and the folder's other parts are linked into a folder of the cache, which is loaded like
any other. Nothing is copied, and the replaced weights are never read.
"""

from __future__ import annotations

from hashlib import sha256
from os import walk
from pathlib import Path
from typing import TYPE_CHECKING, Final

from server.errors import ModelMismatch
from server.models.folder import DERIVED, INDEX, WEIGHTS, parts_of, stamp_of
from server.models.unfinished import unfinished
from server.models.weight_files import NETWORK

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DENOISERS", "with_denoiser"]

DENOISERS: Final = ("unet", "transformer")
"""Names of the denoiser's folder in a model folder."""

CONFIG: Final = "config.json"


def with_denoiser(folder: Path, file: Path, cache: Path) -> Path:
    """Make a folder with the parts of a model and other weights for its denoiser.

    Args:
        folder: model folder in the diffusers layout, which need not contain denoiser weights.
        file: safetensors or GGUF file with the weights, with diffusers' names or the original ones.
        cache: folder in which such folders are kept.

    Raises:
        ModelMismatch: there is no such file, or the model has no denoiser.
        OSError: the cache cannot be written.
    """
    if not file.is_file() or file.suffix not in WEIGHTS:
        raise ModelMismatch(f"denoiser {file.name!r} is not a {' or '.join(WEIGHTS)} file.")
    part = next((one for one in parts_of(folder) if one in DENOISERS), None)
    if part is None:
        raise ModelMismatch(
            f"model folder {str(folder)!r} has no {' or '.join(DENOISERS)} whose weights "
            f"{file.name!r} could replace."
        )
    links = {path.relative_to(folder): path.resolve() for path in _kept(folder, part)}
    links[Path(part, f"{NETWORK}{file.suffix}")] = file.resolve()
    identity = "\n".join(f"{name} {path} {stamp_of(path)}" for name, path in sorted(links.items()))
    made = cache / f"{file.stem}-{sha256(identity.encode()).hexdigest()[:16]}"
    if not (made / INDEX).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with unfinished(cache) as new:
            for name, path in links.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).symlink_to(path)
            try:
                new.rename(made)
            except OSError:
                # Another process (there may be one per GPU) has made the folder in the meantime.
                if not (made / INDEX).is_file():
                    raise
    return made


def _kept(folder: Path, part: str) -> Iterator[Path]:
    """The files that are kept: all except the denoiser's weights, and data fitted to them."""
    yield folder / INDEX
    for one in parts_of(folder):
        if one == part:
            yield folder / one / CONFIG
            continue
        for place, _, names in walk(folder / one, followlinks=True):
            yield from (Path(place, name) for name in names)
    derived = folder / DERIVED
    for entry in derived.iterdir() if derived.is_dir() else ():
        if entry.suffix != ".safetensors" and entry.name != "weak":
            yield entry
