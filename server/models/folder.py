"""Reading a diffusers model folder without trusting it."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from server.errors import ModelMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CHUNK = 1 << 22
INDEX = "model_index.json"
HERE = "."
"""The folder itself as a part, where the parts of a model are in subfolders."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that a folder may have and Weft leaves alone."""
AUTOENCODER = "vae"
GGUF = ".gguf"
WEIGHTS = (".safetensors", GGUF)
"""Endings of the files that weights are read from."""
DERIVED = "weft"
"""Folder inside a model folder for what was made from its weights, and is no part of them."""


def embedded_folders() -> dict[str, Path]:
    """The models that ship with Weft: the embedded one, and what was distilled from it."""
    # Found by name, as their training imports the server.
    place = Path(str(files("embedded")))
    return {"embedded": place / "model", "embedded-lcm": place / "lcm"}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object from a JSON file of the folder.

    Raises:
        ModelMismatch: the file is missing or holds no object.
    """
    try:
        value = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        raise ModelMismatch(
            f"model folder {str(folder)!r} has no {name}; a folder in the diffusers layout has one."
        ) from None
    except RecursionError:
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} is nested too deeply to be read."
        ) from None
    except OSError as error:
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} cannot be read: {error.strerror or error}."
        ) from None
    except ValueError as error:
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} is not valid JSON: {error}."
        ) from None
    if not isinstance(value, dict):
        raise ModelMismatch(f"{name} of model folder {str(folder)!r} holds no JSON object.")
    return value


def parts_of(folder: Path) -> list[str]:
    """The subfolders with what is loaded of a model, by its ``model_index.json``.

    Raises:
        ModelMismatch: it is missing or holds no object.
    """
    # Entries of parts that a model lacks are two nulls, and settings are no lists.
    index = read_json(folder, INDEX).items()
    named = [part for part, entry in index if isinstance(entry, list) and any(entry)]
    return [part for part in named if part not in UNUSED]


def component_class(folder: Path, part: str, allowed: frozenset[str]) -> str:
    """The class that the folder names for a part.

    Raises:
        ModelMismatch: it names none, or one that is not allowed.
    """
    named = read_json(folder, "model_index.json").get(part)
    kind = named[1] if isinstance(named, list) and len(named) == 2 else named
    if not isinstance(kind, str) or kind not in allowed:
        raise ModelMismatch(
            f"model folder {str(folder)!r} names {str(kind)[:80]!r} as its {part}; "
            f"allowed are {', '.join(sorted(allowed))}."
        )
    return kind


def statistics_file(folder: Path, rule: str, scale: float) -> Path:
    """Where a model folder keeps the statistics of a guidance rule and scale."""
    return folder / DERIVED / statistics_name(rule, scale)


def statistics_name(rule: str, scale: float) -> str:
    """Name of the file with the statistics of a guidance rule and scale."""
    guidance = rule if rule == "none" else f"{rule}-{scale:g}"
    return f"ems-{guidance}.safetensors"


def classifier_file(folder: Path) -> Path:
    """Where a model folder keeps the classifier of its latents."""
    return folder / DERIVED / "classifier.safetensors"


def prompts_file(folder: Path) -> Path:
    """Where a model folder may keep prompts that suit it, one a line."""
    return folder / DERIVED / "prompts.txt"


def adapters_folder(folder: Path) -> Path:
    """Where a model folder may keep adapters that were made for it."""
    return folder / DERIVED / "adapters"


def embeddings_folder(folder: Path) -> Path:
    """Where a model folder may keep embeddings that were made for it."""
    return folder / DERIVED / "embeddings"


def controls_folder(folder: Path) -> Path:
    """Where a model folder may keep ControlNets that were made for it."""
    return folder / DERIVED / "controls"


def image_prompts_folder(folder: Path) -> Path:
    """Where a model folder may keep IP-Adapters that were made for it."""
    return folder / DERIVED / "image_prompts"


def without_folder(error: Exception, file: Path) -> str:
    """What an error about a file says, less the folder, which is no client's business."""
    return str(error).replace(f"{file.parent}/", "")


def about_folder(error: ModelMismatch, folder: Path, called: str) -> str:
    """What is wrong with a folder that holds one part of a model and is none itself.

    Args:
        error: whose message says where the folder is, which is no client's business.
        folder: read with ``HERE`` as its part.
        called: what it is, with its name.
    """
    message = error.message.replace(f"model folder {str(folder)!r}", called)
    return message.removeprefix(f"{HERE} of ").replace(f"{HERE}/", "")


def stamp_of(path: Path) -> tuple[int, int]:
    """When a file was last changed, in nanoseconds, and its size in bytes; zeros if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def joint_stamp(stamps: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """When one of some files was last changed, and the bytes of all of them.

    Args:
        stamps: of the files, at least one; see :func:`stamp_of`.
    """
    changed, sizes = zip(*stamps, strict=True)
    return max(changed), sum(sizes)


def chunks_of(path: Path) -> Iterator[bytes]:
    """What is in a file, part by part, so that it is never in memory as a whole."""
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


class Revisions(NamedTuple):
    """Which weights a model folder holds: first 16 hexadecimal digits of a SHA-256, by path.

    Attributes:
        weights: of all weights.
        denoiser: of all but the autoencoder's. What was fitted to latents belongs to these, and
            stays valid with another decoder.
    """

    weights: str
    denoiser: str


def weights_in(folder: Path) -> list[Path]:
    """The files of weights of a model folder but for what Weft derived from them, in order."""
    derived = folder / DERIVED
    found = (file for kind in WEIGHTS for file in folder.rglob(f"*{kind}"))
    return sorted(file for file in found if not file.is_relative_to(derived))


def revisions_of(folder: Path, tell: Callable[[int, int], None] | None = None) -> Revisions:
    """The revisions of a folder's weights.

    What Weft derived from them, in the folder ``weft``, does not count.

    Args:
        folder: of the model.
        tell: called with the bytes that are read so far, and with those of all weights.

    Raises:
        ModelMismatch: there are no safetensors weights.
    """
    files = weights_in(folder)
    if not files:
        raise ModelMismatch(
            f"model folder {str(folder)!r} has no safetensors weights; other formats are refused."
        )
    # One digest up to the first file of the autoencoder, which is among the last: a digest costs
    # more than reading.
    denoiser = weights = hashlib.sha256()
    done, total = 0, sum(file.stat().st_size for file in files)
    for file in files:
        decodes = file.is_relative_to(folder / AUTOENCODER)
        if decodes and denoiser is weights:
            denoiser = weights.copy()
        concerned = (weights,) if decodes or denoiser is weights else (weights, denoiser)
        for digest in concerned:
            digest.update(str(file.relative_to(folder)).encode())
        for chunk in chunks_of(file):
            for digest in concerned:
                digest.update(chunk)
            done += len(chunk)
            if tell is not None:
                tell(done, total)
    return Revisions(weights.hexdigest()[:16], denoiser.hexdigest()[:16])
