"""Files of IP-Adapters: headers first, weights once somebody asks for them; safetensors alone.

Their names are those of the authors' files: ``image_proj.*`` makes tokens of what an image encoder
puts out, and ``ip_adapter.N.to_k_ip.weight`` and ``to_v_ip.weight`` make keys and values of them in
the cross-attention layer N, where N counts by twos from 1.
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
from server.models.memory import room_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from server.models.image_prompts.image_prompt import ImageEncoder, Kind, Widths

__all__ = ["ENDING", "IPAdapterFile", "stamp_with_encoders"]

ENDING = ".safetensors"
PROJECTION, LAYERS = "image_proj.", "ip_adapter."
PLAIN_TOKENS = 4
"""That a plain adapter makes of an embedding, as diffusers takes for granted."""

NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True, eq=False)
class IPAdapterFile:
    """A file with an IP-Adapter that fits a model, and the image encoder beside it.

    Attributes:
        name: as requests say it.
        path: of the file.
        stamp: by which a change of the file, or of the encoders beside it, is noticed.
        kind: what it reads of a picture.
        tokens: that it makes of a picture.
        numbers: in all of its tensors.
        layers: names of its keys and values, for one layer after another.
        encoder: whose width it has.
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
        """Read a header, and find out whether it fits a model and an encoder beside it.

        Args:
            name: as requests say it.
            path: of the file.
            model: name of the model.
            widths: of its denoiser.

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
                f"IP-Adapter {name!r} is no readable safetensors file: "
                f"{without_folder(error, path)}."
            ) from None
        except _Misfit as error:
            raise ImagePromptMismatch(
                f"IP-Adapter {name!r} does not fit model {model!r}: it {error}."
            ) from None
        except ImagePromptMismatch as error:
            raise ImagePromptMismatch(f"IP-Adapter {name!r}: {error.message}") from None
        except Exception as error:
            # A header can say anything, and must not keep the others from being read.
            reason = str(error).partition("\n")[0]
            raise ImagePromptMismatch(
                f"IP-Adapter {name!r} is not understood: {reason}."
            ) from error

    def own_bytes(self, dtype: torch.dtype) -> int:
        """Memory of its own weights once they are loaded, in bytes."""
        return self.numbers * dtype.itemsize

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory of its weights and of its encoder's once they are loaded, in bytes."""
        return self.own_bytes(dtype) + self.encoder.nbytes(dtype)

    def load(
        self, device: torch.device, dtype: torch.dtype, encoder: ImageEncoder | None = None
    ) -> IPAdapter:
        """Read the weights.

        Args:
            device: where the model is.
            dtype: of its weights.
            encoder: that is loaded already; None loads it too.

        Raises:
            ImagePromptMismatch: the file has changed since its header was read.
            Overloaded: the weights do not fit in what is free of the device's memory.
        """
        encoder = encoder or self.load_encoder(device, dtype)
        nbytes = self.own_bytes(dtype)
        try:
            with room_for(f"IP-Adapter {self.name!r}", nbytes, device):
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
        """Read the weights of its encoder.

        Raises:
            ImagePromptMismatch: the files are not what the config describes.
            Overloaded: the weights do not fit in what is free of the device's memory.
        """
        with room_for(f"IP-Adapter {self.name!r}", self.encoder.nbytes(dtype), device):
            return self.encoder.load(device, dtype)


class _Misfit(Exception):
    """What does not fit, as a clause about the adapter."""


def stamp_with_encoders(path: Path, folders: Iterable[Path]) -> tuple[int, int]:
    """When a file or an encoder beside it was last changed, and the bytes of all of them.

    Args:
        path: of the file.
        folders: beside it, some of which may hold an encoder.
    """
    return joint_stamp([stamp_of(path), *(stamp for _, stamp in encoder_paths(folders))])


def _part(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {name: one for name, one in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): one for name, one in found.items()}


def _projection(shapes: Mapping[str, tuple[int, ...]], text: int) -> tuple[Kind, int, int]:
    """The kind of an adapter, how many tokens it makes, and the width of what it reads."""
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
    """The network of a projection, whose tensors diffusers' own converter names."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel
    try:
        network = unet._convert_ip_adapter_image_proj_to_diffusers(
            None, dict(state), low_cpu_mem_usage=False
        )
    except (RuntimeError, KeyError, IndexError) as error:
        # What torch says of keys that are missing, left over or of another shape.
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[1:2] or lines)[:200].rstrip(". ")
        raise _Misfit(f"has a projection of another shape than diffusers': {reason}") from None
    return network.eval().requires_grad_(requires_grad=False)


def _layers(shapes: Mapping[str, tuple[int, ...]], widths: Widths) -> list[str]:
    """Names of the keys and values, for one layer after another."""
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
    """The encoder beside an adapter that puts out what it reads.

    Raises:
        ImagePromptMismatch: there is none, or there are several.
    """
    found = list(_encoders(folder))
    fitting = [one for one in found if one.widths[kind] == width]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(one.path.name for one in fitting or found) or "none"
    wanted = f"it reads {width} features of an image encoder in a folder beside it"
    if fitting:
        raise ImagePromptMismatch(f"{wanted}, and several have as many: {names}.")
    raise ImagePromptMismatch(f"{wanted}, and none has as many; there are: {names}.")


def _encoders(folder: Path) -> Iterator[EncoderFolder]:
    for path, _ in encoder_paths(subfolders(folder)):
        encoder = EncoderFolder.read(path)
        if encoder is not None:
            yield encoder
