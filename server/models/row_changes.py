"""What the rows of a forward change inside a model's networks: edits of blocks, and adapters."""

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
    """Changes the rows of a denoiser, and the prompts of text encoders.

    Args:
        denoiser: its name in a model folder.
        networks: that adapters may change, the denoiser among them, by their names there.
        device: where they are.

    Attributes:
        edits: of the denoiser.
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
        """Change the text encoders while they run inside.

        Args:
            adapters: of each prompt; None where no prompt has any.
        """
        with ExitStack() as adapted:
            for network in self._texts.values():
                adapted.enter_context(network.applied(adapters))
            yield

    def in_tensors(self, inputs: RowInputs) -> RowInputs:
        """The same inputs as ``HostedModel.in_tensors`` prepares them, of edits and adapters."""
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
        """Change the denoiser in the forward that runs inside.

        Args:
            inputs: of its rows.
            x: what the denoiser will be given, ``[rows, C, h, w]``.
            against: see ``RowEdits.applied``.
        """
        edited = self.edits.applied(inputs.edit_values or inputs.edits, x, against)
        with edited, self._denoiser.applied(inputs.adapters):
            yield
