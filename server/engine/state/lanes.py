"""The lanes of the engine, and the choice of an image's lane."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from server.engine.state.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Mapping

    from server.engine.cost_model import CostModel, TickCost
    from server.engine.forwards import Forwards
    from server.engine.metrics import EngineMeasurements
    from server.engine.task import ImageTask
    from server.models.conditioning import Conditioning
    from server.models.hosted import HostedModel

__all__ = ["MAX_IDLE_LANES", "Lanes"]

MAX_IDLE_LANES = 8
"""Number of lanes that are kept although no image is under way in them."""

Key: TypeAlias = "tuple[str, tuple[int, int, int], Hashable, int | None]"
"""Model, latent shape, what else images of one pass must have in common, and the fixed rows."""


class Lanes:
    """Makes a lane for the first image of its kind, and keeps some lanes that have become empty.

    The objects that it is given belong to the engine and change with it.

    Args:
        models: hosted models by name.
        costs: tick costs.
        measurements: counters that hold the row budget and the fixed rows.
        forwards_of: function that returns the object that pads forward passes of a model at a
            latent shape, or None to run them as they are.
        mixed: whether images of several sizes may share a forward pass if their model supports it.
    """

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        costs: CostModel,
        measurements: EngineMeasurements,
        forwards_of: Callable[[HostedModel, tuple[int, int, int], TickCost, int], Forwards | None],
        *,
        mixed: bool,
    ) -> None:
        self._models = models
        self._costs = costs
        self._measurements = measurements
        self._forwards_of = forwards_of
        self._mixed = mixed
        self._lanes: dict[Key, Lane] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def of(self, task: ImageTask, conditioning: Collection[Conditioning], rows: int) -> Lane:
        """Return the lane of an image.

        Args:
            task: task of the image.
            conditioning: all conditioning that its rows may get, which has one ``company``.
            rows: number of rows that it needs at once in a forward pass, with its group.
        """
        model = self._models[task.model]
        shape = model.latent_shape(task.width, task.height)
        group = model.group_key(task.width, task.height, max(one.length for one in conditioning))
        [company] = {one.company for one in conditioning}
        fixed = self._fixed_for(rows)
        key = task.model, shape, (group, company), fixed
        if key not in self._lanes:
            self._forget_idle()
            max_rows = self._measurements.row_budget
            max_rows = max_rows if fixed is None else min(max_rows, fixed)
            read = model.forward_shape(task.width, task.height, task.references)
            cost = self._costs.keep(task.model, read)
            # Prepared passes have the conditioning of a prompt alone.
            alone = company is None
            forwards = self._forwards_of(model, shape, cost, fixed or max_rows) if alone else None
            mixes = (task.model, group) if self._mixed and model.mixes_sizes and alone else None
            reads = read[2] / shape[2]
            self._lanes[key] = Lane(model, shape, cost, max_rows, forwards, mixes, reads, fixed)
        return self._lanes[key]

    def _fixed_for(self, rows: int) -> int | None:
        """Fixed rows of an image's passes; its bits depend on them, so only the image decides."""
        fixed = self._measurements.fixed_rows
        while fixed is not None and fixed < rows:
            fixed = min(2 * fixed, self._measurements.row_budget)
        return fixed

    def forget(self, model: str) -> None:
        """Drop the lanes of a model."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if key[0] != model}

    def _forget_idle(self) -> None:
        """Drop idle lanes: requests of ever new sizes must not fill the memory with empty pools."""
        idle = [key for key, lane in self._lanes.items() if lane.pool.idle]
        for key in idle[: max(0, len(self._lanes) + 1 - MAX_IDLE_LANES)]:
            del self._lanes[key]
