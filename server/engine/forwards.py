"""Forward passes of one model at one latent shape, restricted to few numbers of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.engine.rehearsal import Rehearsal
from server.engine.row_sizes import FixedRows, RowSizes
from server.engine.state.padding import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from server.engine.cost_model import TickCost
    from server.engine.graphs import Graphs
    from server.models.hosted import HostedModel
    from server.models.inputs import RowInputs

__all__ = ["Forwards"]

MAX_PIECE_S = 1.0
"""Maximum seconds of a forward pass run in advance, since newcomers wait for its end."""


class Forwards:
    """Pads forward passes to numbers of rows that have run before, and runs others in advance.

    A padding row repeats the first one, without its changes inside the network, but with the
    adapters of the last row; see ``RowInputs.padded``.

    Args:
        model: model of the forward passes.
        shape: shape of the latents, ``(C, h, w)``.
        cost: cost of the ticks.
        max_rows: maximum number of rows in a forward pass.
        graphs: recordings of the model's passes; None to make none.
        fixed: whether passes run at the rows that they are given, which depend on nothing but an
            image.
    """

    def __init__(
        self,
        model: HostedModel,
        shape: tuple[int, int, int],
        cost: TickCost,
        max_rows: int,
        graphs: Graphs | None = None,
        *,
        fixed: bool = False,
    ) -> None:
        self.sizes = FixedRows(max_rows) if fixed else RowSizes(max_rows)
        self._mixed_sizes = RowSizes(max_rows)
        self._model = model
        self._shape = shape
        self._cost = cost
        self._graphs = graphs
        self._fixed = fixed
        self._rehearsal: Rehearsal | None = None

    @property
    def known(self) -> int:
        """Count of the numbers of rows that have run, of this size alone and with smaller sizes."""
        return len(self.sizes.known) + len(self._mixed_sizes.known)

    def size_of(self, rows: int, max_rows: int, *, mixed: bool = False) -> int:
        """Return the number of rows that a forward pass is padded to.

        Args:
            rows: number of rows before padding.
            max_rows: maximum number of rows that fit into memory.
            mixed: whether some of them are of smaller sizes.
        """
        sizes = self._mixed_sizes if mixed else self.sizes
        return sizes.of(rows, max_rows, self._cost.seconds)

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs, max_rows: int) -> Tensor:
        """See ``HostedModel.evaluate``; at most ``max_rows`` rows fit into memory."""
        rows = len(x)
        size = self.size_of(rows, max_rows)
        filled = inputs.padded(size, fixed=self._fixed)
        raw = self._evaluated(padded(x, size), padded(t, size), filled)[:rows]
        self.sizes.note(rows, size, self._cost.seconds)
        return raw

    def evaluate_sizes(
        self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs, max_rows: int
    ) -> list[Tensor]:
        """See ``HostedModel.evaluate_sizes``; this size is the largest of them.

        The masks make it another forward pass than one of this size alone, with its own first call.
        """
        rows, last = len(t), len(x[-1])
        size = self.size_of(rows, max_rows, mixed=True)
        filled = [*x[:-1], padded(x[-1], last + size - rows)]
        raw = self._model.evaluate_sizes(filled, padded(t, size), inputs.padded(size, fixed=False))
        self._mixed_sizes.note(rows, size, self._cost.seconds)
        return [*raw[:-1], raw[-1][:last]]

    def wants(self, max_rows: int | None = None) -> bool:
        """Whether a number of rows, up to ``max_rows``, should be run before it is needed."""
        return any(
            (max_rows is None or size <= max_rows) and self._cost.seconds(size) <= MAX_PIECE_S
            for size in self.sizes.wanted[:1]
        )

    def prepare(self) -> None:
        """Run the smallest number of rows that is wanted; one that fails is not tried again."""
        size = self.sizes.wanted[0]
        try:
            if self._rehearsal is None:
                scale = self._model.facts.latent_scale
                height, width = (scale * side for side in self._shape[1:])
                self._rehearsal = Rehearsal(self._model, width, height, fixed=self._fixed)
            self._rehearsal.seconds(size, self._evaluated)
        except Exception:
            self.sizes.leave_out(size)
            raise
        self.sizes.note(size, size, self._cost.seconds)

    def _evaluated(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        if self._graphs is None:
            return self._model.evaluate(x, t, inputs)
        return self._graphs.evaluate(x, t, inputs, self._cost)
