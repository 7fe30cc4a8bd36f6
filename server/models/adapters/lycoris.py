"""Expresses LyCORIS' changes of weights as products of two factors, exactly.

The factors of a Hadamard product of two low-rank matrices (LoHa) are the row-wise Khatri-Rao
products of the matrices' factors, with up to the square of the rank; where the layer's smaller side
is less than that, the matrix is multiplied out. The factors of a Kronecker product (LoKr) are the
Kronecker products of its operands' factors. For a convolution with a core (Tucker decomposition, in
LoCon too), the core is multiplied into the first factor. A full difference is multiplied by the
identity.

Yeh et al., "Navigating Text-To-Image Customization", arXiv 2309.14859, section 3; layouts as in
``lycoris/functional`` and ``lycoris/modules`` of the library.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from server.errors import AdapterMismatch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

__all__ = ["as_low_rank", "layers_of_whole_operands"]

OPERAND = re.compile(
    r"(?P<layer>.+)\.(?P<name>hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)|diff)"
)
MIDDLE = ".lora_mid.weight"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"


def as_low_rank(
    tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Replace tensors of LyCORIS' kinds by ``lora_down`` and ``lora_up``.

    The new factors are matrices ``[rank, in]`` and ``[out, rank]``, the second one multiplied by
    alpha / rank; for a convolution, ``in`` is the flattened product of input channels and kernel.

    Args:
        tensors: tensors of a file, or stand-ins for them; alphas have their values even then.
        dtype: dtype of the new factors, which are computed in float32.

    Raises:
        AdapterMismatch: an operand is missing, or two operands do not fit together; the message
            continues a sentence that begins with the adapter's name.
    """
    made = dict(tensors)
    operands: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = OPERAND.fullmatch(name)
        # Differences of norms and biases are vectors, and not those of a layer's weight.
        if match and (match["name"] != "diff" or tensor.ndim > 1):
            operands.setdefault(match["layer"], {})[match["name"]] = made.pop(name)
    for layer, own in operands.items():
        alpha = made.pop(f"{layer}.alpha", None)
        try:
            down, up, rank = _factors({name: one.float() for name, one in own.items()})
        except KeyError as error:
            raise AdapterMismatch(f"lacks the tensor {layer}.{error.args[0]}") from None
        except _RankMismatch as error:
            raise AdapterMismatch(f"has {error} in the layer {layer[:200]}") from None
        made[layer + DOWN] = down.to(dtype)
        made[layer + UP] = (up * _scale(alpha, rank)).to(dtype)
    for name in [name for name in made if name.endswith(MIDDLE)]:
        layer = name.removesuffix(MIDDLE)
        if (down := made.get(layer + DOWN)) is not None:
            core = made.pop(name).float() * _scale(made.pop(f"{layer}.alpha", None), len(down))
            whole = torch.einsum("oikl,in->onkl", core, down.float().flatten(1))
            made[layer + DOWN] = whole.to(dtype)
    return made


def layers_of_whole_operands(names: Collection[str]) -> set[str]:
    """Layers with a Kronecker product of two undecomposed operands, whose alpha is ignored.

    Trainers write arbitrary numbers there, such as 9999999999 (ai-toolkit), which overflow float16.

    Args:
        names: names of all tensors of a file.
    """
    first = (name.removesuffix(".lokr_w1") for name in names if name.endswith(".lokr_w1"))
    return {layer for layer in first if f"{layer}.lokr_w2" in names}


def _scale(alpha: Tensor | None, rank: int | None) -> float:
    return 1.0 if alpha is None or rank is None else float(alpha) / rank


def _factors(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """First factor, second factor, and the rank by which alpha is divided; None to ignore alpha."""
    if "diff" in own:
        return *_whole(own["diff"].flatten(1)), None
    if "hada_w1_a" in own:
        return _hadamard(own)
    return _kronecker(own)


def _hadamard(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """(a1 b1) * (a2 b2), elementwise."""
    a1, b1 = _with_core(own["hada_w1_a"], own["hada_w1_b"], own.get("hada_t1"))
    a2, b2 = _with_core(own["hada_w2_a"], own["hada_w2_b"], own.get("hada_t2"))
    rank = len(own["hada_w1_b"])
    if len(b1) * len(b2) > min(len(a1), b1.shape[1]):
        return *_whole((a1 @ b1) * (a2 @ b2)), rank
    down = (b1[:, None] * b2[None]).flatten(0, 1)
    up = (a1[:, :, None] * a2[:, None]).flatten(1)
    return down, up, rank


def _kronecker(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """(a1 b1) kron (a2 b2), where one factor of an undecomposed operand is the identity."""
    ranks: list[int] = []
    halves: list[tuple[Tensor, Tensor]] = []
    for number in (1, 2):
        if (whole := own.get(f"lokr_w{number}")) is not None:
            down, up = _whole(whole.flatten(1))
        else:
            second = own[f"lokr_w{number}_b"]
            up, down = _with_core(own[f"lokr_w{number}_a"], second, own.get(f"lokr_t{number}"))
            ranks.append(len(second))
        halves.append((up, down))
    (a1, b1), (a2, b2) = halves
    # Alpha is used if an operand is decomposed, as in the library.
    return torch.kron(b1, b2), torch.kron(a1, a2), ranks[0] if ranks else None


class _RankMismatch(Exception):
    """The factors of an operand have different ranks."""


def _with_core(first: Tensor, second: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors ``[out, rank]`` and ``[rank, in]`` of an operand, with the core multiplied in."""
    if core is None:
        fit = first.shape[1] == len(second)
    else:
        fit = core.shape[:2] == (len(first), len(second))
    if not fit:
        raise _RankMismatch(f"factors of the shapes {list(first.shape)} and {list(second.shape)}")
    if core is None:
        # OneTrainer writes them as 1 x 1 convolutions.
        return first.flatten(1), second.flatten(1)
    return first.mT.contiguous(), torch.einsum("ij...,jr->ir...", core, second).flatten(1)


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as the product of itself and the smaller of the two possible identities."""
    out, features = matrix.shape
    # Created from the matrix, so that the identity of a stand-in is a stand-in as well.
    identity = matrix.new_zeros(2 * (min(out, features),)).fill_diagonal_(1)
    # A slice, so that a stand-in counts as derived: the file's alpha does not apply to it.
    return (matrix[:], identity) if out <= features else (identity, matrix)
