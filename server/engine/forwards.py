"""Forwards of one model at one latent shape, at few numbers of rows that are soon known."""

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

LONGEST_PIECE_S = 1.0
"""Seconds of the longest forward that runs before it is needed: whoever comes waits for its end."""


class Forwards:
    """Runs forwards filled up to sizes that have run before, and runs sizes before they are needed.

    A row that fills up repeats the first one, and changes nothing inside the network but by the
    last row's adapters, see ``RowInputs.padded``.

    Args:
        model: whose forwards.
        shape: of the latents, ``(C, h, w)``.
        cost: of the ticks.
        most: rows of a forward.
        graphs: recordings of the model's forwards; None for none.
        fixed: forwards run at the rows that they are given, which nothing but an image decides.
    """

    def __init__(
        self,
        model: HostedModel,
        shape: tuple[int, int, int],
        cost: TickCost,
        most: int,
        graphs: Graphs | None = None,
        *,
        fixed: bool = False,
    ) -> None:
        self.sizes = FixedRows(most) if fixed else RowSizes(most)
        self._mixed_sizes = RowSizes(most)
        self._model = model
        self._shape = shape
        self._cost = cost
        self._graphs = graphs
        self._fixed = fixed
        self._rehearsal: Rehearsal | None = None

    @property
    def known(self) -> int:
        """At how many numbers of rows forwards of this size, or with smaller ones, have run."""
        return len(self.sizes.known) + len(self._mixed_sizes.known)

    def size_of(self, rows: int, most: int, *, mixed: bool = False) -> int:
        """The number of rows that a forward of some rows runs at.

        Args:
            rows: that there are.
            most: rows that fit into memory.
            mixed: whether some of them are of smaller sizes.
        """
        sizes = self._mixed_sizes if mixed else self.sizes
        return sizes.of(rows, most, self._cost.seconds)

    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs, most: int) -> Tensor:
        """See ``HostedModel.evaluate``; ``most`` rows fit into memory."""
        rows = len(x)
        size = self.size_of(rows, most)
        filled = inputs.padded(size, fixed=self._fixed)
        raw = self._evaluated(padded(x, size), padded(t, size), filled)[:rows]
        self.sizes.note(rows, size, self._cost.seconds)
        return raw

    def evaluate_sizes(
        self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs, most: int
    ) -> list[Tensor]:
        """See ``HostedModel.evaluate_sizes``; of the sizes, this is the largest.

        Its masks make it another forward than one of this size alone, which has to be known, too.
        """
        rows, last = len(t), len(x[-1])
        size = self.size_of(rows, most, mixed=True)
        filled = [*x[:-1], padded(x[-1], last + size - rows)]
        raw = self._model.evaluate_sizes(filled, padded(t, size), inputs.padded(size, fixed=False))
        self._mixed_sizes.note(rows, size, self._cost.seconds)
        return [*raw[:-1], raw[-1][:last]]

    def wants(self, most: int | None = None) -> bool:
        """Whether a size of at most so many rows is to be run before it is needed."""
        return any(
            (most is None or size <= most) and self._cost.seconds(size) <= LONGEST_PIECE_S
            for size in self.sizes.wanted[:1]
        )

    def prepare(self) -> None:
        """Run the smallest size that is wanted; one that fails is not tried again."""
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
