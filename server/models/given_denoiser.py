"""A U-Net or transformer in one file in place of a model folder's own.

The file and the folder's other parts are linked into a folder of the cache, which is loaded like
any other. So nothing is copied, and the weights that are replaced are never read.
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
"""What denoisers are called in a model folder."""

CONFIG: Final = "config.json"


def with_denoiser(folder: Path, file: Path, cache: Path) -> Path:
    """A folder with the parts of a model, and a denoiser of other weights.

    Args:
        folder: of the model, in the diffusers layout; its denoiser's weights need not be there.
        file: safetensors or GGUF with the weights, by diffusers' names or the original ones.
        cache: where such folders are kept.

    Raises:
        ModelMismatch: no such file, or a model without a denoiser.
        OSError: the cache cannot be written.
    """
    if not file.is_file() or file.suffix not in WEIGHTS:
        raise ModelMismatch(f"denoiser {file.name!r} is no {' or '.join(WEIGHTS)} file.")
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
                # Another process may have been faster, as where one serves each GPU.
                if not (made / INDEX).is_file():
                    raise
    return made


def _kept(folder: Path, part: str) -> Iterator[Path]:
    """The files that stay: all but the denoiser's weights, and what was fitted to them."""
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
