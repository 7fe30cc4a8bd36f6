"""Perturbed-attention guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from guidance.edits import IdentityAttention
from guidance.perturbation import Layers, Perturbation

if TYPE_CHECKING:
    from guidance.edits import Edit


class PAG(Perturbation, frozen=True):
    """Perturbed-attention guidance (Ahn et al., arXiv 2403.17377, section 4).

    The disturbed network's self-attention puts out its values, as if each place saw itself alone:
    pictures of no structure, which guidance leads away from. Needs no second prompt.
    """

    summary: ClassVar[str] = "Away from a picture whose self-attention is switched off."
    source: ClassVar[str] = "Ahn et al., arXiv 2403.17377, section 4."
    name: Literal["pag"] = "pag"
    layers: Layers = ("middle",)

    @property
    @override
    def edit(self) -> Edit:
        return IdentityAttention(self.layers)
