"""IP-Adapter files, safetensors only: the header is read first, weights on first use.

Tensors have the names of the authors' files: ``image_proj.*`` projects the output of an image
encoder to tokens, and ``ip_adapter.N.to_k_ip.weight`` and ``to_v_ip.weight`` project these to keys
and values in the cross-attention layer N, where N takes the odd numbers from 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from server.errors import ImagePromptMismatch
from server.models.folder import joint_stamp, stamp_of, without_folder
from server.models.header import shapes_of
from server.models.image_prompts.encoder_folder import EncoderFolder, encoder_paths, subfolders
from server.models.image_prompts.image_prompt import IPAdapter
from server.models.memory import check_memory_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from server.models.image_prompts.image_prompt import ImageEncoder, Kind, Widths

__all__ = ["ENDING", "IPAdapterFile", "stamp_with_encoders"]

ENDING = ".safetensors"
PROJECTION, LAYERS = "image_proj.", "ip_adapter."
PLAIN_TOKENS = 4
"""Number of tokens that a plain adapter makes of an embedding, which diffusers assumes as well."""

NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True, eq=False)
class IPAdapterFile:
    """A file with an IP-Adapter that fits a model, and the image encoder beside it.

    Attributes:
        name: name that requests use.
        path: path of the file.
        stamp: value that changes when the file, or an encoder beside it, changes.
        kind: which output of the encoder it reads.
        tokens: number of tokens per image.
        numbers: number of elements of all its tensors.
        layers: names of its key and value tensors, layer by layer.
        encoder: image encoder whose output has the width that it reads.
    """

    name: str
    path: Path
    stamp: tuple[int, int]
    kind: Kind
    tokens: int
    numbers: int
    layers: Sequence[str]
    encoder: EncoderFolder

    @classmethod
    def read(cls, name: str, path: Path, model: str, widths: Widths) -> IPAdapterFile:
        """Read the header of a file, and check that it fits a model and an encoder beside it.

        Args:
            name: name that requests use.
            path: path of the file.
            model: name of the model.
            widths: widths of the model's denoiser.

        Raises:
            ImagePromptMismatch: it cannot be used with the model; the sentence names both.
        """
        stamp = stamp_with_encoders(path, subfolders(path.parent))
        try:
            with safe_open(path, framework="pt") as opened:
                shapes = shapes_of(opened, opened.keys(), _Misfit)
            kind, tokens, width = _projection(shapes, widths.text)
            layers = _layers(shapes, widths)
            encoder = _encoder_for(path.parent, kind, width)
            numbers = sum(prod(shape) for shape in shapes.values())
            return cls(name, path, stamp, kind, tokens, numbers, layers, encoder)
        except (OSError, SafetensorError) as error:
            raise ImagePromptMismatch(
                f"IP-Adapter {name!r} is not a readable safetensors file: "
                f"{without_folder(error, path)}."
            ) from None
        except _Misfit as error:
            raise ImagePromptMismatch(
                f"IP-Adapter {name!r} does not fit model {model!r}: it {error}."
            ) from None
        except ImagePromptMismatch as error:
            raise ImagePromptMismatch(f"IP-Adapter {name!r}: {error.message}") from None
        except Exception as error:
            # A header can contain anything, and must not prevent other files from being read.
            reason = str(error).partition("\n")[0]
            raise ImagePromptMismatch(
                f"IP-Adapter {name!r} is not understood: {reason}."
            ) from error

    def own_bytes(self, dtype: torch.dtype) -> int:
        """Memory of its own weights when loaded, in bytes."""
        return self.numbers * dtype.itemsize

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of its weights and its encoder's when loaded, in bytes."""
        return self.own_bytes(dtype) + self.encoder.nbytes(dtype)

    def load(
        self, device: torch.device, dtype: torch.dtype, encoder: ImageEncoder | None = None
    ) -> IPAdapter:
        """Load the weights.

        Args:
            device: device of the model.
            dtype: dtype of its weights.
            encoder: the encoder if it is loaded already; None loads it as well.

        Raises:
            ImagePromptMismatch: the file has changed since its header was read.
            Overloaded: the weights do not fit into the free memory of the device.
        """
        encoder = encoder or self.load_encoder(device, dtype)
        nbytes = self.own_bytes(dtype)
        try:
            with check_memory_for(f"IP-Adapter {self.name!r}", nbytes, device):
                state = load_file(self.path, backend="pread")
                projection = _network(_part(state, PROJECTION)).to(dtype).to(device)
                layers = torch.cat([state[name] for name in self.layers]).to(dtype).to(device)
        except (OSError, SafetensorError, KeyError) as error:
            raise ImagePromptMismatch(
                f"IP-Adapter {self.name!r} could not be read: {without_folder(error, self.path)}."
            ) from None
        if stamp_with_encoders(self.path, subfolders(self.path.parent)) != self.stamp:
            raise ImagePromptMismatch(
                f"IP-Adapter {self.name!r} changed while it was read; try again."
            )
        identity = self.path, self.stamp
        return IPAdapter(self.name, self.kind, encoder, projection, layers, identity, nbytes)

    def load_encoder(self, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
        """Load the weights of its encoder.

        Raises:
            ImagePromptMismatch: the files do not match the config.
            Overloaded: the weights do not fit into the free memory of the device.
        """
        with check_memory_for(f"IP-Adapter {self.name!r}", self.encoder.nbytes(dtype), device):
            return self.encoder.load(device, dtype)


class _Misfit(Exception):
    """What does not fit, as a clause about the adapter."""


def stamp_with_encoders(path: Path, folders: Iterable[Path]) -> tuple[int, int]:
    """Time of the last change to a file or an encoder beside it, and their total size in bytes.

    Args:
        path: path of the file.
        folders: folders beside it, some of which may hold an encoder.
    """
    return joint_stamp([stamp_of(path), *(stamp for _, stamp in encoder_paths(folders))])


def _part(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {name: one for name, one in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): one for name, one in found.items()}


def _projection(shapes: Mapping[str, tuple[int, ...]], text: int) -> tuple[Kind, int, int]:
    """The kind of an adapter, its number of tokens, and the width of its input."""
    own = _part(shapes, PROJECTION)
    if "proj.weight" in own:
        width, made, tokens = own["proj.weight"][1], own["proj.weight"][0], PLAIN_TOKENS
        kind: Kind = "plain"
        made = made // tokens if made % tokens == 0 else 0
    elif {"latents", "proj_in.weight", "proj_out.weight"} <= own.keys():
        kind, tokens = "plus", own["latents"][1]
        width, made = own["proj_in.weight"][1], own["proj_out.weight"][0]
    else:
        raise _Misfit(
            "is neither of the plain kind nor of the kind plus; those for embeddings of faces, and "
            "the full ones, are not supported"
        )
    if made != text:
        raise _Misfit(f"makes tokens of {made} features, where those of the text have {text}")
    with torch.device("meta"):
        _network({name: torch.empty(shape) for name, shape in own.items()})
    return kind, tokens, width


def _network(state: Mapping[str, Tensor]) -> Any:
    """Build the projection network; diffusers' own converter renames the tensors."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel
    try:
        network = unet._convert_ip_adapter_image_proj_to_diffusers(
            None, dict(state), low_cpu_mem_usage=False
        )
    except (RuntimeError, KeyError, IndexError) as error:
        # Torch's message about keys that are missing, unexpected or of another shape.
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[1:2] or lines)[:200].rstrip(". ")
        raise _Misfit(f"has a projection of another shape than diffusers': {reason}") from None
    return network.eval().requires_grad_(requires_grad=False)


def _layers(shapes: Mapping[str, tuple[int, ...]], widths: Widths) -> list[str]:
    """Names of the key and value tensors, layer by layer."""
    expected = {
        f"{LAYERS}{2 * number + 1}.{part}.weight": (inner, widths.text)
        for number, inner in enumerate(widths.layers)
        for part in ("to_k_ip", "to_v_ip")
    }
    own = {name: shape for name, shape in shapes.items() if not name.startswith(PROJECTION)}
    for names, what in (
        ([name for name in own if name not in expected], "has, beyond the model's layers,"),
        ([name for name in expected if name not in own], "lacks"),
        (
            [n for n in own if own[n] != expected.get(n)],
            "has in another shape than the model's layers",
        ),
    ):
        if names:
            raise _Misfit(
                f"{what} the {'tensor' if len(names) == 1 else 'tensors'} {_listed(names)}"
            )
    return list(expected)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(sorted(names)[:NAMES_SHOWN]) + more


def _encoder_for(folder: Path, kind: Kind, width: int) -> EncoderFolder:
    """The encoder beside an adapter whose output has the width that the adapter reads.

    Raises:
        ImagePromptMismatch: there is none, or there are several.
    """
    found = list(_encoders(folder))
    fitting = [one for one in found if one.widths[kind] == width]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(one.path.name for one in fitting or found) or "none"
    wanted = f"it reads {width} features of an image encoder in a folder next to it"
    if fitting:
        raise ImagePromptMismatch(f"{wanted}, and several have as many: {names}.")
    raise ImagePromptMismatch(f"{wanted}, and none has as many; there are: {names}.")


def _encoders(folder: Path) -> Iterator[EncoderFolder]:
    for path, _ in encoder_paths(subfolders(folder)):
        encoder = EncoderFolder.read(path)
        if encoder is not None:
            yield encoder
