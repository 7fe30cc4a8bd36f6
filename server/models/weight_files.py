"""Finds the weight files of a part of a model folder, and computes how much memory they take.

They are safetensors files; those of a denoiser may be a single GGUF file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from io import SEEK_END
from math import prod
from os.path import isfile
from typing import TYPE_CHECKING, Final, NamedTuple

from server.errors import ModelMismatch
from server.models.folder import (
    AUTOENCODER,
    DERIVED,
    GGUF,
    WEIGHTS,
    classifier_file,
    parts_of,
    read_json,
)
from server.models.gguf.formats import stays_in_blocks
from server.models.gguf.header import tensors_of
from server.models.prefixes import own_prefix
from server.models.quantization import BITS, MIN_FEATURES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

    from server.models.gguf.header import GgufTensor
    from server.models.placement import Placement

__all__ = [
    "FLOAT32",
    "NETWORK",
    "TEXT_ENCODER",
    "WeightFiles",
    "bytes_in_memory",
    "bytes_of_part",
    "bytes_on_host",
    "weight_files",
]

NETWORK: Final = "diffusion_pytorch_model"
TEXT_ENCODER: Final = "model"
"""Names that diffusers and transformers give the files, without the extension."""

OF_TEXT_ENCODER: Final = re.compile(rf"{TEXT_ENCODER}([.-].*)?\.safetensors")

VARIANTS: Final = (None, "fp16", "bf16")
"""Variants in order of preference; the first one that a part has is loaded."""

WHOLE_NUMBERS: Final = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
"""Bytes per number of the types that are not converted."""

FLOAT32: Final = 4
BLOCK: Final = re.compile(r".*?\.\d+\.")
"""Matches a tensor's name up to the number of its block."""

MIDDLE: Final = "middle"
OF_UNET: Final = re.compile(
    r"((model\.)?diffusion_model\.)?(?P<place>mid_block|middle_block|input_blocks|output_blocks)"
    r"\.((?P<number>\d+)\.)?"
)
"""Matches names in U-Nets whose numbers do not correspond to streamed blocks, most of them in the
original code."""

RESNETS_A_LEVEL: Final = 3
"""Number of blocks per level in the original numbering of published U-Nets, whose first block is a
convolution."""

LENGTH_BYTES: Final = 8
"""Bytes with the length of the header, at the beginning of a file."""

MAX_HEADER_BYTES: Final = 100_000_000
"""Bytes, the limit of safetensors itself."""


class WeightFiles(NamedTuple):
    """The files of one part.

    Attributes:
        names: names of the files in the part's folder, at least one; they need not exist.
        variant: variant in their names, such as ``fp16``; None for none.
    """

    names: tuple[str, ...]
    variant: str | None


def weight_files(folder: Path, part: str, stem: str) -> WeightFiles:
    """The weight files of a part: a single file, or those listed in an index.

    Files without a variant in their names are preferred. The weights of a network may have any name
    if they are the only ones in its folder.

    Args:
        folder: model folder.
        part: subfolder of the part.
        stem: ``NETWORK`` or ``TEXT_ENCODER``.

    Raises:
        ModelMismatch: an index that cannot be read.
    """
    for variant in VARIANTS:
        dotted = "" if variant is None else f".{variant}"
        index = f"{part}/{stem}.safetensors.index{dotted}.json"
        if (folder / index).exists():
            shards = read_json(folder, index).get("weight_map")
            listed = shards.values() if isinstance(shards, dict) else ()
            return WeightFiles(tuple(sorted(set(map(str, listed)))), variant)
        if (folder / part / f"{stem}{dotted}.safetensors").is_file():
            return WeightFiles((f"{stem}{dotted}.safetensors",), variant)
    if stem == NETWORK:
        # The only file, under whatever name it was published.
        others = [one.name for kind in WEIGHTS for one in (folder / part).glob(f"*{kind}")]
        if len(others) == 1 and not OF_TEXT_ENCODER.fullmatch(others[0]):
            return WeightFiles((others[0],), None)
    return WeightFiles((f"{stem}.safetensors",), None)


def bytes_in_memory(folder: Path, dtype: torch.dtype, placement: Placement | None = None) -> int:
    """Device memory that a model folder's networks will take, from the headers of its files.

    The autoencoder is counted in float32, which some models use; missing files count as 0.

    Args:
        folder: model folder.
        dtype: dtype to which the weights are converted.
        placement: how the networks will be kept; by default without further quantization, on the
            device.

    Returns:
        Memory in bytes.

    Raises:
        ModelMismatch: the folder is not a model folder, or a file has no valid header.
    """
    # Imported here as they load torch, which reading settings and the catalog must not need.
    from server.models.placement import Placement
    from server.models.streamed import STREAMED_BLOCKS

    placement = placement or Placement()
    total = 0
    for part in _networks_of(folder):
        blocks = Counter[str]()
        for block, nbytes in _kept(folder, part, dtype, placement):
            blocks[block] += nbytes
        # The mid block of a U-Net is not in a list of blocks, so it is not streamed by itself.
        outside = blocks.pop("", 0) + blocks.pop(MIDDLE, 0)
        at_once = STREAMED_BLOCKS if placement.streams(part) else len(blocks)
        total += outside + sum(sorted(blocks.values(), reverse=True)[:at_once])
    classifier = classifier_file(folder)
    if classifier.is_file():
        name = str(classifier.relative_to(folder))
        total += sum(tensor.nbytes(FLOAT32) for _, tensor in _tensors_of_file(folder, name))
    return total


def bytes_on_host(folder: Path, dtype: torch.dtype, placement: Placement) -> int:
    """Host memory that a model folder's networks will keep, when the model runs on a GPU.

    This is the memory of the streamed blocks. It is pinned, for which torch allocates powers of
    two.

    Args:
        folder: model folder.
        dtype: dtype to which the weights are converted.
        placement: how the networks will be kept.

    Returns:
        Memory in bytes.

    Raises:
        ModelMismatch: the folder is not a model folder, or a file has no valid header.
    """
    return sum(
        1 << (nbytes - 1).bit_length()
        for part in _networks_of(folder)
        if placement.streams(part)
        for block, nbytes in _kept(folder, part, dtype, placement)
        if block and nbytes
    )


def bytes_of_part(folder: Path, part: str, stem: str, width: int) -> int:
    """Memory in bytes that one network will take, from the headers of its files.

    Args:
        folder: model folder.
        part: subfolder of the network, or a file.
        stem: ``NETWORK`` or ``TEXT_ENCODER``.
        width: bytes per number once it is loaded.

    Raises:
        ModelMismatch: a file has no valid header.
    """
    return sum(tensor.nbytes(width) for _, tensor in _tensors_of_part(folder, part, stem))


def _networks_of(folder: Path) -> tuple[str, ...]:
    return *parts_of(folder), f"{DERIVED}/weak"


def _kept(
    folder: Path, part: str, dtype: torch.dtype, placement: Placement
) -> Iterator[tuple[str, int]]:
    """Each tensor of a part: its block, "" if it is in none, and its bytes once it is loaded."""
    width = FLOAT32 if part == AUTOENCODER else dtype.itemsize
    bits = BITS[placement.quantization] if placement.quantizes(part) else None
    for stem in (NETWORK, TEXT_ENCODER):
        for name, tensor in _tensors_of_part(folder, part, stem):
            block = _block_of(name)
            if bits is not None and block and _is_matrix(name, tensor):
                yield block, int(tensor.numbers * bits / 8)
            else:
                yield block, tensor.nbytes(width)


def _block_of(name: str) -> str:
    """The streamed block to which a tensor belongs; "" if it is in none."""
    if (found := OF_UNET.match(name)) is None:
        block = BLOCK.match(name)
        return block[0] if block else ""
    number = int(found["number"] or 0)
    match found["place"]:
        case "input_blocks":
            return f"down {(number - 1) // RESNETS_A_LEVEL}" if number else ""
        case "output_blocks":
            return f"up {number // RESNETS_A_LEVEL}"
        case _:
            return MIDDLE


class _Tensor(NamedTuple):
    """A tensor as a file's header describes it."""

    shape: Sequence[int]
    dtype: str
    in_blocks: int | None = None
    """Bytes of a weight that stays in blocks as in its file; None for all others."""

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    def nbytes(self, width: int) -> int:
        """Bytes once it is loaded, if numbers that are converted take ``width`` bytes each."""
        if self.in_blocks is not None:
            return self.in_blocks
        return self.numbers * WHOLE_NUMBERS.get(self.dtype, width)


def _tensors_of_part(folder: Path, part: str, stem: str) -> list[tuple[str, _Tensor]]:
    if isfile(folder / part):
        return _tensors_of_file(folder, part)
    files = [folder / part / name for name in weight_files(folder, part, stem).names]
    # An index may list any path, and invalid file names; loading refuses them.
    own = [file for file in files if file.parent == folder / part and isfile(file)]
    tensors = [one for file in own for one in _tensors_of_file(folder, f"{part}/{file.name}")]
    if stem != NETWORK:
        return tensors
    # A published file may contain other networks as well, which are not loaded.
    prefix = own_prefix([name for name, _ in tensors])
    return [(name, tensor) for name, tensor in tensors if name.startswith(prefix)]


def _tensors_of_file(folder: Path, name: str) -> list[tuple[str, _Tensor]]:
    """The tensors of a file by its header; the file is not mapped, which could fail if it is large.

    Raises:
        ModelMismatch: it has no valid header of a safetensors or GGUF file, or is cut short.
    """
    if name.endswith(GGUF):
        return [
            (key, _Tensor(one.shape, one.kind, one.nbytes if _in_blocks(key, one) else None))
            for key, one in tensors_of(folder / name).items()
        ]
    try:
        with (folder / name).open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
            size = stream.seek(0, SEEK_END)
        described = {key: entry for key, entry in header.items() if key != "__metadata__"}
        tensors = [
            (key, _Tensor(entry["shape"], entry["dtype"])) for key, entry in described.items()
        ]
        last = max((int(entry["data_offsets"][1]) for entry in described.values()), default=0)
        # Raises for shapes that are not lists of numbers.
        sum(tensor.nbytes(FLOAT32) for _, tensor in tensors)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} is not a safetensors file."
        ) from None
    if size < (whole := LENGTH_BYTES + length + last):
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} is cut short: it has {size} of {whole} bytes."
        )
    return tensors


def _in_blocks(name: str, tensor: GgufTensor) -> bool:
    return tensor.quantized and stays_in_blocks(name, tensor.shape)


def _is_matrix(name: str, tensor: _Tensor) -> bool:
    """Whether this is the weight of a linear layer that is large enough to be quantized."""
    shape = tensor.shape
    if tensor.in_blocks is not None:
        return False
    return name.endswith(".weight") and len(shape) == 2 and min(shape) >= MIN_FEATURES
