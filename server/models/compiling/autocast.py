"""Takes regions that disable autocast out of a traced graph, as no program of them can be stored.

``torch.export`` makes a graph of its own of what runs in ``torch.autocast(..., enabled=False)``, as
Z-Image's rotary embedding does, and the cache that programs are stored by refuses such a graph.
Nothing in Weft enables autocast, so disabling it changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule

__all__ = ["inline_disabled_autocast"]


def inline_disabled_autocast(traced: GraphModule) -> None:
    """Put what runs where autocast is disabled in the place of the region.

    Args:
        traced: by ``torch.export``; changed in place. Regions that enable autocast stay.
    """
    graph = traced.graph
    wrap: Any = torch.ops.higher_order.wrap_with_autocast
    for region in graph.find_nodes(op="call_function", target=wrap):
        # Of a device, in a type, whether enabled, whether cached; then the body and its operands.
        _, _, enabled, _, body, *given = cast("tuple[Any, ...]", region.args)
        if enabled:
            continue
        inner: Graph = getattr(traced, body.target).graph
        operands = dict(zip(inner.find_nodes(op="placeholder"), given, strict=True))
        with graph.inserting_before(region):
            made: Any = graph.graph_copy(inner, operands)
        for one in list(region.users):
            one.replace_all_uses_with(made[one.args[1]])
            graph.erase_node(one)
        graph.erase_node(region)
        if not body.users:
            graph.erase_node(body)
    traced.delete_all_unused_submodules()
    traced.recompile()
