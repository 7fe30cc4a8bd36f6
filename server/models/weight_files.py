"""Which safetensors files hold the weights of a part of a model folder, and how large they are."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple

from server.errors import ModelMismatch
from server.models.folder import AUTOENCODER, DERIVED, classifier_file, parts_of, read_json

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = [
    "FLOAT32",
    "NETWORK",
    "TEXT_ENCODER",
    "WeightFiles",
    "bytes_in_memory",
    "bytes_of_part",
    "weight_files",
]

NETWORK: Final = "diffusion_pytorch_model"
TEXT_ENCODER: Final = "model"
"""What diffusers and transformers call the files, without their endings."""

VARIANTS: Final = (None, "fp16")
"""The first that a part has is loaded."""

WHOLE_NUMBERS: Final = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
"""Bytes of the types that are not converted."""

FLOAT32: Final = 4
LONGEST_HEADER: Final = 100_000_000
"""Bytes, as safetensors itself allows."""


class WeightFiles(NamedTuple):
    """The files of one part.

    Attributes:
        names: of the files in the part's folder, at least one; they need not exist.
        variant: that stands in their names, such as ``fp16``; None for none.
    """

    names: tuple[str, ...]
    variant: str | None


def weight_files(folder: Path, part: str, stem: str) -> WeightFiles:
    """The files of a part: one, or those that an index lists; of a variant if there are no others.

    Args:
        folder: of the model.
        part: the subfolder.
        stem: ``NETWORK`` or ``TEXT_ENCODER``.

    Raises:
        ModelMismatch: an index that cannot be read.
    """
    for variant in VARIANTS:
        dotted = "" if variant is None else f".{variant}"
        index = f"{part}/{stem}.safetensors.index{dotted}.json"
        if (folder / index).exists():
            shards = read_json(folder, index).get("weight_map")
            names = set(shards.values()) if isinstance(shards, dict) else set[str]()
            return WeightFiles(tuple(sorted(map(str, names))), variant)
        if (folder / part / f"{stem}{dotted}.safetensors").is_file():
            return WeightFiles((f"{stem}{dotted}.safetensors",), variant)
    return WeightFiles((f"{stem}.safetensors",), None)


def bytes_in_memory(folder: Path, dtype: torch.dtype) -> int:
    """What the networks of a model folder will take, from the headers of its files.

    The autoencoder counts in float32, which some keep; files that are missing count nothing.

    Args:
        folder: of the model.
        dtype: that the weights are converted to.

    Raises:
        ModelMismatch: no model folder, or a file that is no safetensors file.
    """
    total = 0
    for part in (*parts_of(folder), f"{DERIVED}/weak"):
        width = FLOAT32 if part == AUTOENCODER else dtype.itemsize
        total += sum(bytes_of_part(folder, part, stem, width) for stem in (NETWORK, TEXT_ENCODER))
    classifier = classifier_file(folder)
    if classifier.is_file():
        total += _bytes_of_file(folder, str(classifier.relative_to(folder)), width=FLOAT32)
    return total


def bytes_of_part(folder: Path, part: str, stem: str, width: int) -> int:
    """What one network will take, from the headers of its files.

    Args:
        folder: of the model.
        part: the subfolder.
        stem: ``NETWORK`` or ``TEXT_ENCODER``.
        width: bytes of a number once it is loaded.

    Raises:
        ModelMismatch: a file that is no safetensors file.
    """
    files = [folder / part / name for name in weight_files(folder, part, stem).names]
    # An index may name any path; what is elsewhere is refused when it is loaded.
    own = [file for file in files if file.parent == folder / part and file.is_file()]
    return sum(_bytes_of_file(folder, f"{part}/{file.name}", width) for file in own)


def _bytes_of_file(folder: Path, name: str, width: int) -> int:
    """Bytes by the file's header; it is not mapped, which may fail where it is large.

    Raises:
        ModelMismatch: it has no such header.
    """
    try:
        with (folder / name).open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, LONGEST_HEADER)))
        tensors = [entry for key, entry in header.items() if key != "__metadata__"]
        return sum(prod(one["shape"]) * WHOLE_NUMBERS.get(one["dtype"], width) for one in tensors)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} is no safetensors file."
        ) from None
