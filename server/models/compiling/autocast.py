"""Inlines regions of a traced graph that disable autocast, so that its program can be cached.

``torch.export`` wraps what runs under ``torch.autocast(..., enabled=False)``, such as Z-Image's
rotary embedding, in a graph of its own, and the cache that stores programs refuses such a graph.
Nothing in Weft enables autocast, so inlining these regions changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule

__all__ = ["inline_disabled_autocast"]


def inline_disabled_autocast(traced: GraphModule) -> None:
    """Replace each region that disables autocast by the operations inside it.

    Args:
        traced: graph module from ``torch.export``; changed in place. Regions that enable autocast
            are left alone.
    """
    graph = traced.graph
    wrap: Any = torch.ops.higher_order.wrap_with_autocast
    for region in graph.find_nodes(op="call_function", target=wrap):
        # Arguments: device type, dtype, enabled, cache enabled; then the body and its operands.
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
