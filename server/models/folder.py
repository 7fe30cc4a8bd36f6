"""Reads diffusers model folders without trusting their contents."""

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
"""Part name for a folder that is itself a part, where a model's parts are subfolders."""
IGNORED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that a folder may have and Weft ignores."""
AUTOENCODER = "vae"
GGUF = ".gguf"
WEIGHTS = (".safetensors", GGUF)
"""Extensions of weight files."""
DERIVED = "weft"
"""Subfolder of a model folder for what was derived from its weights, and is not part of them."""


def embedded_folders() -> dict[str, Path]:
    """Folders of the models that ship with Weft: the embedded one, and one distilled from it."""
    # Located by name and not imported, as the modules that train them import the server.
    place = Path(str(files("embedded")))
    return {"embedded": place / "model", "embedded-lcm": place / "lcm"}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read an object from a JSON file of the folder.

    Raises:
        ModelMismatch: the file is missing or does not contain an object.
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
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} does not contain a JSON object."
        )
    return value


def parts_of(folder: Path) -> list[str]:
    """The subfolders with the parts of a model that are loaded, by its ``model_index.json``.

    Raises:
        ModelMismatch: the file is missing or does not contain an object.
    """
    # The entry of a part that a model lacks is a pair of nulls, and settings are not lists.
    index = read_json(folder, INDEX).items()
    named = [part for part, entry in index if isinstance(entry, list) and any(entry)]
    return [part for part in named if part not in IGNORED_PARTS]


def component_class(folder: Path, part: str, allowed: frozenset[str]) -> str:
    """The class that the folder's ``model_index.json`` names for a part.

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
    """File in a model folder for the statistics of a guidance rule and scale."""
    return folder / DERIVED / statistics_name(rule, scale)


def statistics_name(rule: str, scale: float) -> str:
    """Name of the file with the statistics of a guidance rule and scale."""
    guidance = rule if rule == "none" else f"{rule}-{scale:g}"
    return f"ems-{guidance}.safetensors"


def classifier_file(folder: Path) -> Path:
    """File in a model folder for the classifier of its latents."""
    return folder / DERIVED / "classifier.safetensors"


def prompts_file(folder: Path) -> Path:
    """File in a model folder with prompts that suit the model, one per line; optional."""
    return folder / DERIVED / "prompts.txt"


def adapters_folder(folder: Path) -> Path:
    """Subfolder of a model folder for adapters that were made for it; optional."""
    return folder / DERIVED / "adapters"


def embeddings_folder(folder: Path) -> Path:
    """Subfolder of a model folder for embeddings that were made for it; optional."""
    return folder / DERIVED / "embeddings"


def controls_folder(folder: Path) -> Path:
    """Subfolder of a model folder for ControlNets that were made for it; optional."""
    return folder / DERIVED / "controls"


def image_prompts_folder(folder: Path) -> Path:
    """Subfolder of a model folder for IP-Adapters that were made for it; optional."""
    return folder / DERIVED / "image_prompts"


def without_folder(error: Exception, file: Path) -> str:
    """Message of an error about a file, without the folder's path, which clients must not see."""
    return str(error).replace(f"{file.parent}/", "")


def about_folder(error: ModelMismatch, folder: Path, called: str) -> str:
    """Message of an error about a folder that holds a single part and is not a model folder.

    Args:
        error: error whose message contains the folder's path, which clients must not see.
        folder: folder that was read with ``HERE`` as its part.
        called: kind and name of what it holds, which replace the path.
    """
    message = error.message.replace(f"model folder {str(folder)!r}", called)
    return message.removeprefix(f"{HERE} of ").replace(f"{HERE}/", "")


def stamp_of(path: Path) -> tuple[int, int]:
    """Modification time in nanoseconds, and size in bytes; zeros if the file does not exist."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def joint_stamp(stamps: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Latest modification time of some files in nanoseconds, and their total size in bytes.

    Args:
        stamps: stamps of the files, at least one; see :func:`stamp_of`.
    """
    changed, sizes = zip(*stamps, strict=True)
    return max(changed), sum(sizes)


def chunks_of(path: Path) -> Iterator[bytes]:
    """The contents of a file in chunks, so that it is never in memory as a whole."""
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


class Revisions(NamedTuple):
    """Identifies a folder's weights: first 16 hexadecimal digits of a SHA-256 over paths and bytes.

    Attributes:
        weights: revision of all weights.
        denoiser: revision of all weights except the autoencoder's. Data fitted to latents belongs
            to this revision, and stays valid with another decoder.
    """

    weights: str
    denoiser: str


def weights_in(folder: Path) -> list[Path]:
    """Weight files of a model folder, sorted, without those that Weft derived from them."""
    derived = folder / DERIVED
    found = (file for kind in WEIGHTS for file in folder.rglob(f"*{kind}"))
    return sorted(file for file in found if not file.is_relative_to(derived))


def revisions_of(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> Revisions:
    """Compute the revisions of a folder's weights.

    Files that Weft derived from them, in the subfolder ``weft``, do not count.

    Args:
        folder: model folder.
        on_progress: called with the number of bytes read so far, and with that of all weights.

    Raises:
        ModelMismatch: there are no safetensors or GGUF files.
    """
    files = weights_in(folder)
    if not files:
        raise ModelMismatch(
            f"model folder {str(folder)!r} has no safetensors weights; other formats are refused."
        )
    # A single digest up to the autoencoder's first file, which is among the last: hashing takes
    # longer than reading.
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
            if on_progress is not None:
                on_progress(done, total)
    return Revisions(weights.hexdigest()[:16], denoiser.hexdigest()[:16])
