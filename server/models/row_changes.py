"""Per-row changes inside a model's networks: edits of blocks, and adapters."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from server.models.adapters.adapted_network import AdaptedNetwork
from server.models.row_edits import RowEdits

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    import torch
    from torch import Tensor, nn

    from server.models.adapters.adapter import RowAdapters
    from server.models.inputs import RowInputs

__all__ = ["RowChanges"]


class RowChanges:
    """Applies changes to the rows of a denoiser, and to the prompts of text encoders.

    Args:
        denoiser: name of the denoiser in a model folder.
        networks: networks that adapters may change, including the denoiser, by their names in a
            model folder.
        device: device of the networks.

    Attributes:
        edits: edits of the denoiser.
    """

    def __init__(
        self, denoiser: str, networks: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        self._device = device
        self.edits = RowEdits(networks[denoiser])
        adapted = {part: AdaptedNetwork(part, one, device) for part, one in networks.items()}
        self._denoiser = adapted.pop(denoiser)
        self._texts = adapted

    @contextmanager
    def of_texts(self, adapters: RowAdapters | None) -> Generator[None]:
        """Apply adapters to the text encoders inside the ``with`` block.

        Args:
            adapters: adapters of each prompt; None where no prompt has any.
        """
        with ExitStack() as adapted:
            for network in self._texts.values():
                adapted.enter_context(network.applied(adapters))
            yield

    def in_tensors(self, inputs: RowInputs) -> RowInputs:
        """Prepare edits and adapters as described in ``HostedModel.in_tensors``."""
        return replace(
            inputs,
            edits=(),
            edit_values=self.edits.values(inputs.edits, self._device),
            adapters=self._denoiser.kept_for(inputs.adapters),
        )

    @contextmanager
    def of_rows(
        self, inputs: RowInputs, x: Tensor, against: Tensor | None = None
    ) -> Generator[None]:
        """Apply changes to the denoiser in the forward pass inside the ``with`` block.

        Args:
            inputs: inputs of its rows.
            x: input of the denoiser, ``[rows, C, h, w]``.
            against: see ``RowEdits.applied``.
        """
        edited = self.edits.applied(inputs.edit_values or inputs.edits, x, against)
        with edited, self._denoiser.applied(inputs.adapters):
            yield
