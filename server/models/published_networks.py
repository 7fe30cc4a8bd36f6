"""Recognizes weights of published networks that are easily mistaken for each other, by their names.

Names of tensors are from the authors' code (black-forest-labs/flux and flux2, NVlabs/Sana), and
from diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from server.errors import ModelMismatch

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["check_published"]


class Published(NamedTuple):
    """A published network.

    Attributes:
        name: name under which it was published.
        kind: its class in diffusers.
        marks: sets of tensors; a file with all tensors of one of them has its weights.
    """

    name: str
    kind: str
    marks: tuple[frozenset[str], ...]


FLUX_1: Final = Published(
    "FLUX.1",
    "FluxTransformer2DModel",
    (
        frozenset({"double_blocks.0.img_mod.lin.weight", "txt_in.weight"}),
        frozenset(
            {
                "single_transformer_blocks.0.proj_mlp.weight",
                "time_text_embed.text_embedder.linear_1.weight",
            }
        ),
    ),
)
FLUX_2: Final = Published(
    "FLUX.2",
    "Flux2Transformer2DModel",
    (
        frozenset({"single_stream_modulation.lin.weight"}),
        frozenset({"single_stream_modulation.linear.weight"}),
    ),
)
ALIKE: Final = {one.kind: one for one in (FLUX_1, FLUX_2)}

SANA: Final = "SanaTransformer2DModel"
NORM_OF_SANA: Final = "blocks.0.attn.q_norm.weight"
"""A tensor of SANA 1.5 and SANA-Sprint in their original code, which SANA 1.0 lacks."""

GUIDANCE_OF_SANA: Final = "cfg_embedder.mlp.0.weight"
"""A tensor of SANA-Sprint alone."""


def check_published(names: Collection[str], kind: str, called: str) -> None:
    """Refuse the weights of another network than the one that they would be loaded into.

    Args:
        names: names of the tensors, without a prefix.
        kind: diffusers class of the network.
        called: name of the network, for errors.

    Raises:
        ModelMismatch: they are those of FLUX.1 for FLUX.2 or the reverse, or have the original
            names of a SANA for which there is no converter.
    """
    if kind == SANA and NORM_OF_SANA in names:
        own = "SANA-Sprint" if GUIDANCE_OF_SANA in names else "SANA 1.5"
        raise ModelMismatch(
            f"{called} has the weights of {own} under their original names, which can be read of "
            "SANA 1.0 alone; use the weights of its folder in the diffusers layout."
        )
    if kind not in ALIKE:
        return
    for one in ALIKE.values():
        if one.kind != kind and any(marks <= set(names) for marks in one.marks):
            raise ModelMismatch(
                f"{called} has the weights of {one.name}, but its config describes the network of "
                f"{ALIKE[kind].name}."
            )
