"""LoRA files and folders, safetensors only: the header is read first, weights on first use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from server.errors import AdapterMismatch
from server.models.adapters.adapter import Adapter, LowRank
from server.models.adapters.dora import joined, measured, weight_of
from server.models.adapters.lycoris import layers_of_whole_operands
from server.models.adapters.magnitude import INPUTS, OUTPUTS
from server.models.adapters.naming import DOWN, UP
from server.models.adapters.peft_config import (
    MAX_ALPHA,
    PeftConfig,
    adapter_stamp,
    files_of,
)
from server.models.adapters.placing import (
    Header,
    Placed,
    PlacedChanges,
    Target,
    place,
)
from server.models.adapters.stated import stated_defaults
from server.models.folder import chunks_of, without_folder
from server.models.header import shapes_of
from server.models.memory import refuse_if_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from server.models.adapters.norms import NormChange, PlacedNorm
    from server.models.defaults import ModelDefaults

__all__ = ["AdapterFile"]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFile:
    """An adapter file that fits a model.

    Attributes:
        name: name that requests use.
        path: path of the file, or of the folder that peft saved.
        stamp: value that changes when the file changes.
        changes: changes of layers and norms.
        target: the model.
        defaults: settings of requests that use it and leave them out; None where the file states
            none.
    """

    name: str
    path: Path
    stamp: tuple[int, int]
    changes: PlacedChanges
    target: Target
    defaults: ModelDefaults | None

    @classmethod
    def read(cls, name: str, path: Path, target: Target) -> AdapterFile:
        """Read the header of a file, and match its tensors to the layers of a model.

        Args:
            name: name that requests use.
            path: path of the file, or of the folder that peft saved.
            target: the model.

        Raises:
            AdapterMismatch: the file cannot be used with the model; the sentence names both.
        """
        stamp = adapter_stamp(path)
        try:
            header = _header(path)
            defaults = stated_defaults(name, header.metadata)
            return cls(name, path, stamp, place(header, target), target, defaults)
        except (OSError, SafetensorError) as error:
            raise AdapterMismatch(
                f"adapter {name!r} is not a readable safetensors file: "
                f"{without_folder(error, path)}."
            ) from None
        except AdapterMismatch as error:
            raise AdapterMismatch(f"adapter {name!r} {error.message}.") from None
        except Exception as error:
            # A header can contain anything, and must not prevent other files from being read.
            reason = str(error).partition("\n")[0]
            raise AdapterMismatch(f"adapter {name!r} is not understood: {reason}.") from error

    @property
    def rank(self) -> int:
        """The largest rank of its layers; 0 if it changes norms only."""
        parts = self.changes.parts.values()
        return max((one.rank for part in parts for one in part.values()), default=0)

    @property
    def networks(self) -> tuple[str, ...]:
        """Networks that it changes, by their names in a model folder."""
        return tuple(sorted({*self.changes.parts, *self.changes.norms}))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of all tensors when loaded, in bytes."""
        layers, norms = self.changes.parts.values(), self.changes.norms.values()
        sizes = [_nbytes(one, dtype) for part in layers for one in part.values()]
        return sum(sizes) + sum(one.nbytes for part in norms for one in part.values())

    def load(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """Load the weights.

        Raises:
            AdapterMismatch: the file has changed since its header was read.
            Overloaded: the device has no memory for them.
        """
        needed = self.nbytes(dtype) + self._passing_bytes(dtype)
        try:
            # Free memory is not checked in advance: adapters are small, and may use the share of a
            # GPU's memory that weights leave to activations.
            with refuse_if_out_of_memory(f"adapter {self.name!r}", needed):
                parts, norms = self._loaded(device, dtype)
            revision = _revision(self.path)
        except (OSError, SafetensorError) as error:
            raise AdapterMismatch(
                f"adapter {self.name!r} could not be read: {without_folder(error, self.path)}."
            ) from None
        if adapter_stamp(self.path) != self.stamp:
            raise AdapterMismatch(f"adapter {self.name!r} changed while it was read; try again.")
        return Adapter(self.name, revision, parts, norms)

    def _passing_bytes(self, dtype: torch.dtype) -> int:
        """Memory of the largest weight that a DoRA is compared with, dequantized or copied."""
        placed = (one for part in self.changes.parts.values() for one in part.values())
        compared = (one.shapes for one in placed if one.magnitude is not None)
        return max((prod(down[1:]) * up[0] for down, up in compared), default=0) * dtype.itemsize

    @torch.no_grad()
    def _loaded(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[dict[str, dict[str, LowRank]], dict[str, dict[str, NormChange]]]:
        weights, _ = files_of(self.path)
        tensors = load_file(weights, backend="pread")
        state = self.target.converted(tensors, dtype)
        # Released as early as possible, so that only the file is in memory besides the adapter.
        del tensors
        parts: dict[str, dict[str, LowRank]] = {}
        norms: dict[str, dict[str, NormChange]] = {}

        def taken(part: str, layer: str, one: Placed | PlacedNorm) -> dict[str, Tensor]:
            return {end: state[part].pop(f"{layer}.{end}") for end in one.endings}

        for part, placed in self.changes.norms.items():
            for norm, one in placed.items():
                loaded = one.loaded(taken(part, norm, one), device)
                norms.setdefault(part, {})[norm] = loaded
        for part, layers in self.changes.parts.items():
            for layer, one in layers.items():
                own = taken(part, layer, one)
                change = _loaded(own[DOWN], own[UP], one, device, dtype)
                if one.magnitude is not None:
                    weight = weight_of(self.target.layer(part, layer, device), dtype)
                    sizes = own[one.magnitude.ending]
                    how = one.magnitude.axis, change, weight
                    sized = measured(sizes, *how, blended=one.magnitude.blended)
                    change = replace(change, magnitude=sized)
                if one.bias is not None:
                    bias = one.bias.scale * own[one.bias.ending].to(device, torch.float32)
                    change = replace(change, bias=bias)
                parts.setdefault(part, {})[layer] = change
            _join(parts[part], layers)
        return parts, norms


def _join(changes: dict[str, LowRank], layers: Mapping[str, Placed]) -> None:
    """Give layers that are fused in the file the norms of the inputs of the fused weight."""
    named: dict[str, list[str]] = {}
    for layer, one in layers.items():
        if one.magnitude is not None and one.magnitude.axis == INPUTS:
            named.setdefault(one.magnitude.source, []).append(layer)
    for own in named.values():
        magnitudes = [changes[layer].magnitude for layer in own]
        for layer, one in zip(own, joined(filter(None, magnitudes)), strict=True):
            changes[layer] = replace(changes[layer], magnitude=one)


def _header(path: Path) -> Header:
    weights, config = files_of(path)
    if config is None and weights != path:
        raise AdapterMismatch("has no adapter_config.json next to its weights")
    with safe_open(weights, framework="pt") as opened:
        names = set(opened.keys())
        alphas: dict[str, float] = {
            name: float(opened.get_tensor(name).item())
            for name in names
            if name.endswith(".alpha") and prod(opened.get_slice(name).get_shape()) == 1
        }
        others = (name for name in names if name not in alphas)
        shapes = shapes_of(opened, others, AdapterMismatch)
        metadata = dict(opened.metadata() or {})
    unused = {f"{layer}.alpha" for layer in layers_of_whole_operands(names)}
    large = [name for name, alpha in alphas.items() if not abs(alpha) <= MAX_ALPHA]
    if wrong := sorted(set(large) - unused):
        raise AdapterMismatch(
            f"has the tensor {wrong[0]}, which is not a number of at most {MAX_ALPHA:g}"
        )
    return Header(shapes, alphas, metadata, PeftConfig.of_file(config) if config else None)


def _loaded(
    down: Tensor, up: Tensor, one: Placed, device: torch.device, dtype: torch.dtype
) -> LowRank:
    # In float32, so that a small factor does not round away in the model's precision.
    up = (one.scale * up.float()).flatten(1)
    # Padded to few different ranks, so that many adapters share one batch of products.
    missing = _padded_rank(len(down)) - len(down)
    down = F.pad(down, (*(0, 0) * (down.ndim - 1), 0, missing))
    up = F.pad(up, (0, missing))
    return LowRank(_placed(down, device, dtype), _placed(up, device, dtype))


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(device, dtype).contiguous(memory_format=layout)


def _nbytes(one: Placed, dtype: torch.dtype) -> int:
    """Memory of a change when loaded, in bytes."""
    (_, *features), (out, *_) = one.shapes
    factors = _padded_rank(one.rank) * (prod(features) + out) * dtype.itemsize
    if one.bias is not None:
        factors += out * torch.float32.itemsize
    if one.magnitude is None:
        return factors
    entries = out if one.magnitude.axis == OUTPUTS else features[0]
    # For each entry, its magnitude and three numbers about the weight.
    return factors + 4 * entries * torch.float32.itemsize


def _padded_rank(rank: int) -> int:
    """The next power of two."""
    return 1 << (rank - 1).bit_length()


def _revision(path: Path) -> str:
    digest = hashlib.sha256()
    for file in filter(None, files_of(path)):
        for chunk in chunks_of(file):
            digest.update(chunk)
    return digest.hexdigest()[:16]
