"""The inputs of a forward taken apart: tensors, and all else, which is their form.

Two forwards of one form, whose tensors have the same shapes, ask the device for the same
operations. So one can be repeated with the tensors of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import ref

from server.models.adapters.adapter import RowAdapters
from server.models.conditioning import StackedConditioning
from server.models.edit_values import EditValues
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from server.models.edit_values import EditPlaces

__all__ = ["Gone", "InputsForm", "form_of", "tensors_of"]

TEXT = "text"
AGAINST = "against"
EDITS = "edits"


class Gone(Exception):
    """Something that a forward reads beside its tensors is there no more."""


@dataclass(frozen=True, slots=True)
class InputsForm:
    """What of a forward's inputs is no tensor.

    It keeps nothing alive: what it refers to belongs to requests, or to what networks keep.

    Attributes:
        adapters: what is kept of the rows' adapters; None where no row has any.
        edits: where rows change the network; None where no row does.
    """

    adapters: ref[object] | None = None
    edits: EditPlaces | None = None

    @property
    def alive(self) -> bool:
        """Whether all that it refers to is still there."""
        return self.adapters is None or self.adapters() is not None

    @property
    def kind(self) -> str:
        """What rows are given that is no tensor, in a few words; empty of plain rows."""
        edits = set[str]() if self.edits is None else self.edits.kinds
        return ", ".join([*([] if self.adapters is None else ["adapters"]), *sorted(edits)])

    def inputs(self, tensors: Mapping[str, Tensor]) -> RowInputs:
        """The inputs of this form.

        Args:
            tensors: by the names of :func:`tensors_of`.

        Raises:
            Gone: the form is no more alive.
        """
        told, against = (StackedConditioning(_of(part, tensors)) for part in (TEXT, AGAINST))
        return RowInputs(
            told,
            scale_embedding=tensors.get("scale_embedding"),
            channels=tensors.get("channels"),
            against=against if against.tensors else None,
            adapters=None if self.adapters is None else _kept(self.adapters, len(told)),
            edit_values=None if self.edits is None else EditValues(self.edits, tensors[EDITS]),
        )


def form_of(inputs: RowInputs) -> InputsForm | None:
    """The form of inputs; None where they have more than is told apart here.

    Args:
        inputs: as ``HostedModel.in_tensors`` makes them.
    """
    if any(inputs.edits) or inputs.controls is not None or inputs.image_prompts is not None:
        return None
    edits = None if inputs.edit_values is None else inputs.edit_values.places
    if inputs.adapters is None:
        return InputsForm(edits=edits)
    kept = inputs.adapters.kept
    return None if kept is None else InputsForm(ref(kept), edits)


def tensors_of(inputs: RowInputs) -> dict[str, Tensor]:
    """All tensors of inputs that have a form, by name."""
    against = {} if inputs.against is None else inputs.against.tensors
    found = _named(TEXT, inputs.conditioning.tensors) | _named(AGAINST, against)
    if inputs.scale_embedding is not None:
        found["scale_embedding"] = inputs.scale_embedding
    if inputs.channels is not None:
        found["channels"] = inputs.channels
    if inputs.edit_values is not None:
        found[EDITS] = inputs.edit_values.numbers
    return found


def _kept(adapters: ref[object], rows: int) -> RowAdapters:
    kept = adapters()
    if kept is None:
        raise Gone
    return RowAdapters(((),) * rows, kept=kept)


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part} {name}": tensor for name, tensor in tensors.items()}


def _of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of :func:`_named`, by the names that they had before."""
    start = f"{part} "
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
