"""Applies adapters to some rows of a forward pass, and leaves the other rows unchanged.

Nothing is merged into the weights: after a layer has computed all rows, the changes of rows with
adapters are added to their outputs. Rows with different adapters share the matrix products: two for
each layer, however many adapters there are. The outputs of other rows are unchanged bit for bit.

The operands of these products, the stacked factors of all rows, are kept for the next forward pass
as long as rows have the same adapters in the same order, as is usual from one tick to the next.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias
from weakref import ref

import torch
from torch import nn

from server.lru import ByteBoundedLRU
from server.models.adapters.adapted_rows import passes, sender
from server.models.adapters.layer_changes import layer_changes
from server.models.adapters.norm_rows import norm_changes
from server.models.adapters.norms import is_norm
from server.models.memory import measure

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from server.models.adapters.adapter import Adapter, RowAdapters
    from server.models.adapters.layer_changes import ChangedLayer
    from server.models.adapters.norm_rows import ChangedNorm
    from server.models.adapters.row_scales import InputScales
    from server.models.adapters.stack import Layer

__all__ = ["AdaptedNetwork"]

CACHE_SHARE = 1 / 32
"""Maximum share of the device's memory for stacks that are kept for later forward passes."""

Key: TypeAlias = "tuple[bool, tuple[tuple[tuple[ref[Adapter], float], ...], ...]]"
"""``RowAdapters.fixed``, and the adapters and weights of the rows of a forward pass.

It holds weak references: the memory of adapters belongs to the requests.
"""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Plan:
    """The changes of a forward pass.

    Attributes:
        layers: changes of layers, by name.
        norms: changes of norms, by name.
        nbytes: size of stacks, factors and changes of norms, in bytes.
    """

    layers: Mapping[str, ChangedLayer]
    norms: Mapping[str, ChangedNorm]
    nbytes: int


class AdaptedNetwork:
    """A network whose rows may have adapters.

    Args:
        part: name of the network in a model folder, by which adapters refer to it.
        network: the network. Its layers take and return one entry for each row, or several batches
            of all rows, concatenated.
        device: device of the network.
        by_products: whether to compute convolutions as matrix products, see ``convolution``. By
            default on a GPU.
        max_bytes: maximum size of kept stacks; by default a share of the device's memory.
    """

    def __init__(
        self,
        part: str,
        network: nn.Module,
        device: torch.device,
        *,
        by_products: bool | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self._part = part
        self._device = device
        self._by_products = device.type == "cuda" if by_products is None else by_products
        if max_bytes is None:
            max_bytes = int(CACHE_SHARE * measure(device).total)
        self._max_bytes = max_bytes
        self._plans: ByteBoundedLRU[Key, _Plan] = ByteBoundedLRU(max_bytes, lambda one: one.nbytes)
        self._layers: dict[str, Layer] = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._norms = {name: one for name, one in network.named_modules() if is_norm(one)}

    @property
    def kept_bytes(self) -> int:
        """Size of the stacks that are kept for the next forward pass, in bytes."""
        return self._plans.bytes

    def kept_for(self, adapters: RowAdapters | None) -> RowAdapters | None:
        """Prepare adapters: compute stacks once, and keep them while there is room.

        ``RowAdapters.kept`` is the same object for the same adapters in the same order for as long
        as it is kept, and a forward pass reads nothing else of the adapters.

        Args:
            adapters: adapters of the rows of a forward pass; None where no row has any.
        """
        self._plans.discard(_has_died)
        return replace(adapters, kept=self._planned(adapters)) if adapters else None

    @contextmanager
    def applied(self, adapters: RowAdapters | None) -> Generator[None]:
        """Add the changes of each row's adapters in the forward pass inside the ``with`` block.

        Args:
            adapters: adapters of the rows of that pass; None where no row has any.
        """
        self._plans.discard(_has_died)
        handles = self._hooked(adapters) if adapters else []
        try:
            yield
        except torch.OutOfMemoryError:
            self._plans.shrink(0)
            raise
        finally:
            # Forward passes without adapters run without hooks.
            for handle in handles:
                handle.remove()

    def _hooked(self, adapters: RowAdapters) -> list[RemovableHandle]:
        """Register hooks on all layers and norms that are changed."""
        plan, rows = self._planned(adapters), len(adapters.rows)
        keep = plan.nbytes <= self._max_bytes
        handles = [one.hooked(self._norms[name], rows) for name, one in plan.norms.items()]
        for name, changed in plan.layers.items():
            handles += _Change(changed, rows, keep=keep).hooked(self._layers[name])
        return handles

    def _planned(self, adapters: RowAdapters) -> _Plan:
        if isinstance(adapters.kept, _Plan):
            return adapters.kept
        rows = (tuple((ref(one.adapter), one.weight) for one in own) for own in adapters.rows)
        return self._plans.get((adapters.fixed, tuple(rows)), lambda: self._plan(adapters))

    def _plan(self, adapters: RowAdapters) -> _Plan:
        sent = sender(self._device)
        own = self._part, self._layers, adapters, sent
        layers = layer_changes(*own, by_products=self._by_products)
        norms = norm_changes(self._part, self._norms, adapters, sent)
        nbytes = sum(one.nbytes for one in (*layers.values(), *norms.values()))
        return _Plan(layers, norms, nbytes)


class _Change:
    """Changes a layer during a forward pass, by hooks.

    Args:
        changed: changes of the layer.
        rows: number of rows of the forward pass.
        keep: whether stacks are kept for the next forward pass.
    """

    def __init__(self, changed: ChangedLayer, rows: int, *, keep: bool) -> None:
        self._changed = changed
        self._rows = rows
        self._keep = keep
        self._x: Tensor | None = None

    def hooked(self, layer: Layer) -> list[RemovableHandle]:
        """Register the hooks on the layer."""
        # Before all other forward hooks, so that hooks that edit a layer's output see it adapted;
        # and after the pre-hooks that edit its input.
        handles = [layer.register_forward_hook(self._after, prepend=True)]
        if (scales := self._changed.inputs) is not None:
            handles.append(layer.register_forward_pre_hook(partial(self._before, scales)))
        return handles

    def _before(
        self, scales: InputScales, layer: Layer, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Scale the input for the layer's own weight, and remember it for the changes."""
        self._x, *others = args
        made = [scales.scaled(layer, own) for own in passes(self._x, self._rows)]
        return (made[0] if len(made) == 1 else torch.cat(made), *others)

    def _after(self, layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Scale the output, and add the changes, one batch of rows after another."""
        x, self._x = args[0] if self._x is None else self._x, None
        if isinstance(layer, nn.Conv2d):
            output = output.contiguous(memory_format=torch.channels_last)
        # Views: in-place additions to the tokens change the output.
        tokens = output.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else output
        tokens = tokens.view(len(tokens), -1, tokens.shape[-1])
        both = passes(x, self._rows), passes(tokens, self._rows)
        for own_x, own in zip(*both, strict=True):
            if self._changed.outputs is not None:
                self._changed.outputs.scale(own)
            for one in self._changed.changes:
                one.stack(keep=self._keep).add(layer, own_x, own)
        return output


def _has_died(key: Key) -> bool:
    """Whether a plan has an adapter that no request uses any more."""
    return any(adapter() is None for own in key[1] for adapter, _ in own)
