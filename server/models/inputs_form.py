"""Split the inputs of a forward pass into tensors and everything else, called its form.

Two forward passes of the same form whose tensors have the same shapes launch the same operations on
the device, so a CUDA graph of one can be replayed with the tensors of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from weakref import ref

from server.models.adapters.adapter import RowAdapters
from server.models.conditioning import StackedConditioning
from server.models.controls.row_controls import RowControls
from server.models.edit_values import EditValues
from server.models.image_prompts.row_image_prompts import RowImagePrompts
from server.models.inputs import RowInputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from server.models.controls.row_controls import ControlForm
    from server.models.edit_values import EditPlaces
    from server.models.hosted import HostedModel
    from server.models.image_prompts.row_image_prompts import EqualLengthForm

__all__ = ["InputsForm", "StaleInputs", "form_of", "tensors_of"]

TEXT = "text"
AGAINST = "against"
EDITS = "edits"
CONTROL = "ControlNet"
PICTURE = "picture"

Found = TypeVar("Found")


class StaleInputs(Exception):
    """Something that a forward pass reads besides its tensors no longer exists."""


@dataclass(frozen=True, slots=True)
class InputsForm:
    """The non-tensor parts of a forward pass's inputs.

    It holds only weak references: what it refers to belongs to requests or to caches of networks.

    Attributes:
        adapters: reference to the cached tensors of the rows' adapters; None where no row has any.
        edits: where rows change the network; None where no row does.
        controls: forms of the ControlNets that act on rows.
        pictures: forms of the rows' image prompts, by number of tokens.
    """

    adapters: ref[object] | None = None
    edits: EditPlaces | None = None
    controls: tuple[ControlForm, ...] = ()
    pictures: tuple[EqualLengthForm, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether everything that it refers to still exists."""
        others = [one.control for one in self.controls]
        kept = others if self.adapters is None else [self.adapters, *others]
        return all(one() is not None for one in kept)

    @property
    def kind(self) -> str:
        """The non-tensor inputs of rows in a few words; empty for plain rows."""
        given = {
            "adapters": self.adapters is not None,
            "ControlNets": bool(self.controls),
            "image prompts": bool(self.pictures),
        }
        edits = set[str]() if self.edits is None else self.edits.kinds
        return ", ".join([*(name for name, some in given.items() if some), *sorted(edits)])

    @property
    def subject(self) -> str:
        """Name of the network that is called, for the log."""
        return "denoiser"

    def evaluate(self, model: HostedModel, tensors: Mapping[str, Tensor]) -> Tensor:
        """See ``HostedModel.evaluate``; the inputs are of this form.

        Args:
            model: model that the inputs are for.
            tensors: x, t and the tensors of the inputs, by the names of :func:`tensors_of`.

        Raises:
            StaleInputs: the form is no longer alive.
        """
        return model.evaluate(tensors["x"], tensors["t"], self.inputs(tensors))

    def inputs(self, tensors: Mapping[str, Tensor]) -> RowInputs:
        """Rebuild inputs of this form.

        Args:
            tensors: tensors by the names of :func:`tensors_of`.

        Raises:
            StaleInputs: the form is no longer alive.
        """
        texts, against = (StackedConditioning(_of(part, tensors)) for part in (TEXT, AGAINST))
        rows = len(texts)
        controls = [
            _there(one.together(_of(f"{CONTROL} {i}", tensors)))
            for i, one in enumerate(self.controls)
        ]
        pictures = [
            one.together(_of(f"{PICTURE} {i}", tensors)) for i, one in enumerate(self.pictures)
        ]
        return RowInputs(
            texts,
            scale_embedding=tensors.get("scale_embedding"),
            channels=tensors.get("channels"),
            against=against if against.tensors else None,
            adapters=(
                None
                if self.adapters is None
                else RowAdapters(((),) * rows, kept=_there(self.adapters()))
            ),
            controls=RowControls.of_tensors(rows, controls) if controls else None,
            image_prompts=RowImagePrompts.of_tensors(rows, pictures) if pictures else None,
            edit_values=None if self.edits is None else EditValues(self.edits, tensors[EDITS]),
        )


def form_of(inputs: RowInputs) -> InputsForm | None:
    """The form of inputs; None where they contain something that has no form.

    Args:
        inputs: inputs prepared by ``HostedModel.in_tensors``.
    """
    adapters, controls, prompts = inputs.adapters, inputs.controls, inputs.image_prompts
    apart = (
        not any(inputs.edits),
        adapters is None or adapters.kept is not None,
        controls is None or controls.together,
        prompts is None or prompts.together,
    )
    if not all(apart):
        return None
    return InputsForm(
        None if adapters is None else ref(adapters.kept),
        None if inputs.edit_values is None else inputs.edit_values.places,
        () if controls is None else tuple(one.form for one in controls.together),
        () if prompts is None else tuple(one.form for one in prompts.together),
    )


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
    for i, one in enumerate([] if inputs.controls is None else inputs.controls.together):
        found |= _named(f"{CONTROL} {i}", one.tensors)
    for i, one in enumerate([] if inputs.image_prompts is None else inputs.image_prompts.together):
        found |= _named(f"{PICTURE} {i}", one.tensors)
    return found


def _there(one: Found | None) -> Found:
    if one is None:
        raise StaleInputs
    return one


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part} {name}": tensor for name, tensor in tensors.items()}


def _of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert :func:`_named`: the tensors of one part, by their original names."""
    start = f"{part} "
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
