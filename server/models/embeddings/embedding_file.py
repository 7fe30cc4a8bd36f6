"""Files of textual inversion: the header is read first, vectors once a prompt uses them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from server.errors import EmbeddingMismatch
from server.models.embeddings.embedding import Embedding
from server.models.folder import stamp_of, without_folder
from server.models.header import shapes_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

__all__ = ["EmbeddingFile", "EmbeddingTarget"]

TWO_ENCODERS: Final = ("text_encoder", "text_encoder_2")
OF_TWO_ENCODERS: Final = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
"""Names of the tensors for each encoder in files for Stable Diffusion XL. The second pair is what
diffusers' training scripts write."""

SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class EmbeddingTarget:
    """Properties of a model's text encoders that embeddings must fit.

    Attributes:
        model: name of the model.
        widths: token embedding width, by the encoder's name in a model folder; empty where prompts
            cannot use embeddings.
        max_tokens: maximum number of tokens of a prompt for all of the encoders, excluding markers;
            an embedding has at most this many vectors.
    """

    model: str
    widths: Mapping[str, int]
    max_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingFile:
    """An embedding file that fits a model.

    Attributes:
        name: word that stands for it in prompts.
        path: path of the file.
        stamp: value that changes when the file changes.
        vectors: number of vectors that replace the word, each taking the place of a token.
        tensors: name of the tensor in the file, by the encoder's name in a model folder.
        widths: width of a vector, by the same names.
    """

    name: str
    path: Path
    stamp: tuple[int, int]
    vectors: int
    tensors: Mapping[str, str]
    widths: Mapping[str, int]

    @classmethod
    def read(cls, name: str, path: Path, target: EmbeddingTarget) -> EmbeddingFile:
        """Read the header of a file, and check that it fits a model.

        A file may have a single tensor ``[vectors, width]`` or ``[width]`` of any name, as
        diffusers and AUTOMATIC1111 write them, or two for Stable Diffusion XL, see
        ``OF_TWO_ENCODERS``.

        Raises:
            EmbeddingMismatch: the file cannot be used with the model; the sentence names both.
        """
        stamp = stamp_of(path)
        try:
            with safe_open(path, framework="pt") as opened:
                shapes = shapes_of(opened, opened.keys(), EmbeddingMismatch)
            tensors = _tensors(shapes, target)
            vectors = _count({part: shapes[key] for part, key in tensors.items()}, target)
        except (OSError, SafetensorError) as error:
            raise EmbeddingMismatch(
                f"embedding {name!r} is not a readable safetensors file: "
                f"{without_folder(error, path)}."
            ) from None
        except EmbeddingMismatch as error:
            raise EmbeddingMismatch(f"embedding {name!r} {error.message}.") from None
        return cls(name, path, stamp, vectors, tensors, target.widths)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of all vectors when loaded, in bytes."""
        return self.vectors * sum(self.widths.values()) * dtype.itemsize

    def load(self, device: torch.device, dtype: torch.dtype) -> Embedding:
        """Load the vectors.

        Raises:
            EmbeddingMismatch: the file has changed since its header was read, or a value is not
                finite in ``dtype``.
        """
        try:
            # Read, not mapped: if a mapped file is overwritten, the loaded values would change, and
            # if it is truncated, the process would be killed.
            content = self.path.read_bytes()
            state = load(content)
            revision = hashlib.sha256(content).hexdigest()[:16]
        except (OSError, SafetensorError) as error:
            raise EmbeddingMismatch(
                f"embedding {self.name!r} could not be read: {without_folder(error, self.path)}."
            ) from None
        if stamp_of(self.path) != self.stamp:
            raise EmbeddingMismatch(
                f"embedding {self.name!r} changed while it was read; try again."
            )
        vectors = {
            part: state[key].reshape(self.vectors, self.widths[part]).to(device, dtype)
            for part, key in self.tensors.items()
        }
        if not all(bool(one.isfinite().all()) for one in vectors.values()):
            kind = str(dtype).removeprefix("torch.")
            raise EmbeddingMismatch(
                f"embedding {self.name!r} has values that are not numbers in {kind}."
            )
        return Embedding(self.name, revision, vectors)


def _tensors(shapes: Mapping[str, tuple[int, ...]], target: EmbeddingTarget) -> dict[str, str]:
    """The tensor for each encoder."""
    model, parts = target.model, list(target.widths)
    if len(parts) == 1 and len(shapes) == 1:
        return dict(zip(parts, shapes, strict=True))
    if parts == [*TWO_ENCODERS]:
        for names in OF_TWO_ENCODERS:
            if sorted(shapes) == sorted(names):
                return dict(zip(TWO_ENCODERS, names, strict=True))
    found = ", ".join(repr(key[:SHOWN]) for key in sorted(shapes)[:3]) or "none"
    wanted = "a single one" if len(parts) == 1 else "clip_l and clip_g"
    raise EmbeddingMismatch(f"has the tensors {found}; model {model!r} needs {wanted}")


def _count(shapes: Mapping[str, tuple[int, ...]], target: EmbeddingTarget) -> int:
    """The number of vectors, which must be the same for each encoder."""
    counts: set[int] = set()
    for part, shape in shapes.items():
        width = target.widths[part]
        if len(shape) not in (1, 2) or shape[-1] != width:
            raise EmbeddingMismatch(
                f"has vectors of the shape {[*shape]}; model {target.model!r} needs a width of "
                f"{width} for its {part}"
            )
        counts.add(1 if len(shape) == 1 else shape[0])
    if len(counts) > 1:
        raise EmbeddingMismatch("has not as many vectors for each text encoder")
    [count] = counts
    if not 1 <= count <= target.max_tokens:
        raise EmbeddingMismatch(
            f"has {count} vectors; prompts of model {target.model!r} have room for "
            f"{target.max_tokens}"
        )
    return count
